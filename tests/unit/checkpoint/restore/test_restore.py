from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from harness.checkpoint.restore.restore import Restored, restore_tensors
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.sharding.local_shards import OptimizedTensor
from harness.checkpoint.state.parts import find_watched_optimized
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.checkpoint.state.zero_step import zero_step
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError
from tests.checkpoint_hooks import NoHooks
from tests.unit.checkpoint.optimizers import AllMadeEarly, MadeEarly, Numbered, OfObjects, OfTrees, Projector


class Net(nn.Module):
    """Tied weights, statistics, a frozen layer, and weights that do not lie in order."""

    def __init__(self, words: int = 16, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 8)
        self.norm = nn.BatchNorm1d(8)
        self.mix = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = nn.Linear(8, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.frozen(self.mix(self.norm(self.embed(x))))
        out: Tensor = self.head(mixed) + self.conv(mixed.reshape(-1, 2, 2, 2)).sum()
        return out


MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "AdamW with a tensor for lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1), foreach=False),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.001),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.001, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, centered=True, momentum=0.5),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "ASGD": lambda parameters: torch.optim.ASGD(parameters, lr=0.001),
}


def made(kind: str = "AdamW", seed: int = 0, **shape: int) -> Watched:
    torch.manual_seed(seed)
    model = Net(**shape)
    return Watched(model, MAKE[kind]([p for p in model.parameters() if p.requires_grad]), None)


def train(watched: Watched, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = watched.model(torch.arange(16)).square().mean()
        loss.backward()
        watched.optimizer.step()  # type: ignore[union-attr]
        watched.optimizer.zero_grad()  # type: ignore[union-attr]
        losses.append(loss.item())
    return losses


def saved(watched: Watched, accelerator: Accelerator, directory: Path, *, step: int = 1, **config: Any) -> Path:
    saver = Saver(accelerator, Collectives(0, 1), CheckpointConfig(**config), directory, RunFacts(), NoHooks())
    saver.check(watched)
    saver.save(Moment("step-1", 0, step, 0, {}))
    saver.close()
    return directory / "step-1"


def restored(watched: Watched, accelerator: Accelerator, checkpoint: Path, *, weights_only: bool = False) -> Restored:
    return restore_tensors(accelerator, watched, checkpoint, Collectives(0, 1), weights_only=weights_only)


def state_of(watched: Watched) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in watched.model.named_parameters()}
    moments = {
        f"{kind}.{names[id(parameter)]}": value
        for parameter, values in watched.optimizer.state.items()  # type: ignore[union-attr]
        for kind, value in values.items()
    }
    return {**watched.model.state_dict(), **moments}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        if isinstance(value, Tensor):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("kind", MAKE)
def test_training_goes_on_bit_for_bit_when_restored(accelerator: Accelerator, tmp_path: Path, kind: str) -> None:
    first, second = made(kind), made(kind, seed=1)
    train(first, 3)
    checkpoint = saved(first, accelerator, tmp_path)
    found = restored(second, accelerator, checkpoint)
    assert_same(state_of(second), state_of(first))
    # Each byte once; the headers for their digests alone.
    assert found.read_bytes == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert found.wanted_bytes < found.read_bytes
    assert second.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert train(second, 4) == train(first, 4)
    assert_same(state_of(second), state_of(first))


@pytest.mark.parametrize(
    "optimizer", [OfTrees, OfObjects, Numbered, MadeEarly, AllMadeEarly, torch.optim.NAdam, torch.optim.SparseAdam]
)
def test_training_goes_on_bit_for_bit_when_the_state_is_not_made_by_a_step(
    accelerator: Accelerator, tmp_path: Path, optimizer: Any
) -> None:
    def make(seed: int) -> Watched:
        torch.manual_seed(seed)
        model = nn.EmbeddingBag(16, 4, sparse=optimizer is torch.optim.SparseAdam)
        return Watched(model, optimizer(model.parameters(), lr=0.01), None)

    def train_words(watched: Watched, step: int) -> None:
        assert watched.optimizer is not None
        watched.model(torch.tensor([[1, 2, step]])).square().sum().backward()
        watched.optimizer.step()
        watched.optimizer.zero_grad()

    first, second = make(0), make(1)
    for step in range(3):
        train_words(first, step)
    restored(second, accelerator, saved(first, accelerator, tmp_path))
    assert getattr(second.optimizer, "num_steps", 0) == 0
    for step in range(3, 6):
        assert_same_trees(*(list(each.optimizer.state.values()) for each in (second, first)))  # type: ignore[union-attr]
        train_words(first, step)
        train_words(second, step)
    assert torch.equal(second.model.weight, first.model.weight)  # type: ignore[arg-type]


