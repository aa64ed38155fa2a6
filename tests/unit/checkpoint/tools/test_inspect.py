from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.checkpoint.format.commit import read_manifest
from harness.checkpoint.format.layout import read_header
from harness.checkpoint.tools.inspect import contents, text
from harness.errors import CheckpointError

Make = Callable[..., Path]


@pytest.fixture
def checkpoint(make_checkpoint: Make) -> Path:
    model = {
        "embed.weight": torch.zeros(6, 10),
        "scale": torch.ones((), dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
    }
    optimizer = {"exp_avg.embed.weight": torch.zeros(6, 10)}
    return make_checkpoint(model, optimizer, aliases={"head.weight": "embed.weight"}, num_ranks=2)


def test_every_tensor_is_there_with_its_place_when_asked(checkpoint: Path) -> None:
    found = contents(checkpoint)
    assert json.loads(json.dumps(found)) == found
    assert (found["epoch"], found["step"], found["metrics"]) == (1, 10, {"eval/loss": 0.5})
    assert found["topology"] == {"strategy": "ddp", "world_size": 2}
    assert found["save"] == {"copy_s": 1}
    assert found["aliases"] == {"head.weight": "embed.weight"}
    manifest = read_manifest(checkpoint)
    assert found["files"] == [
        {"name": file.name, "bytes": file.size_bytes, "ranges": len(file.ranges)} for file in manifest.files
    ]
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert set(tensors) == {"embed.weight", "scale", "empty", "exp_avg.embed.weight"}
    assert tensors["embed.weight"]["file"] == "model.safetensors"
    assert tensors["exp_avg.embed.weight"]["file"] == "optimizer.safetensors"
    assert [tensors["scale"][key] for key in ("dtype", "shape", "bytes")] == ["BF16", [], 2]
    assert [tensors["empty"][key] for key in ("dtype", "shape", "bytes")] == ["F32", [0, 3], 0]


def test_owners_are_the_ranks_that_wrote_any_byte_when_bytes_are_divided(make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint({f"t{number}": torch.zeros(number + 1) for number in range(9)}, num_ranks=4)
    (file,) = read_manifest(checkpoint).files
    stored, _ = read_header(checkpoint / file.name)
    found = {tensor["name"]: tensor["ranks"] for tensor in contents(checkpoint)["tensors"]}
    for name, place in stored.items():
        writers = {
            part.rank for part in file.ranges for byte in range(place.start, place.end) if part.start <= byte < part.end
        }
        assert found[name] == sorted(writers)
    assert any(len(ranks) > 1 for ranks in found.values())


def test_format_is_no_alias_when_a_tensor_has_the_name_of_its_value(make_checkpoint: Make) -> None:
    assert contents(make_checkpoint({"pt": torch.zeros(1)}))["aliases"] == {}


def test_each_tensor_has_a_line_when_read(checkpoint: Path) -> None:
    lines = text(checkpoint).splitlines()
    size = read_manifest(checkpoint).size_bytes
    assert lines[0] == f"{checkpoint}: epoch 1, step 10, {size:,} bytes, by 2 x ddp"
    assert any(re.fullmatch(r"  embed\.weight +F32 +\[6, 10\] +240  rank 0", line) for line in lines)
    assert any(re.fullmatch(r"  exp_avg\.embed\.weight +F32 +\[6, 10\] +240  rank 1", line) for line in lines)
    assert any(re.fullmatch(r"  empty +F32 +\[0, 3\] +0", line) for line in lines)
    assert lines.count("  head.weight is embed.weight") == 1
    assert sum(line.startswith(("model.safetensors  ", "optimizer.safetensors  ")) for line in lines) == 2


def test_ranks_are_a_range_when_they_are_many(make_checkpoint: Make) -> None:
    assert "ranks 0 to 3" in text(make_checkpoint({"a": torch.zeros(40)}, num_ranks=4))


def test_alias_is_told_once_when_the_weights_are_split(make_checkpoint: Make) -> None:
    model = {name: torch.zeros(10) for name in "abc"}
    checkpoint = make_checkpoint(model, aliases={"tied": "b"}, max_shard_size_bytes=40)
    assert contents(checkpoint)["aliases"] == {"tied": "b"}
    assert text(checkpoint).count("tied is b") == 1


def test_error_has_the_path_when_a_file_is_cut_off_or_missing(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        contents(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        text(checkpoint)
