from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from harness.checkpoint.save.fence import Fence, ModeChoice
from harness.checkpoint.save.source_guard import SourceGuard


@pytest.fixture
def fence() -> Iterator[Fence]:
    made = Fence()
    yield made
    made.remove()


def one_parameter() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def stepping(optimizer: torch.optim.Optimizer) -> threading.Thread:
    thread = threading.Thread(target=optimizer.step, daemon=True)
    thread.start()
    return thread


def test_step_waits_when_the_fence_is_up(fence: Fence) -> None:
    parameter, optimizer = one_parameter()
    fence.close(SourceGuard([]))
    thread = stepping(optimizer)
    thread.join(0.2)
    assert thread.is_alive()
    assert parameter.eq(0).all()
    assert not fence.is_passed
    fence.open()
    thread.join(30)
    assert not thread.is_alive()
    assert parameter.eq(-1).all()
    assert fence.is_passed
    assert fence.waited_s > 0.1


def test_every_optimizer_waits_when_there_are_several(fence: Fence) -> None:
    optimizers = [one_parameter()[1] for _ in range(3)]
    fence.close(SourceGuard([]))
    threads = [stepping(optimizer) for optimizer in optimizers]
    threads[0].join(0.2)
    assert all(thread.is_alive() for thread in threads)
    fence.open()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert fence.num_steps == 3


def test_steps_are_free_when_the_fence_is_down(fence: Fence) -> None:
    parameter, optimizer = one_parameter()
    optimizer.step()
    fence.close(SourceGuard([]))
    fence.open()
    assert not fence.is_passed
    optimizer.step()
    optimizer.step()
    assert fence.is_passed
    assert parameter.eq(-3).all()
    assert fence.num_steps == 3
    assert fence.waited_s < 5


def test_fence_stands_again_when_raised_again(fence: Fence) -> None:
    parameter, optimizer = one_parameter()
    for number in range(1, 4):
        fence.close(SourceGuard([]))
        thread = stepping(optimizer)
        thread.join(0.05)
        assert thread.is_alive()
        fence.open()
        thread.join(30)
        assert parameter.eq(-number).all()


def test_step_goes_on_when_the_fence_is_closed() -> None:
    fence = Fence()
    parameter, optimizer = one_parameter()
    fence.close(SourceGuard([]))
    thread = stepping(optimizer)
    thread.join(0.1)
    assert thread.is_alive()
    fence.remove()
    thread.join(30)
    assert parameter.eq(-1).all()
    optimizer.step()
    assert fence.num_steps == 1  # the hook is gone
    fence.remove()


def test_backward_waits_when_the_step_is_fused_into_it(fence: Fence) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    fence.close(SourceGuard([]))
    thread = threading.Thread(target=lambda: parameter.sum().backward(), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert parameter.eq(0).all()
    fence.open()
    thread.join(30)
    assert parameter.eq(-1).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own
def test_fence_holds_when_the_optimizer_is_compiled(fence: Fence) -> None:
    parameter, optimizer = one_parameter()
    compiled = torch.compile(optimizer.step, backend="eager")
    compiled()
    compiled()
    seen = fence.num_steps
    assert seen >= 2
    before = parameter.detach().clone()
    fence.close(SourceGuard([]))
    thread = threading.Thread(target=compiled, daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert torch.equal(parameter, before)
    fence.open()
    thread.join(60)
    assert torch.equal(parameter, before - 1)


# --------------------------------------------------------------------- overlapped or not


@pytest.mark.parametrize(
    ("delays_s", "expected"),
    [
        ([], "overlapped"),
        ([9.0, 9.0], "overlapped"),  # too few to tell
        ([2.0, 2.0, 0.1], "blocking"),
        ([0.1, 0.1, 9.0], "overlapped"),  # one outlier is none
        ([1.0, 1.0, 1.0], "overlapped"),
        ([0.1, 0.1, 0.1, 9.0, 9.0, 9.0], "overlapped"),  # it is decided once
        ([9.0, 9.0, 9.0, 0.1, 0.1, 0.1], "blocking"),
    ],
)
def test_mode_is_what_has_cost_less_when_three_were_measured(delays_s: list[float], expected: str) -> None:
    choice = ModeChoice(blocking_s=1.0)
    for delay_s in delays_s:
        choice.add(delay_s)
    assert choice.mode == expected
