from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from harness.checkpoint.tools.export import export
from harness.errors import CheckpointError

Make = Callable[..., Path]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(100).to(dtype)


MODEL = {
    "embed.weight": random((30, 7), torch.float32, 0),
    "fc.weight": random((5, 11), torch.float64, 1),
    "half": random((9,), torch.float16, 2),
    "brain": random((3, 3), torch.bfloat16, 3),
    "quarter": random((8,), torch.float8_e4m3fn, 4),
    "count": torch.tensor(3),
    "mask": torch.tensor([True, False, True]),
    "phase": torch.complex(torch.ones(3), torch.zeros(3)),
    "empty": torch.empty(0, 4),
    "scale": torch.tensor(0.1),
    "special": torch.tensor([float("inf"), float("nan"), -0.0, 1e30]),
}


@pytest.fixture
def checkpoint(make_checkpoint: Make) -> Path:
    return make_checkpoint(MODEL, {"exp_avg.x": torch.ones(4)}, aliases={"head.weight": "embed.weight"}, num_ranks=3)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_floats_alone_are_cast_as_torch_does_when_a_dtype_is_given(
    tmp_path: Path, checkpoint: Path, dtype: str | None
) -> None:
    written = export(checkpoint, tmp_path / "out", dtype=dtype)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert written == (tmp_path / "out" / "model.safetensors").stat().st_size
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert set(loaded) == set(MODEL)
    for name, tensor in MODEL.items():
        expected = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(getattr(torch, dtype))
        assert same_bits(loaded[name], expected), name


@pytest.mark.parametrize("source_limit", [None, 300])
@pytest.mark.parametrize("limit", [None, 1, 300])
def test_files_and_index_load_when_the_weights_are_split_anew(
    tmp_path: Path, make_checkpoint: Make, source_limit: int | None, limit: int | None
) -> None:
    checkpoint = make_checkpoint(MODEL, max_shard_size_bytes=source_limit)
    written = export(checkpoint, tmp_path / "out", max_shard_size_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert written == sum(path.stat().st_size for path in files)
    loaded: dict[str, Tensor] = {}
    for path in files:
        part = load_file(path)
        assert limit is None or len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
        loaded |= part
    assert set(loaded) == set(MODEL)
    assert all(same_bits(loaded[name], tensor) for name, tensor in MODEL.items())
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        record = json.loads(index.read_text())
        assert record["metadata"]["total_size"] == sum(tensor.nbytes for tensor in MODEL.values())
        assert {(tmp_path / "out" / file) for file in record["weight_map"].values()} == set(files)
        for name, file in record["weight_map"].items():
            with safe_open(tmp_path / "out" / file, "pt") as stored:
                assert name in stored.keys()  # noqa: SIM118


def test_tied_weights_are_tied_again_when_the_export_is_loaded(tmp_path: Path, make_checkpoint: Make) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    weight = random((4, 3), torch.float32, 0)
    export(make_checkpoint({"embed.weight": weight}, aliases={"head.weight": "embed.weight"}), tmp_path / "out")
    model = Tied()
    assert [list(names) for names in load_model(model, tmp_path / "out" / "model.safetensors")] == [[], []]
    assert torch.equal(model.head.weight, weight)


def test_cast_is_right_when_a_tensor_is_longer_than_two_chunks(tmp_path: Path, make_checkpoint: Make) -> None:
    tensor = torch.arange((8 << 20) + 5, dtype=torch.float32).mul(0.1)
    export(make_checkpoint({"a": tensor}), tmp_path / "out", dtype="bfloat16")
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors")["a"], tensor.bfloat16())


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_output_is_left_alone_when_it_exists(tmp_path: Path, checkpoint: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'out'}: exists already")):
        export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out").is_file() or list((tmp_path / "out").iterdir()) == []


def test_checkpoint_is_refused_when_its_weights_are_damaged(tmp_path: Path, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors: bytes"):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_weights_are_exported_when_the_optimizer_alone_is_damaged(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").unlink()
    export(checkpoint, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(MODEL)


def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path, checkpoint: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(CheckpointError) as caught:
            export(checkpoint, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_error_has_the_output_when_a_file_is_in_its_way(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'file' / 'out'}: ")):
        export(checkpoint, tmp_path / "file" / "out")


def test_parents_are_made_when_they_are_missing(tmp_path: Path, checkpoint: Path) -> None:
    export(checkpoint, tmp_path / "a" / "b" / "out")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]
