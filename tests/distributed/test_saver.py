"""Ranks that are killed in the middle of a save, at any moment: what has a manifest is whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.format.commit import MANIFEST, list_checkpoints, remove_leftovers
from harness.checkpoint.format.verify import verify
from tests.distributed.saving_ranks import free_port, save_for_ever, save_what_differs, save_with_trouble
from tests.distributed.two_dimensional import save_two_dimensional, train_on_while_saves_are_skipped

# One interpreter imports torch; the ranks are its children, so that a run starts in a fraction of a second.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.distributed.saving_ranks", "tests.distributed.two_dimensional", "tests.distributed.preloaded"]
)


@contextmanager
def ranks(world_size: int, target: Callable[..., None], *arguments: object) -> Iterator[list[BaseProcess]]:
    port = free_port()
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=target, args=(rank, world_size, port, *arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_until_saving(directory: Path, processes: list[BaseProcess]) -> None:
    deadline_s = time.monotonic() + 60
    while not all((directory / f"ready-{rank}").exists() for rank in range(len(processes))):
        assert time.monotonic() < deadline_s, "the ranks did not begin to save within 60 s"
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)


def wait_until_committed(checkpoints: Path, processes: list[BaseProcess]) -> None:
    deadline_s = time.monotonic() + 60
    while not list(checkpoints.glob(f"step-*/{MANIFEST}")):
        assert time.monotonic() < deadline_s, "the ranks committed no checkpoint within 60 s"
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)


def check_all(checkpoints: Path) -> list[str]:
    """Every committed checkpoint is whole, and of one moment; their names."""
    names = []
    for name, manifest in list_checkpoints(checkpoints):
        found = verify(checkpoints / name)
        assert not found.problems, found.problems
        for file in ("model.safetensors", "optimizer.safetensors"):
            for key, tensor in load_file(checkpoints / name / file).items():
                assert bool((tensor == manifest.step).all()), f"{name}: {key} is not of step {manifest.step}"
        names.append(name)
    return names


def phase(checkpoints: Path) -> str:
    """How far the save had come that was cut off."""
    left = list(checkpoints.glob(".tmp-*"))
    if not left:
        return "copying, or between saves"
    if (left[0] / MANIFEST).exists():
        return "before the rename"
    return "before the manifest" if (left[0] / "trainer_state.json").exists() else "writing"


@pytest.mark.timeout(600)
def test_what_has_a_manifest_is_whole_when_a_rank_is_killed_at_any_moment(tmp_path: Path) -> None:
    draw = random.Random(7)
    phases: dict[str, int] = {}
    num_committed = 0
    for attempt in range(50):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        transport = ("direct", "direct", "gather")[attempt % 3]
        with ranks(2, save_for_ever, directory, transport, 10_000) as processes:
            wait_until_saving(directory, processes)
            checkpoints = (directory / "0" if transport == "gather" else directory) / "checkpoints"
            if attempt % 2:
                wait_until_committed(checkpoints, processes)
            # A moment of its own in the saves that follow one another.
            time.sleep(draw.uniform(0.0, 0.4))
            pid = draw.choice(processes).pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            # The others have time to do something wrong.
            time.sleep(0.1)
        num_committed += len(check_all(checkpoints))
        phases[phase(checkpoints)] = phases.get(phase(checkpoints), 0) + 1
        remove_leftovers(checkpoints)
        assert not list(checkpoints.glob(".tmp-*"))
    print(f"killed while {phases}, {num_committed} checkpoints committed before")
    assert num_committed >= 25
    assert phases.get("writing", 0) > 5


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("full", "rank 1: .*model.safetensors|rank 1: .*checkpoints/.tmp.*; free space there"),
        ("dead", "rank 1: the writer process"),
        ("hung", "rank 1: the writer process had not written after|rank 1 had not written their part after"),
    ],
)
def test_training_and_later_saves_go_on_when_a_writer_is(tmp_path: Path, trouble: str, said: str) -> None:
    with ranks(2, save_with_trouble, tmp_path, trouble) as processes:
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0, 0]
    statuses = {step: (tmp_path / f"status-{step}").read_text() for step in range(1, 5)}
    committed = check_all(tmp_path / "checkpoints")
    if trouble == "dead":
        # It is started again where the save has not begun with it; else this one save fails.
        assert set(committed) >= {f"step-{step:08d}" for step in (1, 2, 4)}, statuses
        assert len(committed) == 4 or re.search(said, statuses[3]), statuses
    else:
        assert committed == [f"step-{step:08d}" for step in (1, 2, 4)], statuses
        assert re.search(said, statuses[3]), statuses
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_rank_zero_has_all_when_ranks_share_no_directory(tmp_path: Path, world_size: int) -> None:
    with ranks(world_size, save_for_ever, tmp_path, "gather", 4) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * world_size
    assert check_all(tmp_path / "0/checkpoints") == [f"step-{step:08d}" for step in range(1, 5)]
    assert not any((tmp_path / str(rank)).exists() for rank in range(1, world_size))


def test_checkpoints_are_of_one_moment_when_steps_follow_at_once(tmp_path: Path) -> None:
    with ranks(2, save_for_ever, tmp_path, "auto", 12) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    assert len(check_all(tmp_path / "checkpoints")) == 12


def test_files_equal_gathered_state_when_fsdp2_meets_tensor_parallelism(tmp_path: Path) -> None:
    with ranks(4, save_two_dimensional, tmp_path) as processes:
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0] * 4
    placements = (tmp_path / "placements").read_text()
    assert "_StridedShard" in placements and "Shard(dim=1)" in placements, placements
    for step in range(1, 4):
        for file in ("model.safetensors", "optimizer.safetensors"):
            mine = load_file(tmp_path / "checkpoints" / f"step-{step:08d}" / file)
            expected = load_file(tmp_path / "expected" / f"step-{step:08d}" / file)
            assert mine.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(mine[name], value), name


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("model", "second: rank 2 holds other values than rank 0"),
        ("optimizer", "count.second: rank 2 holds other values than rank 0"),
        ("nowhere", "nothing"),
    ],
)
def test_error_has_the_tensor_on_all_ranks_when_a_rank_holds_other_values(
    tmp_path: Path, where: str, said: str
) -> None:
    with ranks(3, save_what_differs, tmp_path, where) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 3
    assert all((tmp_path / f"said-{rank}").read_text().startswith(said) for rank in range(3))


def test_ranks_stay_alike_when_a_save_is_skipped_that_some_have_begun(tmp_path: Path) -> None:
    with ranks(2, train_on_while_saves_are_skipped, tmp_path) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    names = [name for name, _ in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000001", "step-00000002", "step-00000006", "step-00000007"]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
