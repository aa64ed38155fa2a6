from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.format.commit import MANIFEST, Manifest, commit, read_manifest
from harness.checkpoint.format.verify import require_checkpoint, require_whole, summary, verify
from harness.checkpoint.save.writer_client import write_json
from harness.errors import CheckpointError, HarnessError

Make = Callable[..., Path]
MODEL = {"fc.weight": torch.arange(60.0).reshape(6, 10), "fc.bias": torch.ones(6, dtype=torch.bfloat16)}
OPTIMIZER = {"exp_avg.fc.weight": torch.arange(60.0)}


@pytest.fixture
def checkpoint(make_checkpoint: Make) -> Path:
    return make_checkpoint(MODEL, OPTIMIZER, num_ranks=3, max_shard_size_bytes=100)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def test_all_is_well_when_nothing_has_changed(checkpoint: Path) -> None:
    found = verify(checkpoint)
    manifest = read_manifest(checkpoint)
    assert found.problems == ()
    assert found.num_files == len(manifest.files) == 4
    assert found.num_ranges == sum(len(file.ranges) for file in manifest.files)
    assert found.size_bytes == manifest.size_bytes
    assert {part.rank for file in manifest.files for part in file.ranges} == {0, 1, 2}
    require_whole(checkpoint)
    require_checkpoint(checkpoint)
    assert "every byte is what was written" in summary(checkpoint, found)


def test_problem_names_bytes_and_rank_when_a_byte_is_flipped(checkpoint: Path) -> None:
    for file in read_manifest(checkpoint).files:
        for part in file.ranges:
            for byte in {part.start, (part.start + part.end) // 2, part.end - 1}:
                flip(checkpoint / file.name, byte)
                expected = f"{file.name}: bytes {part.start} to {part.end}, written by rank {part.rank}, are not"
                (problem,) = verify(checkpoint).problems
                assert problem.startswith(expected)
                flip(checkpoint / file.name, byte)
    assert verify(checkpoint).problems == ()


@given(st.data())
def test_damage_is_found_when_any_byte_is_another(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.mkdir(exist_ok=True)
    content = bytearray(data.draw(st.binary(min_size=2, max_size=40)))
    files = (write_json(path / "x.json", content.hex()),)
    shutil.rmtree(path.with_name("committed"), ignore_errors=True)
    commit(path, path.with_name("committed"), Manifest("", 0, 0, 0, {}, files, {}, {}))
    path = path.with_name("committed")
    assert verify(path).problems == ()
    written = bytearray((path / "x.json").read_bytes())
    position = data.draw(st.integers(0, len(written) - 1))
    written[position] ^= data.draw(st.integers(1, 255))
    (path / "x.json").write_bytes(written)
    assert len(verify(path).problems) == 1


def test_every_problem_is_listed_when_there_are_several(checkpoint: Path) -> None:
    files = read_manifest(checkpoint).files
    for file in files:
        flip(checkpoint / file.name, 0)
    found = verify(checkpoint)
    assert [problem.split(":")[0] for problem in found.problems] == [file.name for file in files]
    assert summary(checkpoint, found).splitlines() == [
        f"{checkpoint}: is damaged:",
        *(f"  {problem}" for problem in found.problems),
    ]
    with pytest.raises(CheckpointError, match=re.escape(f"{found.problems[0]} (and 3 more)")):
        require_whole(checkpoint)


def test_file_is_named_when_it_is_missing(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").unlink()
    assert verify(checkpoint).problems == ("optimizer.safetensors: No such file or directory",)


@pytest.mark.parametrize("change_bytes", [-1, 1])
def test_problem_has_the_sizes_when_a_file_has_another_length(checkpoint: Path, change_bytes: int) -> None:
    path = checkpoint / "optimizer.safetensors"
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"x")[: size + change_bytes])
    assert verify(checkpoint).problems == (
        f"optimizer.safetensors: has {size + change_bytes} bytes, was written with {size}",
    )


def test_optimizer_is_not_read_when_only_weights_are_verified(checkpoint: Path) -> None:
    flip(checkpoint / "optimizer.safetensors", 100)
    assert verify(checkpoint, weights_only=True).problems == ()
    require_whole(checkpoint, weights_only=True)
    flip(checkpoint / "model-00001-of-00002.safetensors", 100)
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        require_whole(checkpoint, weights_only=True)


def test_error_has_the_path_when_it_is_not_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="is not a directory"):
        require_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="has no manifest"):
        require_checkpoint(tmp_path)
    (checkpoint / MANIFEST).write_text("{")
    for refuse in (verify, require_checkpoint):
        with pytest.raises(CheckpointError, match=re.escape(str(checkpoint / MANIFEST))):
            refuse(checkpoint)
