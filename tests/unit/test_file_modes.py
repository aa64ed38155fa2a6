"""Files of a run have the modes that the umask gives; those with addresses are their user's alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.checkpoint.save.writer import OutputFile, RangeFile, make_files
from harness.errors import TrackingError
from harness.run.directory import make_run_directory
from harness.tracking.journal.delivery_state import Delivered, write_delivered
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.mlmodel import write_model_spec
from harness.tracking.publisher.attempts import write_attempts
from harness.tracking.publisher.launcher import write_settings


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
    outbox_dir = directory.path / "outbox"
    outbox = JournalWriter(outbox_dir, max_bytes=1000)
    for _ in range(3):  # more than one file of it
        outbox.append("tag", {"harness.command": "train --data s3://host/" + "x" * 40})
    outbox.close()
    write_delivered(outbox_dir, Delivered(refused=("cannot connect to host",)))
    write_attempts(directory.path, {1: {"reason": "cannot connect to host"}})
    write_model_spec(outbox_dir, 1, {"init_args": {"data": "s3://host/data"}})
    write_settings(directory.path / "outbox", {"tracking_uri": "http://host"})
    make_files(directory.path / "checkpoints" / "epoch-0001", [OutputFile("model.safetensors", 8, "")])
    RangeFile(directory.path / "checkpoints" / "epoch-0001" / "optimizer.safetensors").close()
    found = modes(tmp_path / "run")
    journals = [name for name in found if name.startswith("outbox/journal.")]
    recipe = next(name for name in found if name.startswith("outbox/recipe"))
    assert len(journals) > 1
    assert found == {
        "run.json": 0o600,
        "run.lock": 0o600,
        "outbox": 0o775,
        **dict.fromkeys(journals, 0o600),
        recipe: 0o600,
        "outbox/delivered.json": 0o600,
        "attempts.json": 0o600,
        "outbox/settings.json": 0o600,
        "checkpoints": 0o775,
        "checkpoints/epoch-0001": 0o775,
        "checkpoints/epoch-0001/model.safetensors": 0o664,
        "checkpoints/epoch-0001/optimizer.safetensors": 0o664,
    }


@pytest.mark.usefixtures("group_shares")
def test_journal_of_an_earlier_version_is_continued_when_a_group_can_read_it(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b'{"kind": "tag"}\n{"torn": ')
    journal.chmod(0o664)
    outbox = JournalWriter(tmp_path)
    outbox.append("tag", {"name": "value"})
    outbox.close()
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    first, second = journal.read_bytes().splitlines()
    assert first == b'{"kind": "tag"}'
    assert b"value" in second


def test_journal_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Of another user, who may write to the directory; the directory itself may be reached through a link."""
    (tmp_path / "outbox").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outbox")
    JournalWriter(tmp_path / "link").close()
    (tmp_path / "theirs").write_text("a line without an end")
    (tmp_path / "theirs").chmod(0o644)
    (tmp_path / "outbox" / "journal.jsonl").unlink()
    (tmp_path / "outbox" / "journal.jsonl").symlink_to(tmp_path / "theirs")
    with pytest.raises(TrackingError, match=r"journal\.jsonl: cannot open the outbox: is a link"):
        JournalWriter(tmp_path / "link")
    assert (tmp_path / "theirs").read_text() == "a line without an end"
    assert stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o644