def assert_same_trees(found: Any, expected: Any) -> None:
    if isinstance(expected, Projector):
        found, expected = found.state_dict(), expected.state_dict()
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert found.stride() == expected.stride()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same_trees(list(found.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple, deque)):
        assert len(found) == len(expected) and getattr(found, "maxlen", 0) == getattr(expected, "maxlen", 0)
        for one, other in zip(found, expected, strict=True):
            assert_same_trees(one, other)
    else:
        assert found == expected


class WithPlainSteps(torch.optim.Optimizer):
    """Adam's state with a plain number for the step, as DeepSpeed's has it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter] or {
                    "step": 0,
                    **{kind: parameter * 0 for kind in ("exp_avg", "exp_avg_sq")},
                }
                self.state[parameter] = {**state, "step": state["step"] + 1}


def test_steps_are_as_the_optimizer_has_them_when_it_is_of_another_class(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    first, second = alternating("AdamW", 3), alternating("SGD", 0)
    second = Watched(second.model, WithPlainSteps(second.model.parameters()), None)
    restored(second, accelerator, saved(first, accelerator, tmp_path))
    found = second.optimizer.state[second.model.used.weight]  # type: ignore[union-attr, index]
    assert type(found["step"]) is int and found["step"] == 3
    expected = first.optimizer.state[first.model.used.weight]  # type: ignore[union-attr, index]
    assert torch.equal(found["exp_avg"], expected["exp_avg"])


class Counting(torch.optim.SGD):
    """Counts its steps: in itself, for all parameters, and in its group."""

    num_steps = 0

    def __init__(self, parameters: Any, **values: Any) -> None:
        super().__init__(parameters, **values)
        self.total = torch.zeros(2)
        self.history = {"n": [0], "total": self.total}
        self.param_groups[0]["k_in_place"] = self.total
        self.param_groups[0]["rates"] = [0.5]
        self.calls = Counter(step=2)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.num_steps += 1
        self.total += 1
        assert self.calls["step"] == 2
        self.calls["step"] += 1
        self.history["n"][0] += 1  # type: ignore[index]
        assert self.history["total"] is self.param_groups[0]["k_in_place"] is self.total
        self.param_groups[0]["rates"].append(0.1)
        shared: Any = self.state["shared"]
        shared["num_steps"] = shared.get("num_steps", 0) + 1
        self.param_groups[0]["k"] = self.num_steps
        return super().step(closure)


def test_no_trace_is_left_when_an_optimizer_steps_for_its_state(accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    watched = Watched(model := Net(), Counting(model.parameters(), lr=0.001, momentum=0.9, weight_decay=0.1), None)
    assert isinstance(watched.optimizer, Counting)
    watched.optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook was called"))
    before = {name: value.clone() for name, value in watched.model.state_dict().items()}
    group = dict(watched.optimizer.param_groups[0])
    total = watched.optimizer.total
    ((_, stepped),) = find_watched_optimized(watched)
    found = zero_step(watched.optimizer, stepped[:2])
    assert [state["momentum_buffer"].shape for state in found] == [each.tensor.shape for each in stepped[:2]]
    assert_same(dict(watched.model.state_dict()), before)
    assert all(parameter.grad is None for parameter in watched.model.parameters())
    assert watched.optimizer.param_groups[0] == group
    assert not watched.optimizer.state and watched.optimizer.num_steps == 0
    assert watched.optimizer.total is total is watched.optimizer.param_groups[0]["k_in_place"]
    assert torch.equal(total, torch.zeros(2)) and watched.optimizer.history == {"n": [0], "total": total}
    assert watched.optimizer.param_groups[0]["rates"] == [0.5] and watched.optimizer.calls == {"step": 2}


def test_state_is_as_before_when_a_step_needs_the_one_that_init_has_made() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = MadeEarly([parameter])
    made_early = optimizer.state[parameter]
    (found,) = zero_step(optimizer, [OptimizedTensor(optimizer.param_groups[0], parameter, ["weight"])])
    assert found.keys() == {"moment", "projector"}
    assert optimizer.state[parameter] is made_early and made_early.keys() == {"moment"}


def test_error_names_the_optimizer_when_it_needs_a_closure() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.LBFGS([parameter])
    with pytest.raises(CheckpointError, match="LBFGS: cannot make its state before training"):
        zero_step(optimizer, [OptimizedTensor(optimizer.param_groups[0], parameter, ["weight"])])
    assert not optimizer.state


def test_weights_are_cast_when_the_model_has_another_type(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = made(), made(seed=1)
    train(first, 2)
    checkpoint = saved(first, accelerator, tmp_path, dtype="bfloat16", save_weights_only=True)
    restored(second, accelerator, checkpoint, weights_only=True)
    for name, value in first.model.state_dict().items():
        expected = value.bfloat16().to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(second.model.state_dict()[name], expected), name


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"words": 17}, r"embed.weight: has shape \[16, 8\] in the checkpoint and \[17, 8\] in the model"),
        ({"layers": 2}, "step-1: has no mix.1.weight, mix.1.bias; resume with the model"),
    ],
)
def test_error_has_the_tensor_when_the_model_is_another(
    accelerator: Accelerator, tmp_path: Path, shape: dict[str, int], said: str
) -> None:
    first = made()
    train(first, 1)
    checkpoint = saved(first, accelerator, tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        restored(made(**shape), accelerator, checkpoint)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "cut off", "header", "missing"])
def test_error_has_the_file_when_it_is_damaged(
    accelerator: Accelerator, tmp_path: Path, file: str, damage: str
) -> None:
    first = made()
    train(first, 1)
    path = saved(first, accelerator, tmp_path) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(content[:-1])
    else:
        # In the header: a space becomes a tab, which JSON takes for the same.
        place = content.index(b" ") if damage == "header" and b" " in content[8:4000] else len(content) - 1
        content[place] = 9 if damage == "header" and place < 4000 else content[place] ^ 1
        path.write_bytes(content)
    with pytest.raises(DamagedError, match=file):
        restored(made(), accelerator, path.parent)


class Alternating(nn.Module):
    """With a layer that is used now and then, and one that is never."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.late = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, late: bool) -> Tensor:
        out: Tensor = self.used(x)
        return self.late(out) if late else out


