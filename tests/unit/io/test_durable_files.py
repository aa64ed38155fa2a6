from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from harness.io.durable_files import open_private, replace_file


def test_new_text_is_there_when_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    replace_file(path, "old, and longer")
    replace_file(path, "neu: ä")
    assert path.read_text(encoding="utf-8") == "neu: ä"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_old_text_stays_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    replace_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "half of it, then a lone surrogate \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_error_is_the_systems_when_the_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "missing" / "x", "text")


def test_no_temporary_is_left_when_the_rename_fails(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        replace_file(tmp_path / "taken", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_modes_follow_the_umask_but_for_private_files(tmp_path: Path, umask: int) -> None:
    shared, private = tmp_path / "shared", tmp_path / "private"
    private.touch(0o644)
    before = os.umask(umask)
    try:
        replace_file(shared, "of all")
        replace_file(private, "of one", is_private=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_file_becomes_private_when_it_is_there_already(tmp_path: Path) -> None:
    path = tmp_path / "publisher.log"
    path.write_text("earlier\n")
    path.chmod(0o644)
    with open(path, "a", opener=open_private) as log:
        log.write("later\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "earlier\nlater\n"


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_RDWR | os.O_CREAT], ids=["log", "lock"])
def test_private_file_is_not_opened_when_it_is_a_link_or_a_pipe(tmp_path: Path, flags: int) -> None:
    theirs, link, pipe = tmp_path / "theirs", tmp_path / "link", tmp_path / "pipe"
    theirs.touch(0o644)
    theirs.chmod(0o644)
    link.symlink_to(theirs)
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is a link or no regular file"):
        open_private(link, flags)
    with pytest.raises(OSError, match="no regular file, and is not opened"):
        open_private(pipe, flags)
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o644


@pytest.mark.parametrize("is_private", [False, True])
def test_file_behind_a_link_is_as_before_when_the_link_has_the_temporary_name(tmp_path: Path, is_private: bool) -> None:
    path, theirs = tmp_path / "record.json", tmp_path / "theirs"
    theirs.write_text("of another")
    (tmp_path / f".record.json.{os.getpid()}.tmp").symlink_to(theirs)
    replace_file(path, "new", is_private=is_private)
    assert theirs.read_text() == "of another"
    assert path.read_text() == "new"
    assert not path.is_symlink()


def test_private_file_is_opened_when_its_directory_is_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    with open(tmp_path / "latest" / "publisher.log", "w", opener=open_private) as log:
        log.write("line")
    assert (tmp_path / "run" / "publisher.log").read_text() == "line"
