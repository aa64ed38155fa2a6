"""From any of these to any other: every value is what was saved, and training goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.restoring_ranks import restore_under, save_under
from tests.distributed.test_saver import ranks

FILES = ("model.safetensors", "optimizer.safetensors")
SAVED = [("single", 1), ("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("zero1", 2), ("zero2", 3), ("zero3", 2)]
RESTORED = [("single", 1), ("ddp", 3), ("fsdp2", 2), ("hsdp", 4), ("zero1", 3), ("zero2", 2), ("zero3", 3)]


def run(world_size: int, target: object, *arguments: object) -> None:
    with ranks(world_size, target, *arguments) as processes:  # type: ignore[arg-type]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * world_size


def same_files(mine: Path, theirs: Path) -> bool:
    return all((mine / file).read_bytes() == (theirs / file).read_bytes() for file in FILES)


def test_values_are_what_was_saved_when_restored_on_any_topology(tmp_path: Path) -> None:
    checkpoints = {}
    for strategy, world_size in SAVED:
        name = f"{strategy}-{world_size}"
        run(world_size, save_under, tmp_path / name, strategy)
        checkpoints[name] = tmp_path / name
    for strategy, world_size in sorted({*SAVED, *RESTORED}):
        mine = f"{strategy}-{world_size}"
        names = {
            name: str(path / "step-3")
            for name, path in checkpoints.items()
            if name == mine or (strategy, world_size) in RESTORED
        }
        into = tmp_path / f"into-{mine}"
        run(world_size, restore_under, into, strategy, names)
        for name in names:
            # All of it, padding or not, is in what the same ranks save again.
            assert same_files(into / name, checkpoints[name] / "step-3"), f"{name} into {mine}"
            check_next(into / f"{name}-next", checkpoints[name] / "step-4", is_same=name == mine)
            # What a rank reads beyond what it holds is for digests that no rank has come by.
            size_bytes = sum((into / name / file).stat().st_size for file in FILES)
            reports = json.loads((into / f"{name}.json").read_text())
            assert sum(read - wanted for wanted, read, _ in reports) <= size_bytes
            assert all(notes == [] for _, _, notes in reports)


def check_next(mine: Path, theirs: Path, *, is_same: bool) -> None:
    """The step after: bit for bit on the same topology, else within what the order of sums makes."""
    if is_same:
        assert same_files(mine, theirs), mine
        return
    for file in FILES:
        found, expected = load_file(mine / file), load_file(theirs / file)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{mine} {key}: {text}"
            )
