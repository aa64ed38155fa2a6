"""Several models in one checkpoint: what they share, and which optimizer trains what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.checkpoint.restore.restore import Restored, restore_tensors
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.sharding.local_shards import LocalShards
from harness.checkpoint.state.parts import MergedShards
from harness.checkpoint.state.trainer_state import Moment, Several, Watched
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError
from tests.checkpoint_hooks import NoHooks


def several(**models: tuple[nn.Module, torch.optim.Optimizer | None]) -> Several:
    parts = tuple(Watched(model, optimizer, None, name) for name, (model, optimizer) in models.items())
    return Several(parts, next((part for part in parts if part.optimizer is not None), None))


def optimizer_of(*models: nn.Module, seed: int | None = None) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for model in models for parameter in model.parameters()], lr=0.1)


def train(watched: Several, steps: int = 1) -> None:
    """Step every optimizer, each with gradients of all models."""
    for _ in range(steps):
        for part in watched.parts:
            sum((p.sin().sum() for each in watched.parts for p in each.model.parameters()), torch.zeros(())).backward()
            if part.optimizer is not None:
                part.optimizer.step()
            for each in watched.parts:
                each.model.zero_grad()


def saver_of(watched: Several, accelerator: Accelerator, directory: Path, **config: Any) -> Saver:
    directory.mkdir(exist_ok=True)
    saver = Saver(accelerator, Collectives(0, 1), CheckpointConfig(**config), directory, RunFacts(), NoHooks())
    try:
        saver.check(watched)
    except CheckpointError:
        saver.close()
        raise
    return saver


def saved(watched: Several, accelerator: Accelerator, directory: Path) -> Path:
    saver = saver_of(watched, accelerator, directory)
    saver.save(Moment("epoch-0001", 1, 1, 0, {}), must=True)
    saver.close()
    return directory / "epoch-0001"


def restored(watched: Several, accelerator: Accelerator, checkpoint: Path) -> Restored:
    return restore_tensors(accelerator, watched, checkpoint, Collectives(0, 1))


def assert_alike(found: Several, expected: Several) -> None:
    for one, other in zip(found.parts, expected.parts, strict=True):
        for name, value in other.model.state_dict().items():
            assert torch.equal(one.model.state_dict()[name], value), name
        if other.optimizer is not None:
            assert one.optimizer is not None
            mine, others = one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
            assert mine.keys() == others.keys()
            for number, values in others.items():
                assert all(torch.equal(mine[number][kind], value) for kind, value in values.items())


def tied(seed: int) -> Several:
    """Two models with one embedding, which the second one's optimizer trains."""
    torch.manual_seed(seed)
    first, second = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), nn.Sequential(nn.Embedding(5, 3))
    second[0].weight = first[0].weight
    return several(a=(first, optimizer_of(first[1])), b=(second, optimizer_of(second)))


def encoder_and_decoder(seed: int) -> Several:
    """One optimizer for both, given with the second."""
    torch.manual_seed(seed)
    encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)
    return several(encoder=(encoder, None), decoder=(decoder, optimizer_of(encoder, decoder)))


def two_optimizers(seed: int) -> Several:
    """Two optimizers of one model."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    return several(body=(model, optimizer_of(model[0])), head=(model, optimizer_of(model[1])))


@pytest.mark.parametrize("make", [tied, encoder_and_decoder, two_optimizers])
def test_state_is_the_same_when_models_and_optimizers_overlap(
    accelerator: Accelerator, tmp_path: Path, make: Any
) -> None:
    first, second = make(0), make(1)
    train(first, 2)
    checkpoint = saved(first, accelerator, tmp_path)
    assert restored(second, accelerator, checkpoint).notes == ()
    assert_alike(second, first)
    train(first)
    train(second)
    assert_alike(second, first)


def test_tensor_is_stored_once_when_two_models_share_it(accelerator: Accelerator, tmp_path: Path) -> None:
    watched = tied(0)
    train(watched)
    checkpoint = saved(watched, accelerator, tmp_path)
    assert set(load_file(checkpoint / "model.safetensors")) == {"a.0.weight", "a.1.weight", "a.1.bias"}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as reader:
        assert reader.metadata()["b.0.weight"] == "a.0.weight"
    assert "exp_avg.a.0.weight" in load_file(checkpoint / "optimizer.safetensors")


def test_values_are_of_the_save_when_an_average_moves(accelerator: Accelerator, tmp_path: Path) -> None:
    # Large enough that the copy is not over when the average is moved.
    model, average = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
    watched = several(model=(model, optimizer_of(model)), average=(average, None))
    train(watched)
    saver = saver_of(watched, accelerator, tmp_path)
    saver.prepare()
    train(watched)
    # A step was seen, and the first save of its kind: from now on saves overlap.
    saver.save(Moment("epoch-0000", 0, 0, 0, {}))
    train(watched)
    saver.wait()
    expected = average.weight.detach().clone()
    saver.save(Moment("epoch-0001", 1, 1, 0, {}))
    with torch.no_grad():
        average.weight.lerp_(model.weight, 0.5)
    saver.close()
    assert saver.last_seconds["overlapped"] == 1.0
    found: Tensor = load_file(tmp_path / "epoch-0001" / "model.safetensors")["average.weight"]
    assert torch.equal(found, expected)


def test_save_overlaps_only_when_every_optimizer_has_stepped(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 3)
    watched = several(a=(first, optimizer_of(first)), b=(second, optimizer_of(second)))
    train(watched)
    saver = saver_of(watched, accelerator, tmp_path, when_busy="wait")
    saver.prepare()
    train(watched)
    # The first of its kind never overlaps.
    saver.save(Moment("step-00000100", 1, 100, 0, {}))
    train(watched)
    saver.wait()
    saver.prepare()
    overlapped = []
    for step, part in enumerate(watched.parts):
        assert part.optimizer is not None
        part.optimizer.step()
        saver.save(Moment(f"step-{step:08d}", 1, step, 0, {}))
        saver.wait()
        overlapped.append(saver.last_seconds["overlapped"])
    saver.close()
    assert overlapped == [0.0, 1.0]


def test_error_names_the_parameter_when_two_optimizers_train_it(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 3)
    watched = several(a=(first, optimizer_of(first)), b=(second, optimizer_of(second, first)))
    with pytest.raises(CheckpointError, match=r"a\.weight is trained by the optimizers of 'a' and 'b'"):
        saver_of(watched, accelerator, tmp_path)
    saver_of(watched, accelerator, tmp_path, save_weights_only=True).close()


class LateForms(LocalShards):
    """Shards that learn a form from other ranks."""

    def complete(self, collectives: Collectives) -> None:
        self.forms.update(b={"dict": [["step", "float"]]})


def test_forms_are_merged_when_a_part_learns_those_of_others() -> None:
    merged = MergedShards.of([LocalShards(forms={"a": {"dict": [["step", "int"]]}}), LateForms()])
    merged.complete(Collectives(0, 1))
    assert merged.forms == {"a": {"dict": [["step", "int"]]}, "b": {"dict": [["step", "float"]]}}
