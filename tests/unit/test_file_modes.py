"""Files of a run have the modes that the umask gives; those with addresses are their user's alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.checkpoint.direct_io import RangeFile
from harness.checkpoint.writer import OutputFile, make_files
from harness.run_directory import make_run_directory
from harness.tracking.outbox import Outbox
from harness.tracking.settings import write_settings


@pytest.fixture
def group_shares() -> Iterator[None]:
    """The umask of sites where a group works in one directory."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def modes(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}


@pytest.mark.usefixtures("group_shares")
def test_modes_are_of_the_umask_but_for_files_with_addresses(tmp_path: Path) -> None:
    directory, lock = make_run_directory(tmp_path, "run", None, "auto")
    lock.release()
    Outbox(directory.path / "outbox").close()
    write_settings(directory.path / "outbox", {"tracking_uri": "http://host"})
    make_files(directory.path / "checkpoints" / "epoch-0001", [OutputFile("model.safetensors", 8, "")])
    RangeFile(directory.path / "checkpoints" / "epoch-0001" / "optimizer.safetensors").close()
    found = modes(tmp_path / "run")
    journal = next(name for name in found if name.startswith("outbox/") and name.endswith(".jsonl"))
    assert found == {
        "run.json": 0o600,
        "run.lock": 0o600,
        "outbox": 0o775,
        journal: 0o664,
        "outbox/settings.json": 0o600,
        "checkpoints": 0o775,
        "checkpoints/epoch-0001": 0o775,
        "checkpoints/epoch-0001/model.safetensors": 0o664,
        "checkpoints/epoch-0001/optimizer.safetensors": 0o664,
    }
