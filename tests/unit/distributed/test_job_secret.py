"""The secret of a job: from the environment of the step, or from a file that only its user can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from harness.distributed.job_secret import FILE_VARIABLE, SECRET_VARIABLE, JobSecret
from harness.errors import LaunchError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "slurm" / "rendezvous.secret"
    monkeypatch.setenv(FILE_VARIABLE, str(found))
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    return found


def test_value_of_the_environment_is_used_when_it_is_set(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "x" * 64)
    assert JobSecret.from_environment().create() == JobSecret.from_environment().read() == b"x" * 64
    assert not path.exists()
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(LaunchError, match="must have at least 32 characters, has 5"):
        JobSecret.from_environment()


def test_private_file_is_written_when_no_value_is_set(path: Path) -> None:
    assert JobSecret.from_environment().read() is None
    before = os.umask(0)
    try:
        first = JobSecret.from_environment().create()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert JobSecret.from_environment().read() == first
    assert JobSecret.from_environment().create() != first
    JobSecret.from_environment().discard()
    assert JobSecret.from_environment().read() is None


def test_link_is_not_followed_when_it_has_the_files_name(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    theirs = tmp_path / "theirs"
    theirs.write_text("x" * 64)
    theirs.chmod(0o600)
    path.symlink_to(theirs)
    with pytest.raises(LaunchError, match="cannot be read"):
        JobSecret.from_environment().read()
    JobSecret.from_environment().create()
    assert theirs.read_text() == "x" * 64
    assert not path.is_symlink()


def test_file_is_refused_when_others_can_read_it(path: Path) -> None:
    JobSecret.from_environment().create()
    path.chmod(0o640)
    with pytest.raises(LaunchError, match=r"another user can know the job's secret: .* mode 0640"):
        JobSecret.from_environment().read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_file_is_refused_when_another_user_owns_it(path: Path) -> None:
    JobSecret.from_environment().create()
    os.chown(path, 12345, -1)
    with pytest.raises(LaunchError, match="the file belongs to user 12345"):
        JobSecret.from_environment().read()


def test_error_names_the_remedy_when_neither_is_set(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE_VARIABLE)
    with pytest.raises(LaunchError, match=f"start them with `harness rank`, or set {SECRET_VARIABLE}"):
        JobSecret.from_environment().create()


def test_file_of_a_killed_job_is_removed_when_it_is_old(path: Path) -> None:
    path.parent.mkdir()
    kept = {"rendezvous-2.secret", "it.sbatch", "database.secret"}
    for name in ("rendezvous-1.secret", *kept):
        path.with_name(name).touch()
    for name in ("rendezvous-1.secret", "it.sbatch", "database.secret"):
        os.utime(path.with_name(name), (0, 0))
    JobSecret.from_environment().create()
    assert {each.name for each in path.parent.iterdir()} == {path.name, *kept}


def test_discard_does_nothing_when_there_is_no_file(path: Path) -> None:
    JobSecret.from_environment().discard()
    JobSecret(b"x" * 64).discard()
    assert not path.exists()
