from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from harness.checkpoint.gather import GatheredState, gather_state
from harness.checkpoint.write import write_state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.norm(self.embed(x))))
        return out


@pytest.fixture
def model() -> Net:
    torch.manual_seed(1)
    net = Net()
    net(torch.arange(16))
    return net


@pytest.fixture
def state(accelerator: Accelerator, model: Net) -> GatheredState:
    return gather_state(accelerator, model, None, dtype=None)


def test_file_loads_equal_to_the_state_dict_when_written(tmp_path: Path, model: Net, state: GatheredState) -> None:
    records = write_state(tmp_path, state, None, None)
    assert [r.name for r in records] == ["model.safetensors"] == [p.name for p in tmp_path.iterdir()]
    loaded = load_file(tmp_path / "model.safetensors")
    expected = model.state_dict()
    assert {*loaded, "head.weight"} == set(expected)
    for name, tensor in loaded.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor, expected[name])
    assert loaded["norm.num_batches_tracked"].item() == 1


def test_tied_weights_are_tied_again_when_loaded_into_a_model(tmp_path: Path, model: Net, state: GatheredState) -> None:
    write_state(tmp_path, state, None, None)
    other = Net()
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    assert other.head.weight is other.embed.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}


def test_optimizer_file_has_kinds_and_names_when_there_are_moments(
    tmp_path: Path, accelerator: Accelerator, model: Net
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(16)).sum().backward()
    optimizer.step()
    state = gather_state(accelerator, model, optimizer, dtype=None)
    records = write_state(tmp_path, state, {"epoch": 1}, None)
    assert [r.name for r in records] == ["model.safetensors", "optimizer.safetensors", "trainer_state.json"]
    loaded = load_file(tmp_path / "optimizer.safetensors")
    names = [name for name, _ in model.named_parameters()]
    assert set(loaded) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert torch.equal(loaded["exp_avg.mix.bias"], optimizer.state[model.mix.bias]["exp_avg"])
    assert json.loads((tmp_path / "trainer_state.json").read_text()) == {"epoch": 1}


def test_files_and_index_are_right_when_the_weights_are_split(tmp_path: Path, state: GatheredState) -> None:
    limit = 600
    records = write_state(tmp_path, state, None, limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state.model)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.model.values())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    assert {r.name for r in records} == {*shards, "model.safetensors.index.json"}
    seen: dict[str, Tensor] = {}
    for shard in shards:
        loaded = load_file(tmp_path / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(loaded)
        assert sum(t.nbytes for t in loaded.values()) <= limit or len(loaded) == 1
        seen |= loaded
    assert all(torch.equal(seen[name], tensor) for name, tensor in state.model.items())


@pytest.mark.parametrize("limit", [None, 600])
def test_digests_are_those_of_the_files_when_read_again(
    tmp_path: Path, state: GatheredState, limit: int | None
) -> None:
    state.optimizer["exp_avg.x"] = torch.ones(2_000_000)  # more than one chunk of the reader
    for record in write_state(tmp_path, state, {"a": [1]}, limit):
        content = (tmp_path / record.name).read_bytes()
        assert record.size_bytes == len(content)
        assert record.ranges == ((0, len(content), xxhash.xxh3_128_hexdigest(content)),)


def test_digest_differs_when_one_byte_of_the_file_changes(tmp_path: Path, state: GatheredState) -> None:
    (record,) = write_state(tmp_path, state, None, None)
    content = bytearray((tmp_path / record.name).read_bytes())
    content[len(content) // 2] ^= 1
    assert xxhash.xxh3_128_hexdigest(content) != record.ranges[0][2]


def test_empty_and_scalar_tensors_are_kept_when_written(tmp_path: Path) -> None:
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(7), "flag": torch.tensor([True, False])}
    write_state(tmp_path, GatheredState(model=dict(tensors)), None, None)
    loaded = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("with_tensors", [True, False])
def test_error_has_the_path_when_the_directory_is_missing(
    tmp_path: Path, state: GatheredState, with_tensors: bool
) -> None:
    # The second: tensors can be written, and what comes after them cannot.
    directory = tmp_path / "missing"
    if not with_tensors:
        directory.mkdir()
        (directory / "trainer_state.json").mkdir()
    with pytest.raises((OSError, SafetensorError), match="missing"):
        write_state(directory, state, {}, None)
