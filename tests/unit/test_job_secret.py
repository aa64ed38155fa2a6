"""The secret of a job: from the environment of the step, or from a file that only its user can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from harness.distributed.job_secret import FILE_VARIABLE, SECRET_VARIABLE, discard, make_secret, read_secret
from harness.errors import LaunchError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "slurm" / "rendezvous.secret"
    monkeypatch.setenv(FILE_VARIABLE, str(found))
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    return found


def test_secret_of_the_environment_is_taken_when_there_is_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "x" * 64)
    assert make_secret() == read_secret() == b"x" * 64
    assert not path.exists()
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(LaunchError, match="must have at least 32 characters, has 5"):
        read_secret()


def test_file_is_its_users_alone_and_new_each_time_when_there_is_none(path: Path) -> None:
    assert read_secret() is None
    before = os.umask(0)
    try:
        first = make_secret()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_secret() == first
    assert make_secret() != first
    discard()
    assert read_secret() is None


def test_link_is_not_followed_when_it_lies_where_the_file_shall_be(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    theirs = tmp_path / "theirs"
    theirs.write_text("x" * 64)
    theirs.chmod(0o600)
    path.symlink_to(theirs)
    with pytest.raises(LaunchError, match="cannot be read"):
        read_secret()
    make_secret()
    assert theirs.read_text() == "x" * 64
    assert not path.is_symlink()


def test_file_is_refused_when_others_can_read_it(path: Path) -> None:
    make_secret()
    path.chmod(0o640)
    with pytest.raises(LaunchError, match=r"another user can know the job's secret: .* mode 0640"):
        read_secret()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_file_is_refused_when_it_is_another_users(path: Path) -> None:
    make_secret()
    os.chown(path, 12345, -1)
    with pytest.raises(LaunchError, match="it belongs to user 12345"):
        read_secret()


def test_error_names_the_remedy_when_there_is_neither(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE_VARIABLE)
    with pytest.raises(LaunchError, match=f"start them by `harness rank`, or set {SECRET_VARIABLE}"):
        make_secret()


def test_file_of_a_job_that_was_killed_is_removed_when_it_is_old(path: Path) -> None:
    path.parent.mkdir()
    kept = {"rendezvous-2.secret", "it.sbatch", "database.secret"}
    for name in ("rendezvous-1.secret", *kept):
        path.with_name(name).touch()
    for name in ("rendezvous-1.secret", "it.sbatch", "database.secret"):
        os.utime(path.with_name(name), (0, 0))
    make_secret()
    assert {each.name for each in path.parent.iterdir()} == {path.name, *kept}


def test_nothing_is_discarded_when_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FILE_VARIABLE, SECRET_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    discard()
