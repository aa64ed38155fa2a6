"""User code that writes weights outside optimizer steps while a save is in flight."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from harness.checkpoint.format.commit import read_manifest
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from tests.checkpoint_hooks import NoHooks

Write = Callable[[nn.Module, torch.optim.Optimizer], object]


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}


def write_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].mul_(3)


def swap_averages_in(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As torch_ema and diffusers do it."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.detach() * 0.5)


def renormalise(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As a layer with forced weight normalisation does in its forward."""
    with torch.no_grad():
        weight = model.get_parameter("1.weight")
        weight.copy_(nn.functional.normalize(weight, dim=1))


WRITES: dict[str, Write] = {
    "load_state_dict": lambda model, _: model.load_state_dict(zeros_of(model)),
    "averages swapped in by data": swap_averages_in,
    "one layer in forward": renormalise,
    "optimizer state": write_moments,
    "pruned by NumPy": lambda model, _: [p.detach().numpy().fill(0) for p in model.parameters()],
}


class Training:
    """A model, its optimizer, and a saver of both, which is prepared."""

    def __init__(self, accelerator: Accelerator, checkpoints: Path, num_layers: int = 3, **values: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(num_layers)])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.checkpoints = checkpoints
        config = CheckpointConfig(when_busy="wait", **values)
        self.saver = Saver(accelerator, Collectives(0, 1), config, checkpoints, RunFacts(), NoHooks())
        self.saver.check(Watched(self.model, self.optimizer, None))
        self.train()
        self.saver.prepare()
        self.train()

    def train(self) -> None:
        self.model(torch.ones(4, 64)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        found = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            found |= {f"{kind}.{name}": value.clone() for kind, value in self.optimizer.state[parameter].items()}
        return found

    def save(self, name: str, *, must: bool = False) -> None:
        kind, _, number = name.partition("-")
        self.saver.save(Moment(name, int(number) if kind == "epoch" else 0, int(number), 1, {}), must=must)

    def save_and_wait(self, name: str) -> None:
        self.save(name)
        self.train()
        self.saver.wait()

    def save_while_held(self, name: str, write: Callable[[], Any]) -> None:
        """Save, with all that the copying thread does behind what is written."""
        held = threading.Event()
        self.saver._runner.submit(lambda: assert_set(held))
        self.save(name)
        write()
        held.set()
        self.saver.wait()

    def is_right(self, name: str, expected: dict[str, torch.Tensor]) -> bool:
        path = self.checkpoints / name
        found = load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")
        return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)

    def is_overlapped(self, name: str) -> bool:
        return bool(read_manifest(self.checkpoints / name).save["overlapped"])


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)


@pytest.fixture
def make(accelerator: Accelerator, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make_training(**values: Any) -> Training:
        checkpoints = tmp_path / "checkpoints"
        checkpoints.mkdir()
        made.append(Training(accelerator, checkpoints, **values))
        return made[-1]

    yield make_training
    for each in made:
        each.saver.abandon(30)


@pytest.fixture
def training(make: Callable[..., Training]) -> Training:
    return make()


@pytest.mark.parametrize("kind", WRITES)
def test_save_is_not_committed_when_it_is_torn(training: Training, kind: str) -> None:
    training.save_and_wait("step-00000001")
    training.save_while_held("step-00000002", lambda: WRITES[kind](training.model, training.optimizer))
    assert [path.name for path in training.checkpoints.iterdir()] == ["step-00000001"]
    assert training.saver.num_failed == 1
    expected = r"(exp_avg\.)?[012]\.weight was written outside an optimizer step while it was copied"
    with pytest.raises(Exception, match=expected):
        raise training.saver.last_error or AssertionError("the save has not failed")
    training.train()
    _, failure = training.saver.pop_report()
    assert failure is not None and failure.startswith("step-00000002 FAILED: ")
    # Whatever is written from here on, nothing else is lost.
    for step in (3, 4):
        state = training.state()
        training.save_while_held(f"step-{step:08d}", lambda: WRITES[kind](training.model, training.optimizer))
        training.train()
        assert training.is_right(f"step-{step:08d}", state)
        assert not training.is_overlapped(f"step-{step:08d}")


@pytest.mark.parametrize("name", ["epoch-0001", "step-00000001"])
@pytest.mark.parametrize("kind", WRITES)
def test_no_checkpoint_is_lost_when_weights_are_written_from_the_first_on(
    training: Training, kind: str, name: str
) -> None:
    prefix, _, number = name.partition("-")
    for step in range(1, 4):
        state, current = training.state(), f"{prefix}-{step:0{len(number)}d}"
        training.save_while_held(current, lambda: WRITES[kind](training.model, training.optimizer))
        training.train()
        assert training.is_right(current, state)
    assert training.saver.num_failed == 0
    _, note = training.saver.pop_report()
    assert note is not None and "weight changes outside optimizer steps" in note


def test_save_overlaps_when_the_first_of_its_kind_saw_no_write(training: Training) -> None:
    for name in ("step-00000001", "step-00000002", "epoch-0001", "step-00000003", "epoch-0002"):
        state = training.state()
        training.save_and_wait(name)
        assert training.is_right(name, state)
    overlapped = {path.name: training.is_overlapped(path.name) for path in training.checkpoints.iterdir()}
    assert overlapped == {
        "step-00000001": False,
        "step-00000002": True,
        "step-00000003": True,
        "epoch-0001": False,
        "epoch-0002": True,
    }
    assert training.saver.pop_report()[1] is None


def test_averages_that_were_swapped_out_again_are_found_when_copied(training: Training) -> None:
    training.save_and_wait("step-00000001")
    weights = [parameter.detach().clone() for parameter in training.model.parameters()]

    def evaluate() -> None:
        swap_averages_in(training.model, training.optimizer)
        held.set()
        assert copied.wait(30)
        for parameter, weight in zip(training.model.parameters(), weights, strict=True):
            parameter.data.copy_(weight)

    held, copied = threading.Event(), threading.Event()
    training.saver._runner.submit(lambda: assert_set(held))
    training.save("step-00000002")
    training.saver._runner.submit(copied.set)
    evaluate()
    training.saver.wait()
    assert not (training.checkpoints / "step-00000002").exists()
    assert training.saver.num_failed == 1


@pytest.mark.parametrize("kind", ["data is another tensor", "set_"])
def test_save_is_right_when_a_weight_gets_other_memory(training: Training, kind: str) -> None:
    training.save_and_wait("step-00000001")
    state = training.state()
    weight = training.model.get_parameter("1.weight")

    def replace() -> None:
        if kind == "set_":
            with torch.no_grad():
                weight.set_(torch.zeros(64, 64))  # type: ignore[call-overload]
        else:
            weight.data = torch.zeros(64, 64)

    training.save_while_held("step-00000002", replace)
    if kind == "set_":
        # Counted as a write, though the copy is of the memory that it was: refused, which is safe.
        assert not (training.checkpoints / "step-00000002").exists()
    else:
        assert training.is_right("step-00000002", state)
        assert training.is_overlapped("step-00000002")


@pytest.mark.parametrize("kind", WRITES)
def test_save_is_right_when_its_copy_is_finished_before_the_write(training: Training, kind: str) -> None:
    for name in ("epoch-0001", "epoch-0002"):
        state = training.state()
        training.save(name)
        training.saver.finish_copy()
        WRITES[kind](training.model, training.optimizer)
        training.train()
        training.saver.wait()
        assert training.is_right(name, state)
    assert training.is_overlapped("epoch-0002")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["averages swapped in by data", "load_state_dict"])
