"""Ranks with different numbers of batches: none waits for what another does not do, and what is logged is of all."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Collection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.format.commit import Manifest, list_checkpoints
from tests.distributed.test_saver import ranks
from tests.distributed.uneven_ranks import Case, run_own_loop, run_script
from tests.launching import stacks

LIMIT_S = 30
LOOPS = {"script": run_script, "own_loop": run_own_loop}


def train(directory: Path, case: Case, loop: str = "script") -> list[int | None]:
    """The exit codes of two ranks; past the limit their stacks."""
    with ranks(2, LOOPS[loop], directory, case) as processes:
        deadline_s = time.monotonic() + LIMIT_S
        for process in processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        assert not any(process.is_alive() for process in processes), _where_they_are(processes)
        return [process.exitcode for process in processes]


def _where_they_are(processes: list[BaseProcess]) -> str:
    return f"not done after {LIMIT_S} s\n" + "\n".join(stacks(process.pid) for process in processes if process.pid)


def checkpoints(directory: Path) -> dict[str, Manifest]:
    return dict(list_checkpoints(directory / "run" / "checkpoints"))


def losses(directory: Path, epoch: int, first: int = 0, last: int | None = None) -> float:
    """The mean over all samples of both ranks in these batches of an epoch, as the script itself has had it."""
    of_ranks = [json.loads((directory / f"losses-{rank}.json").read_text())[epoch] for rank in range(2)]
    batches = [batch for of_rank in of_ranks for batch in of_rank[first:last]]
    return sum(loss * num for loss, num in batches) / sum(num for _, num in batches)


def said(directory: Path) -> str:
    return "\n".join((directory / f"said-{rank}").read_text() for rank in range(2))


@pytest.mark.parametrize(
    ("kind", "loop"),
    [
        *((kind, loop) for kind in ("joined", "overridden", "accumulating", "stream") for loop in LOOPS),
        # A loop of our own counts steps by `accelerator.accumulate`.
        ("by_hand", "script"),
    ],
)
def test_each_epoch_is_saved_and_logged_as_all_ranks_had_it_when_inputs_are(
    tmp_path: Path, kind: str, loop: str
) -> None:
    assert train(tmp_path, Case(kind), loop) == [0, 0], said(tmp_path)
    steps = {"accumulating": 3, "by_hand": 3, "stream": 5}.get(kind, 6)
    found = checkpoints(tmp_path)
    assert [(n, m.epoch, m.step) for n, m in found.items()] == [("epoch-0001", 1, steps), ("epoch-0002", 2, 2 * steps)]
    for epoch, (name, manifest) in enumerate(found.items()):
        assert manifest.metrics["train/loss"] == pytest.approx(losses(tmp_path, epoch))
        require_state(tmp_path / "run" / "checkpoints" / name, tmp_path / f"state-{epoch + 1}-0.pt")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("kind", "names", "window"),
    [
        # 6 and 5 batches: the sixth step is rank zero's alone, and is saved with its epoch.
        ("joined", ["step-00000002", "step-00000004", "epoch-0001", "step-00000008", "step-00000010", "epoch-0002"], 4),
        # 3 and 5: of the epoch's third batch nobody knows whether the other's is a step, so what is due there waits.
        ("stream", ["step-00000002", "epoch-0001", "step-00000006", "epoch-0002"], 2),
    ],
)
def test_windows_and_checkpoints_by_steps_are_of_steps_that_all_ranks_have_when_inputs_are(
    tmp_path: Path, kind: str, names: list[str], window: int, loop: str
) -> None:
    case = Case(kind, log_every_n_steps=2, every_n_steps=2)
    assert train(tmp_path, case, loop) == [0, 0], said(tmp_path)
    found = checkpoints(tmp_path)
    assert sorted(found) == sorted(names)
    assert found["epoch-0001"].metrics["train/loss"] == pytest.approx(losses(tmp_path, 0, window))
    assert found["step-00000002"].metrics["train/loss"] == pytest.approx(losses(tmp_path, 0, 0, 2))


@pytest.mark.parametrize(
    ("kind", "rank", "batch", "number", "code", "names"),
    [
        ("joined", 1, 3, signal.SIGTERM, 75, ["step-00000003"]),
        ("joined", 0, 6, signal.SIGTERM, 75, ["epoch-0001"]),
        ("stream", 1, 4, signal.SIGTERM, 75, ["epoch-0001"]),
        ("joined", 0, 12, signal.SIGTERM, 0, ["epoch-0001", "epoch-0002"]),
        ("joined", 1, 3, signal.SIGUSR2, 0, ["epoch-0001", "epoch-0002", "step-00000003"]),
        ("accumulating", 0, 6, signal.SIGTERM, 75, ["step-00000003"]),
    ],
)
def test_ranks_stop_and_save_alike_when_a_signal_comes(
    tmp_path: Path, kind: str, rank: int, batch: int, number: int, code: int, names: list[str]
) -> None:
    assert train(tmp_path, Case(kind, signal_at=(rank, batch, number))) == [code, code], said(tmp_path)
    assert sorted(checkpoints(tmp_path)) == names


def test_checkpoint_is_of_the_epochs_end_when_a_rank_is_asked_where_the_other_has_no_step(tmp_path: Path) -> None:
    case = Case(signal_at=(0, 6, signal.SIGUSR2), every_n_epochs=None)
    assert train(tmp_path, case) == [0, 0], said(tmp_path)
    assert sorted(checkpoints(tmp_path)) == ["epoch-0002", "step-00000006"]
    require_state(tmp_path / "run" / "checkpoints" / "step-00000006", tmp_path / "state-1-0.pt")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("rank", "batch"), [(0, 6), (1, 2), (1, 5)])
def test_all_ranks_end_when_one_fails(tmp_path: Path, rank: int, batch: int, loop: str) -> None:
    codes = train(tmp_path, Case(dies_at=(rank, batch)), loop)
    assert all(codes), codes
    assert "a batch of this rank alone" in (tmp_path / f"said-{rank}").read_text()


def test_script_goes_on_with_the_next_epoch_when_it_was_killed_behind_one(tmp_path: Path) -> None:
    assert train(tmp_path, Case(dies_behind=1)) == [-signal.SIGKILL] * 2
    assert list(checkpoints(tmp_path)) == ["epoch-0001"]
    assert train(tmp_path, Case()) == [0, 0], said(tmp_path)
    assert "resumed from epoch-0001 (epoch 1, step 6)" in said(tmp_path)
    found = checkpoints(tmp_path)
    assert found["epoch-0002"].step == 12
    assert found["epoch-0002"].metrics["train/loss"] == pytest.approx(losses(tmp_path, 1))
    require_state(tmp_path / "run" / "checkpoints" / "epoch-0002", tmp_path / "state-2-0.pt")


@pytest.mark.parametrize("kind", ["joined", "stream"])
def test_epoch_ends_as_if_nothing_had_happened_when_a_script_was_stopped_within_it(tmp_path: Path, kind: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert train(whole, Case(kind, num_epochs=1)) == [0, 0], said(whole)
    assert train(cut, Case(kind, num_epochs=1, signal_at=(1, 2, signal.SIGTERM))) == [75, 75], said(cut)
    assert train(cut, Case(kind, num_epochs=1)) == [0, 0], said(cut)
    assert sorted(checkpoints(cut)) == ["epoch-0001", "step-00000002"]
    # Of running statistics torch's join takes the last rank's, and a checkpoint has rank zero's.
    require_state(
        cut / "run" / "checkpoints" / "epoch-0001", whole / "state-1-0.pt", but={"1.running_mean", "1.running_var"}
    )
    one, other = (checkpoints(each)["epoch-0001"].metrics["train/loss"] for each in (whole, cut))
    assert one == pytest.approx(other)


@pytest.mark.parametrize("leaves_behind", [(4, 2), (1, 3)])
def test_ranks_stay_in_step_when_one_leaves_the_loader_earlier(tmp_path: Path, leaves_behind: tuple[int, int]) -> None:
    assert train(tmp_path, Case(leaves_behind=leaves_behind)) == [0, 0], said(tmp_path)
    found = checkpoints(tmp_path)
    assert [m.step for m in found.values()] == [max(leaves_behind), 2 * max(leaves_behind)]
    assert found["epoch-0002"].metrics["train/loss"] == pytest.approx(losses(tmp_path, 1))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batches", [(2, 0), (0, 2)])
def test_ranks_stay_in_step_when_one_has_no_batch(tmp_path: Path, batches: tuple[int, int], loop: str) -> None:
    assert train(tmp_path, Case("stream", batches=batches), loop) == [0, 0], said(tmp_path)
    assert [m.step for m in checkpoints(tmp_path).values()] == [2, 4]


@pytest.mark.parametrize("kind", ["joined", "stream"])
def test_passes_are_one_epoch_without_checkpoints_when_one_join_is_around_them(tmp_path: Path, kind: str) -> None:
    assert train(tmp_path, Case(kind, is_joined_once=True)) == [0, 0], said(tmp_path)
    assert checkpoints(tmp_path) == {}
    epochs = [losses(tmp_path, epoch) for epoch in range(2)]
    for rank in range(2):
        latest = json.loads((tmp_path / f"latest-{rank}.json").read_text())
        assert latest["train/loss"] == pytest.approx(sum(epochs) / 2)
    assert said(tmp_path).count("a join of uneven inputs is around several passes") == 1


@pytest.mark.parametrize(("kind", "batches"), [("even", (6, 6)), ("joined", (6, 5)), ("stream", (2, 0))])
def test_checkpoints_are_of_the_optimizer_that_steps_when_a_rank_may_have_no_step_of_it(
    tmp_path: Path, kind: str, batches: tuple[int, int]
) -> None:
    case = Case(kind, num_epochs=3, batches=batches, other_optimizer_from=1)
    assert train(tmp_path, case) == [0, 0], said(tmp_path)
    steps = max(batches)
    assert [m.step for m in checkpoints(tmp_path).values()] == [steps, 2 * steps, 3 * steps]
    for epoch in range(3):
        directory = tmp_path / "run" / "checkpoints" / f"epoch-{epoch + 1:04d}"
        require_state(directory, tmp_path / f"state-{epoch + 1}-0.pt")


def require_state(checkpoint: Path, record: Path, *, but: Collection[str] = ()) -> None:
    """What the script has on rank zero."""
    recorded = torch.load(record, weights_only=True)
    for part in ("model", "optimizer"):
        saved = load_file(checkpoint / f"{part}.safetensors")
        assert saved.keys() == recorded[part].keys()
        differing = [key for key in saved.keys() - but if not torch.equal(saved[key], recorded[part][key])]
        assert not differing, (checkpoint, part, differing)
