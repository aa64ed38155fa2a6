"""The secret of a job, by which its ranks know each other (`harness.distributed.job_rendezvous`). Imports no torch.

It is in the environment of the step, where slurm/train.sbatch has put it, and which other users cannot read. In a step
that was started in another way, rank zero makes a file that only its user can read, in the directory of the runs.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from harness.errors import LaunchError

# Set by slurm/train.sbatch, or by whoever starts the step: at least 32 characters.
SECRET_VARIABLE = "HARNESS_JOB_SECRET"
# Set by `harness rank` where the other is not there.
FILE_VARIABLE = "HARNESS_JOB_SECRET_FILE"
# The file's name, with the job's; in a directory that the user may have other files in.
FILE_NAME = "rendezvous-{}.secret"
_MIN_CHARS = 32
# Ranks look for each other for half an hour; the clocks of nodes and of file servers differ by less than the rest.
_OLD_S = 24 * 3600.0


def make_secret() -> bytes:
    """The secret, for rank zero; it writes the file where the environment has none.

    Effects: leaves the file until `discard`; mode 0600, and it is not written through a link. Removes those beside it
    that an earlier job has left, whose rank zero was killed before all ranks had met.

    Raises:
        LaunchError: if there is neither, or it cannot be written.
    """
    if (found := _of_environment()) is not None:
        return found
    path = _path()
    _discard_old(path.parent)
    value = secrets.token_hex(_MIN_CHARS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as file:
            file.write(value)
    except OSError as error:
        raise LaunchError(
            f"{path}: the job's secret cannot be written: {error.strerror}; give another --run_dir, or set "
            f"{SECRET_VARIABLE}"
        ) from error
    return value.encode()


def read_secret() -> bytes | None:
    """The secret, for the other ranks; None: rank zero has not written it yet.

    Raises:
        LaunchError: if there is neither environment nor file to look at, or another user could know what it holds.
    """
    if (found := _of_environment()) is not None:
        return found
    path = _path()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LaunchError(f"{path}: the job's secret cannot be read: {error.strerror}") from error
    with open(descriptor) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise LaunchError(
                f"{path}: another user can know the job's secret: it belongs to user {status.st_uid} and has mode "
                f"{stat.S_IMODE(status.st_mode):04o}; remove it, or set {SECRET_VARIABLE} for the step"
            )
        value = file.read()
    # Rank zero is just about to write it.
    return value.encode() if len(value) >= _MIN_CHARS else None


def discard() -> None:
    """Remove the file, for rank zero: once every rank has used it, or none will. Nothing where there is none."""
    if SECRET_VARIABLE not in os.environ and FILE_VARIABLE in os.environ:
        with suppress(OSError):
            _path().unlink()


def _discard_old(directory: Path) -> None:
    for path in directory.glob(FILE_NAME.format("*")):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _OLD_S:
                path.unlink()


def _of_environment() -> bytes | None:
    value = os.environ.get(SECRET_VARIABLE)
    if value is None:
        return None
    if len(value) < _MIN_CHARS:
        raise LaunchError(f"{SECRET_VARIABLE}: must have at least {_MIN_CHARS} characters, has {len(value)}")
    return value.encode()


def _path() -> Path:
    if FILE_VARIABLE not in os.environ:
        raise LaunchError(
            f"the ranks have no secret to know each other by; start them by `harness rank`, or set {SECRET_VARIABLE}"
        )
    return Path(os.environ[FILE_VARIABLE])
