"""Ranks on nodes of which some do not see the checkpoint: each rank has a working directory of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.checkpoint.restore.restore import restore_tensors, restore_weights
from harness.checkpoint.restore.visibility import open_checkpoint, open_weights
from harness.checkpoint.state.trainer_state import Moment
from harness.errors import HarnessError
from tests.distributed.restoring_ranks import prepared, saver_of, started


def restore_apart(
    rank: int, world_size: int, port: int, directories: list[Path], into: Path, strategy: str, name: str
) -> None:
    """Restore ``name`` in this rank's directory, where rank zero has it, and save what was restored."""
    os.chdir(directories[rank])
    accelerator, collectives = started(rank, world_size, port, strategy, "fp32")
    said: list[str] = []
    watched = prepared(accelerator, 99, "AdamW", 2)
    manifest, files = open_checkpoint(Path(name), collectives, RemoteFiles(collectives), said.append)
    found = restore_tensors(accelerator, watched, Path(name), collectives, manifest=manifest, files=files)
    report = collectives.all_gather("what was read", [found.wanted_bytes, found.read_bytes, said])
    saver = saver_of(accelerator, collectives, into)
    saver.check(watched)
    saver.save(Moment("restored", 0, 3, 0, {}))
    saver.close()
    if rank == 0:
        (into / "report.json").write_text(json.dumps(report))


def take_weights_apart(
    rank: int, world_size: int, port: int, directories: list[Path], into: Path, strategy: str, name: str
) -> None:
    """The weights alone, from a directory as transformers leaves it; and save them."""
    os.chdir(directories[rank])
    accelerator, collectives = started(rank, world_size, port, strategy, "fp32")
    watched = prepared(accelerator, 99, "SGD", 1, "gpt2")
    records, files = open_weights(Path(name), collectives, RemoteFiles(collectives), lambda line: None)
    restore_weights(accelerator, watched, Path(name), collectives, records, files)
    saver = saver_of(accelerator, collectives, into)
    saver.check(watched)
    saver.save(Moment("begun", 0, 1, 0, {}))
    saver.close()


def lose_the_sender(rank: int, world_size: int, port: int, directories: list[Path], name: str) -> None:
    """Rank zero dies when the others ask it for bytes; what they say of it is beside their directories."""
    os.chdir(directories[rank])
    accelerator, collectives = started(rank, world_size, port, "fsdp2", "fp32")
    watched = prepared(accelerator, 99, "AdamW", 2)
    manifest, files = open_checkpoint(Path(name), collectives, RemoteFiles(collectives), lambda line: None)
    said = "nothing"
    try:
        # Not before all have their connections: a rank that is at it would fail otherwise.
        collectives.all_gather("who has opened it", None)
        if rank == 0:
            os._exit(9)
        restore_tensors(accelerator, watched, Path(name), collectives, manifest=manifest, files=files)
    except HarnessError as error:
        said = str(error)
    directories[rank].with_name(f"said-{rank}").write_text(said)
    # The gloo groups' destructors would wait for a rank that is gone.
    os._exit(0)