def alternating(kind: str, steps: int, seed: int = 0) -> Watched:
    torch.manual_seed(seed)
    model = Alternating()
    watched = Watched(model, MAKE[kind](list(model.parameters())), None)
    for step in range(steps):
        step_of(watched, late=step == 1)
    return watched


def step_of(watched: Watched, *, late: bool) -> None:
    watched.model(torch.ones(2, 4), late=late).square().mean().backward()
    watched.optimizer.step()  # type: ignore[union-attr]
    watched.optimizer.zero_grad()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_parameters_have_no_state_when_the_checkpoint_has_none_of_them(
    accelerator: Accelerator, tmp_path: Path, kind: str, steps: int
) -> None:
    first, second = alternating(kind, steps), alternating(kind, 0, seed=1)
    restored(second, accelerator, saved(first, accelerator, tmp_path, step=steps))
    assert_same(state_of(second), state_of(first))
    for late in (False, True):
        step_of(first, late=late)
        step_of(second, late=late)
    assert_same(state_of(second), state_of(first))


def test_state_is_kept_when_a_parameter_is_frozen_that_the_optimizer_has(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    first, second = alternating("AdamW", 3), alternating("AdamW", 0, seed=1)
    second.model.used.requires_grad_(False)  # type: ignore[union-attr]
    found = restored(second, accelerator, saved(first, accelerator, tmp_path))
    assert_same(state_of(second), state_of(first))
    assert not any("not trained" in note for note in found.notes)


def test_state_is_left_out_when_the_optimizer_has_a_parameter_no_more(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = alternating("AdamW", 3), alternating("AdamW", 0, seed=1)
    second = Watched(second.model, MAKE["AdamW"](list(second.model.late.parameters())), None)  # type: ignore[union-attr]
    found = restored(second, accelerator, saved(first, accelerator, tmp_path))
    left_out = "the state of 2 parameters that are not trained now was left out: used.bias, used.weight"
    assert found.notes == (left_out,)
    expected = state_of(first)
    assert_same(state_of(second), {name: expected[name] for name in expected if ".used." not in name})


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("AdamW", "SGD", "has exp_avg, exp_avg_sq, step of used.bias, and SGD keeps nothing .*adamw.AdamW was saved"),
        ("AdamW", "SGD with momentum", "has exp_avg, exp_avg_sq, step of used.bias, and SGD keeps momentum_buffer"),
        ("SGD", "AdamW", "has no state of the optimizer after step 1, though AdamW keeps one"),
        ("SGD", "Adagrad", "has no state of the optimizer after step 1, though Adagrad keeps one"),
    ],
)
def test_error_has_the_state_when_the_optimizer_is_another(
    accelerator: Accelerator, tmp_path: Path, before: str, after: str, said: str
) -> None:
    checkpoint = saved(alternating(before, 3), accelerator, tmp_path)
    second = alternating(after, 0)
    had = len(second.optimizer.state)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=said):
        restored(second, accelerator, checkpoint)
    assert len(second.optimizer.state) == had  # type: ignore[union-attr]


