from __future__ import annotations

import io
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from harness.checkpoint.save.plan import make_plan
from harness.checkpoint.save.snapshot import PendingCopy, Snapshot, StagingMemory
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.trainer_state import Watched
from harness.distributed.collectives import Collectives


class Net(nn.Module):
    ema: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("ema", torch.zeros(6, 6))
        self.register_buffer("queue", torch.zeros(0))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(self.norm(self.fc(x)))
        return out


class Taken:
    """A model, an optimizer, and the snapshot of both."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, dtype: torch.dtype | None = None):
        held = find_watched(accelerator, Watched(model, optimizer, None), weights_only=False, dtype=dtype)
        self.plan = make_plan(held, Collectives(0, 1), None)
        self.staging = StagingMemory(self.plan.staging_bytes, pinned=False)
        self.snapshot = Snapshot(held, self.plan, self.staging, torch.device("cpu"))

    def content(self) -> dict[str, Tensor]:
        """What would be on disk: weights by name, optimizer state by kind and name."""
        loaded: dict[str, Tensor] = {}
        for index, file in enumerate(self.plan.layout.files):
            content = io.BytesIO(file.header.ljust(file.size_bytes, b"\0"))
            for part in self.plan.ranges:
                if part.file == index:
                    content.seek(part.offset)
                    content.write(self.staging.bytes[part.staging : part.staging + part.size].numpy().tobytes())
            loaded |= safetensors.torch.load(content.getvalue())
        return loaded

    def taken(self) -> dict[str, Tensor]:
        assert self.snapshot.look_up()
        copied(self.snapshot.begin())
        return self.content()


class Progress:
    """Records what a copy reports, as gate and as sink."""

    def __init__(self) -> None:
        self.marks: list[int] = []
        self.num_opened = 0

    def open(self, event: torch.cuda.Event | None = None) -> None:
        assert event is None
        self.num_opened += 1

    def report_ready(self, num_bytes: int) -> None:
        self.marks.append(num_bytes)


def copied(copy: PendingCopy) -> list[int]:
    """Copy, and return the marks that were reported."""
    progress = Progress()
    copy.run(progress, progress)
    assert progress.num_opened == 1
    return progress.marks


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint should hold."""
    expected = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                expected[f"{kind}.{name}"] = value.detach().clone()
            elif value is not None:
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                expected[f"{kind}.{name}"] = torch.tensor(value, dtype=dtype)
    return expected


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def optimizer(model: Net) -> torch.optim.Optimizer:
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, made)
    return made


@pytest.fixture
def taken(accelerator: Accelerator, model: Net, optimizer: torch.optim.Optimizer) -> Taken:
    return Taken(accelerator, model, optimizer)


def test_copy_is_the_state_when_taken_again_and_again(
    taken: Taken, model: Net, optimizer: torch.optim.Optimizer
) -> None:
    for _ in range(3):
        assert_same(taken.taken(), state_of(model, optimizer))
        step(model, optimizer)


def test_copy_is_of_the_moment_when_forward_and_backward_run_on(
    taken: Taken, model: Net, optimizer: torch.optim.Optimizer
) -> None:
    expected = state_of(model, optimizer)
    assert taken.snapshot.look_up()
    copy = taken.snapshot.begin()
    model(torch.randn(4, 6)).sum().backward()  # moves the norm's statistics
    with torch.no_grad():
        model.ema.lerp_(model.fc.weight, 0.5)
        model.frozen.weight.add_(1)
    copied(copy)
    assert not torch.equal(model.norm.running_mean, expected["norm.running_mean"])
    assert_same(taken.content(), expected)


def test_beginning_of_the_memory_is_told_to_be_ready_when_the_rest_is_not(accelerator: Accelerator) -> None:
    model = nn.Module()
    for number in range(700):
        model.register_parameter(f"p{number:03}", nn.Parameter(torch.randn(3, 5)))
    model.large = nn.Parameter(torch.randn(5 << 20))
    taken = Taken(accelerator, model, None)
    assert taken.snapshot.look_up()
    taken.staging.bytes.fill_(255)
    expected = taken.taken()
    whole = taken.staging.bytes.clone()
    taken.staging.bytes.fill_(255)

    class Checked(Progress):
        def report_ready(self, num_bytes: int) -> None:
            super().report_ready(num_bytes)
            assert torch.equal(taken.staging.bytes[:num_bytes], whole[:num_bytes])

    progress = Checked()
    taken.snapshot.begin().run(progress, progress)
    marks = progress.marks
    assert len(marks) > 2
    assert marks == sorted(marks)
    assert marks[-1] == taken.staging.size_bytes
    assert_same(taken.content(), expected)


