"""Nodes that share no disk go on from what rank zero has written for all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.format.commit import list_checkpoints
from harness.checkpoint.format.verify import verify
from tests.distributed.restoring_ranks import save_under
from tests.distributed.resuming_ranks import train_on_disks_of_their_own
from tests.distributed.saved_models import MODELS
from tests.distributed.separate_disks import lose_the_sender, restore_apart, take_weights_apart
from tests.distributed.test_restore import FILES, run, same_files
from tests.distributed.test_saver import ranks


def apart(directory: Path, num_ranks: int, *seeing: int) -> list[Path]:
    """A directory for each rank; the seeing ones share that of rank zero."""
    own = [directory / "0" if rank in (0, *seeing) else directory / str(rank) for rank in range(num_ranks)]
    for path in own:
        path.mkdir(exist_ok=True)
    return own


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "seeing"),
    [("fsdp2", 3, ()), ("zero1", 2, ()), ("hsdp", 4, (1,))],
    ids=["fsdp2-3", "zero1-2", "hsdp-2+2"],
)
def test_values_are_what_was_saved_when_only_some_ranks_see_the_files(
    tmp_path: Path, strategy: str, num_ranks: int, seeing: tuple[int, ...]
) -> None:
    directories = apart(tmp_path, num_ranks, *seeing)
    run(2, save_under, tmp_path / "0", "fsdp2")
    checkpoint, into = tmp_path / "0/step-3", tmp_path / "into"
    # What another rank has under the same name is not the same checkpoint.
    shutil.copytree(tmp_path / "0/step-4", directories[-1] / "step-3")
    run(num_ranks, restore_apart, directories, into, strategy, "step-3")
    assert same_files(into / "restored", checkpoint)
    reports = json.loads((into / "report.json").read_text())
    blind = [rank for rank in range(num_ranks) if rank not in (0, *seeing)]
    assert reports[0][2] and f"step-3: rank {blind[0]} on " in reports[0][2][0]
    for rank, (wanted, read, _) in enumerate(reports):
        # They are sent what they hold and nothing else; the digests are left to those that have a disk.
        assert read == wanted if rank in blind else read >= wanted


def test_shards_take_weights_that_only_rank_zero_has(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model: Any = MODELS["gpt2"]()
    directories = apart(tmp_path, 2)
    model.save_pretrained(tmp_path / "0/hub", max_shard_size="5KB")
    run(2, take_weights_apart, directories, tmp_path / "into", "fsdp2", "hub")
    found = load_file(tmp_path / "into/begun" / FILES[0])
    for name, value in model.named_parameters():
        assert torch.equal(found[name], value), name


def attempt(directory: Path, num_ranks: int, signal_at: int, *, shared: bool = False) -> list[int | None]:
    for rank in range(num_ranks):
        own = directory / str(rank)
        if shared and rank and not own.exists():
            own.symlink_to(directory / "0")
        (own / "runs").mkdir(parents=True, exist_ok=True)
    task = {"batch_size": 6, "signal_at": signal_at}
    with ranks(num_ranks, train_on_disks_of_their_own, directory, task) as processes:
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]


def test_run_ends_alike_when_it_goes_on_without_a_common_disk(tmp_path: Path) -> None:
    """Stopped, its newest checkpoint damaged on rank zero's disk, gone on with the one before."""
    ends = {}
    for name in ("shared", "apart"):
        directory = tmp_path / name
        directory.mkdir()
        assert attempt(directory, 2, 6, shared=name == "shared") == [75, 75]
        checkpoints = directory / "0/runs/run/checkpoints"
        newest = list_checkpoints(checkpoints)[-1][0]
        content = bytearray((checkpoints / newest / FILES[1]).read_bytes())
        content[-5] ^= 1
        (checkpoints / newest / FILES[1]).write_bytes(content)
        assert attempt(directory, 2, 0, shared=name == "shared") == [0, 0]
        ends[name] = checkpoints / list_checkpoints(checkpoints)[-1][0]
        assert len(list(checkpoints.glob("damaged-*"))) == 1
    assert not (tmp_path / "apart/1/runs/run").exists()
    assert ends["apart"].name == ends["shared"].name
    for file in (*FILES, "trainer_state.json"):
        assert (ends["apart"] / file).read_bytes() == (ends["shared"] / file).read_bytes(), file
    assert verify(ends["apart"]).problems == ()


def test_run_does_not_begin_again_when_another_rank_has_its_checkpoints(tmp_path: Path) -> None:
    assert attempt(tmp_path, 2, 6) == [75, 75]
    # The next attempt has rank zero on the other node.
    (tmp_path / "0").rename(tmp_path / "was-0")
    (tmp_path / "1").rename(tmp_path / "0")
    (tmp_path / "was-0").rename(tmp_path / "1")
    assert attempt(tmp_path, 2, 0) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] and "start the run with rank 0 on that node" in said[0]
    assert said[0].startswith("CheckpointError: runs/run/checkpoints: rank 1 on ")


def test_ranks_say_who_is_gone_when_the_sender_dies(tmp_path: Path) -> None:
    directories = apart(tmp_path, 3)
    run(2, save_under, tmp_path / "0", "fsdp2")
    with ranks(3, lose_the_sender, directories, "step-3") as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [9, 0, 0]
    for rank in (1, 2):
        assert (tmp_path / f"said-{rank}").read_text() != "nothing"