@pytest.mark.parametrize("weights_only", [True, False])
def test_error_has_the_names_when_the_checkpoint_has_more_than_the_model(
    accelerator: Accelerator, tmp_path: Path, weights_only: bool
) -> None:
    first = made(layers=2)
    train(first, 1)
    checkpoint = saved(first, accelerator, tmp_path)
    with pytest.raises(CheckpointError, match=r"step-1: has mix\.1\.bias, mix\.1\.weight, which is not there now"):
        restored(made(), accelerator, checkpoint, weights_only=weights_only)


def test_error_says_so_when_a_checkpoint_of_weights_alone_is_resumed(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = made(), made(seed=1)
    train(first, 1)
    checkpoint = saved(first, accelerator, tmp_path, save_weights_only=True)
    with pytest.raises(CheckpointError, match="it holds the weights only"):
        restored(second, accelerator, checkpoint)
    assert restored(Watched(second.model, None, None), accelerator, checkpoint).notes == ()
    assert_same(dict(second.model.state_dict()), dict(first.model.state_dict()))


def test_another_checkpoint_can_be_restored_when_one_was_damaged(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = alternating("AdamW", 3), alternating("AdamW", 0, seed=1)
    damaged, good = (tmp_path / name for name in ("damaged", "good"))
    path = saved(first, accelerator, damaged) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    older = alternating("AdamW", 1)
    checkpoint = saved(older, accelerator, good)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        restored(second, accelerator, path.parent)
    restored(second, accelerator, checkpoint)
    assert_same(state_of(second), state_of(older))


def test_tied_weights_are_found_when_another_of_their_names_comes_first(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    def tied(first: str, second: str) -> Watched:
        model = nn.Module()
        setattr(model, first, nn.Parameter(torch.rand(3)))
        setattr(model, second, getattr(model, first))
        optimizer = MAKE["AdamW"](list(model.parameters()))
        next(model.parameters()).sum().backward()
        return Watched(model, optimizer, None)

    one, other = tied("a", "b"), tied("b", "a")
    one.optimizer.step()  # type: ignore[union-attr]
    restored(other, accelerator, saved(one, accelerator, tmp_path))
    assert torch.equal(other.model.a, one.model.a)  # type: ignore[arg-type]
    states = [next(iter(each.optimizer.state.values())) for each in (one, other)]  # type: ignore[union-attr]
    assert_same(states[1], states[0])


def test_notes_say_so_when_values_are_rounded(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = alternating("AdamW", 3), alternating("AdamW", 0)
    second.model.bfloat16()
    found = restored(second, accelerator, saved(first, accelerator, tmp_path / "wide"))
    assert "14 tensors were rounded: used.weight from F32 to BF16" in found.notes
    again = alternating("AdamW", 0)
    found = restored(again, accelerator, saved(second, accelerator, tmp_path / "narrow"))
    assert any(
        "6 weights had been rounded when they were saved: used.weight from BF16 to F32" in n for n in found.notes
    )