def test_copy_is_of_the_moment_when_parameters_get_other_memory_before_it(
    taken: Taken, model: Net, optimizer: torch.optim.Optimizer
) -> None:
    expected = state_of(model, optimizer)
    assert taken.snapshot.look_up()
    copy = taken.snapshot.begin()
    model.fc.weight.data = torch.zeros(6, 6)
    model.to(torch.bfloat16)  # as for an export after the last save
    copied(copy)
    assert_same(taken.content(), expected)


def test_numbers_are_of_the_moment_when_the_state_has_plain_ones(accelerator: Accelerator, model: Net) -> None:
    optimizer = torch.optim.SGD([model.fc.weight], lr=0.1)
    optimizer.state[model.fc.weight] = {"count": 3, "scale": 0.1, "flag": True, "tensor": torch.tensor(5)}
    taken = Taken(accelerator, model, optimizer)
    assert taken.snapshot.look_up()
    copy = taken.snapshot.begin()
    optimizer.state[model.fc.weight]["count"] = 4
    copied(copy)
    found = taken.content()
    assert (found["count.fc.weight"].dtype, found["count.fc.weight"].item()) == (torch.int64, 3)
    assert (found["scale.fc.weight"].dtype, found["scale.fc.weight"].item()) == (torch.float64, 0.1)
    assert found["flag.fc.weight"].item() == 1
    assert found["tensor.fc.weight"].item() == 5


def test_copy_follows_when_tensors_have_moved(taken: Taken, model: Net, optimizer: torch.optim.Optimizer) -> None:
    taken.taken()
    model.fc.weight.data = torch.full_like(model.fc.weight, 3.0)
    model.norm.running_mean = torch.full((6,), 4.0)
    model.frozen.bias = nn.Parameter(torch.full((6,), 5.0), requires_grad=False)
    optimizer.state[model.fc.weight]["exp_avg"] = torch.full((6, 6), 6.0)
    found = taken.taken()
    assert_same(found, state_of(model, optimizer))
    assert found["exp_avg.fc.weight"].eq(6).all()


