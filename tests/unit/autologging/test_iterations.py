"""Loops in which a pass over the data does not show as it begins that it trains: saved, and gone on with."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.autologging.loops import Loop, On, checkpoints, require_states


def sets_train_mode_in_the_body(loop: Loop, stops: Callable[[int, int], None]) -> None:
    for epoch in range(4):
        for number, batch in enumerate(loop.train):
            loop.model.train()
            loop.step(batch)
            stops(epoch, number)
        loop.evaluate(loop.evaluation)
        loop.keep_state()


def takes_turns_between_loaders(loop: Loop, stops: Callable[[int, int], None]) -> None:
    for epoch in range(4):
        loop.model.train()
        for number, batch in enumerate((loop.train, loop.evaluation)[epoch % 2]):
            loop.step(batch)
            stops(epoch, number)
        loop.evaluate(loop.other)
        loop.keep_state()


def leaves_each_epoch_behind_one_batch(loop: Loop, stops: Callable[[int, int], None]) -> None:
    for epoch in range(7):
        loop.model.train()
        for batch in loop.train:
            loop.step(batch)
            stops(epoch, 0)
            break
        loop.keep_state()


def fetches_several_before_backward(loop: Loop, stops: Callable[[int, int], None]) -> None:
    for epoch in range(4):
        loop.model.train()
        iterator = iter(loop.train)
        number = 0
        while batches := list(itertools.islice(iterator, 2)):
            for batch in batches:
                loop.accelerator.backward(loop.loss(batch))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            stops(epoch, number)
            number += 1
        loop.keep_state()


def accumulates_and_sets_train_mode_in_the_body(loop: Loop, stops: Callable[[int, int], None]) -> None:
    loop.accelerator.gradient_accumulation_steps = 2
    for epoch in range(4):
        for number, batch in enumerate(loop.train):
            loop.model.train()
            with loop.accelerator.accumulate(loop.model):
                loop.step(batch)
            stops(epoch, number)
        loop.evaluate(loop.evaluation)
        loop.keep_state()


def looks_into_the_loader_first(loop: Loop, stops: Callable[[int, int], None]) -> None:
    for epoch in range(4):
        loop.model.train()
        next(iter(loop.train))
        for number, batch in enumerate(loop.train):
            loop.step(batch)
            stops(epoch, number)
        loop.keep_state()


BODIES = [
    (sets_train_mode_in_the_body, [(0, 1), (1, 0), (1, 2), (1, 4), (2, 1), (3, 3)]),
    (takes_turns_between_loaders, [(0, 1), (1, 0), (1, 1), (2, 2), (3, 1)]),
    (leaves_each_epoch_behind_one_batch, [(1, 0), (3, 0)]),
    (fetches_several_before_backward, [(1, 0), (2, 2)]),
    (accumulates_and_sets_train_mode_in_the_body, [(1, 1), (2, 0)]),
    (looks_into_the_loader_first, [(1, 1), (2, 4)]),
]


@pytest.mark.parametrize("body, stop_at", [(body, at) for body, places in BODIES for at in places])
def test_loop_ends_as_if_never_stopped_when_it(
    on: On, tmp_path: Path, body: Callable[..., None], stop_at: tuple[int, int]
) -> None:
    switch = on("whole")
    whole = Loop()
    body(whole, lambda epoch, number: None)
    switch.finish()
    require_states(tmp_path, whole.states, "whole")

    switch = on("cut")

    def stops(epoch: int, number: int) -> None:
        if (epoch, number) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as exit:
        body(Loop(), stops)
    assert exit.value.code == 75
    last = f"epoch-{len(whole.states):04d}"
    assert last not in checkpoints(tmp_path, "cut")
    switch.turn_off()

    switch = on("cut")
    resumed = Loop()
    body(resumed, lambda epoch, number: None)
    switch.finish()
    ends = [checkpoints(tmp_path, run)[last] for run in ("cut", "whole")]
    assert ends[0].step == ends[1].step
    assert all(torch.equal(resumed.states[-1][key], whole.states[-1][key]) for key in whole.states[-1])
    assert ends[0].metrics["train/loss"] == ends[1].metrics["train/loss"]