def test_save_is_not_committed_when_a_torn_weight_is_cast(make: Callable[..., Training], kind: str, dtype: str) -> None:
    training = make(dtype=dtype)
    training.save_and_wait("step-00000001")
    training.save_and_wait("step-00000002")
    assert training.is_overlapped("step-00000002")
    training.save_while_held("step-00000003", lambda: WRITES[kind](training.model, training.optimizer))
    assert not (training.checkpoints / "step-00000003").exists()


def test_save_is_not_committed_when_one_of_many_moments_is_written(make: Callable[..., Training]) -> None:
    training = make(num_layers=70)
    training.save_and_wait("step-00000001")
    moment = training.optimizer.state[training.model.get_parameter("33.weight")]["exp_avg"]
    training.save_while_held("step-00000002", lambda: moment[5].add_(1))
    assert not (training.checkpoints / "step-00000002").exists()
    assert "exp_avg.33.weight was written" in str(training.saver.last_error)


def test_save_is_committed_when_weights_are_written_after_its_copy(training: Training) -> None:
    training.save_and_wait("step-00000001")
    state = training.state()
    writer = training.saver._pipeline.writer  # type: ignore[union-attr]
    assert writer._process is not None
    # The disk takes its time: all is copied, and nothing is on it.
    os.kill(writer._process.pid, signal.SIGSTOP)
    try:
        training.save("step-00000002")
        training.saver.finish_copy()
        WRITES["load_state_dict"](training.model, training.optimizer)
    finally:
        os.kill(writer._process.pid, signal.SIGCONT)
    training.saver.wait()
    assert training.is_right("step-00000002", state)


def test_training_continues_when_a_save_is_torn_and_failures_stop_it(make: Callable[..., Training]) -> None:
    training = make(when_failed="stop")
    training.save_and_wait("step-00000001")
    training.save_while_held("step-00000002", lambda: WRITES["load_state_dict"](training.model, training.optimizer))
    training.train()
    state = training.state()
    training.save_and_wait("step-00000003")
    assert training.is_right("step-00000003", state)


def test_kind_is_not_taken_for_safe_when_its_guard_was_dropped(training: Training) -> None:
    training.save("step-00000001")
    training.saver.prepare()
    WRITES["averages swapped in by data"](training.model, training.optimizer)
    training.train()
    training.saver.wait()
    state = training.state()
    training.save_while_held("step-00000002", lambda: swap_averages_in(training.model, training.optimizer))
    assert training.is_right("step-00000002", state)


def test_staging_memory_is_freed_when_the_saver_is_closed(training: Training) -> None:
    for step in (1, 2):
        training.save_and_wait(f"step-{step:08d}")
        training.saver.prepare()
    training.save("step-00000003")
    memory = weakref.ref(training.saver._pipeline.staging.bytes)  # type: ignore[union-attr]
    training.saver.close()
    gc.collect()
    assert memory() is None