@pytest.mark.parametrize("format_", [torch.channels_last, torch.contiguous_format])
def test_elements_are_in_logical_order_when_they_do_not_lie_so(
    accelerator: Accelerator, format_: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 2).to(memory_format=format_)  # type: ignore[call-overload]
    model.register_buffer("turned", torch.randn(3, 5).t())
    model.register_buffer("spread", torch.randn(1).expand(7))
    model.register_buffer("phase", torch.randn(3, dtype=torch.complex64).conj())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(1, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    taken = Taken(accelerator, model, optimizer)
    for _ in range(2):
        assert_same(taken.taken(), {name: t.resolve_conj() for name, t in state_of(model, optimizer).items()})
        with torch.no_grad():
            model.weight.add_(1)


def test_copy_is_of_the_moment_when_elements_do_not_lie_in_order(accelerator: Accelerator) -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    taken = Taken(accelerator, model, None)
    expected = model.weight.detach().clone()
    assert taken.snapshot.look_up()
    copy = taken.snapshot.begin()
    copied(copy)
    assert torch.equal(taken.content()["weight"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_of_the_model_alone_are_cast_when_a_dtype_is_given(
    accelerator: Accelerator, model: Net, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> None:
    taken = Taken(accelerator, model, optimizer, dtype)
    names = set(model.state_dict())
    expected = {
        name: tensor.to(dtype) if name in names and tensor.is_floating_point() else tensor
        for name, tensor in state_of(model, optimizer).items()
    }
    assert_same(taken.taken(), expected)


# Each leaves another state than was planned, as training does now and then.
CHANGES: dict[str, Callable[[Net, torch.optim.Optimizer], object]] = {
    "a parameter is added": lambda model, _: model.register_parameter("new", nn.Parameter(torch.zeros(1))),
    "a buffer is added": lambda model, _: model.norm.register_buffer("new", torch.zeros(1)),
    "a buffer is taken away": lambda model, _: model.norm.__delattr__("running_var"),
    "a module is added": lambda model, _: model.add_module("new", nn.Linear(1, 1)),
    "a module is replaced": lambda model, _: setattr(model, "frozen", nn.Linear(6, 6).requires_grad_(False)),
    "a module is replaced by one of another size": lambda model, _: setattr(model, "frozen", nn.Linear(6, 9)),
    "a module of a module is replaced": lambda model, _: setattr(model.inner, "a", nn.Linear(1, 1)),
    "a buffer grows": lambda model, _: setattr(model, "ema", torch.zeros(7, 6)),
    "a buffer grows where it is": lambda model, _: model.ema.resize_(12, 6),
    "a buffer shrinks where it is": lambda model, _: model.ema.resize_(2, 6),
    "an empty buffer is filled": lambda model, _: setattr(model, "queue", torch.ones(3)),
    "a buffer that was None is filled": lambda model, _: setattr(model, "late", torch.ones(3)),
    "a buffer becomes None": lambda model, _: setattr(model, "ema", None),
    "a buffer has another name": lambda model, _: (model.register_buffer("other", model._buffers.pop("ema")),),
    "a parameter has another name": lambda model, _: model.fc.register_parameter(
        "other", model.fc._parameters.pop("bias")
    ),
    "state has another name": lambda model, optimizer: optimizer.state[model.fc.bias].update(
        other=optimizer.state[model.fc.bias].pop("exp_avg")
    ),
    "a buffer has another shape": lambda model, _: setattr(model, "ema", torch.zeros(36)),
    "a buffer has another type": lambda model, _: setattr(model, "ema", torch.zeros(6, 6, dtype=torch.float64)),
    "the model has another type": lambda model, _: model.double(),
    "a parameter is turned where it is": lambda model, _: setattr(model.wide, "data", model.wide.data.t()),
    "a parameter is turned and keeps its shape": lambda model, _: setattr(
        model.fc.weight, "data", model.fc.weight.data.t()
    ),
    "weights are tied": lambda model, _: setattr(model.frozen, "weight", model.fc.weight),
    "the optimizer's state is loaded": lambda _, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "the optimizer's state is dropped": lambda _, optimizer: optimizer.state.clear(),
    "a parameter has a state now": lambda model, optimizer: optimizer.state[model.frozen.weight].update(a=1),
    "a parameter's state is replaced": lambda model, optimizer: optimizer.state.update({model.fc.bias: {"step": 1}}),
    "a parameter has more state": lambda model, optimizer: optimizer.state[model.fc.bias].update(more=1.0),
    "state that was None is filled": lambda model, optimizer: optimizer.state[model.fc.bias].update(
        none=torch.zeros(6)
    ),
    "a whole number becomes a fraction": lambda model, optimizer: optimizer.state[model.fc.bias].update(number=0.5),
    "a number becomes a tensor": lambda model, optimizer: optimizer.state[model.fc.bias].update(number=torch.ones(3)),
    "a group is added": lambda model, optimizer: optimizer.add_param_group({"params": [model.frozen.weight]}),
    "a group has one more parameter": lambda model, optimizer: optimizer.param_groups[0]["params"].append(
        model.frozen.weight
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_noticed_when(accelerator: Accelerator, change: str) -> None:
    torch.manual_seed(0)
    model = Net()
    model.inner = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    model.wide = nn.Parameter(torch.randn(2, 18), requires_grad=False)
    optimizer = torch.optim.AdamW([p for p in model.fc.parameters()], lr=0.1)
    step(model, optimizer)
    optimizer.state[model.fc.bias].update(none=None, number=1)
    taken = Taken(accelerator, model, optimizer)
    assert taken.snapshot.look_up()
    copied(taken.snapshot.begin())
    CHANGES[change](model, optimizer)
    if taken.snapshot.look_up():
        # Not noticed: then what is taken must be right all the same.
        copied(taken.snapshot.begin())
        assert_same(taken.content(), state_of(model, optimizer))
        groups = sum(len(group["params"]) for group in optimizer.param_groups)
        assert groups == 2, "the optimizer's groups are others"


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_memory_is_zeros_of_at_least_the_size_when_made(size: int) -> None:
    staging = StagingMemory(size, pinned=False)
    assert staging.size_bytes == staging.bytes.numel() >= size
    assert staging.bytes.dtype == torch.uint8
    assert not staging.bytes.any()
    staging.close()


def test_memory_is_seen_by_others_when_they_map_its_descriptor() -> None:
    staging = StagingMemory(5000, pinned=False)
    with mmap.mmap(staging.descriptor, staging.size_bytes, prot=mmap.PROT_READ) as other:
        staging.bytes[4999] = 7
        assert other[4999] == 7
    staging.close()
    staging.bytes[0] = 1  # whoever has mapped it keeps it
