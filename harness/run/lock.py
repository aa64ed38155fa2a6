"""One job for each run directory: a lock that the kernel takes back when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from harness.errors import RunDirError
from harness.io.lock_file import holder_of, open_lock, write_holder

FILE = "run.lock"
# A process that was killed gives its memory back first, and only then its locks.
TIMEOUT_S = 10.0
_POLL_S = 0.1
_HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# A POSIX lock does not keep its own process out, and closing any descriptor of the file gives it up: what this
# process holds is known here.
_held_here: set[tuple[int, int]] = set()


class RunLock:
    """The right to write into a run's directory, from the making of this object to `release`, or to death.

    A POSIX record lock, not `flock`: that one belongs to the open file, which a forked data loader's worker
    shares, so that a worker that outlives its killed parent would keep the run from being continued.

    Effects: not collective, rank zero only; any thread; blocks for at most `timeout_s`; leaves
    ``<run_dir>/run.lock``, with who holds it, mode 0600.

    Args:
        run_dir: the run's directory; it is there.
        timeout_s: how long a holder is waited for, in seconds.

    Attributes:
        works: whether the file system has locks; where it has none, nobody is kept out.

    Raises:
        RunDirError: if another job holds it, with its host, process id, user and begin.
        OSError: if the file cannot be written.
    """

    def __init__(self, run_dir: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.works = True
        path = run_dir / FILE
        # Not opened where this process holds it: closing it again would give the lock up.
        if path.exists() and _identity(os.stat(path)) in _held_here:
            raise RunDirError(_refusal(run_dir, "another PeriodicLogger of this process"))
        self._file = open_lock(path)
        try:
            self._lock(run_dir, timeout_s)
            write_holder(self._file)
            self._identity = _identity(os.fstat(self._file))
        except BaseException:
            os.close(self._file)
            raise
        # Not before all is well: with the file closed again, this process holds nothing.
        _held_here.add(self._identity)

    def _lock(self, run_dir: Path, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _NO_LOCKS_HERE:
                    self.works = False
                    return
                if error.errno not in _HELD_BY_OTHERS:
                    raise
                if time.monotonic() > deadline_s:
                    raise RunDirError(_refusal(run_dir, holder_of(self._file, "POSIX"))) from error
            time.sleep(_POLL_S)

    def release(self) -> None:
        """Let another job have the run. Called again it does nothing."""
        if self._identity in _held_here:
            _held_here.discard(self._identity)
            os.close(self._file)


def is_held(run_dir: Path) -> bool | None:
    """Whether a job, here or elsewhere, works on the run at this moment; None where the file system has no locks.

    Effects: not collective; any thread; the lock is not kept.
    """
    path = run_dir / FILE
    if not path.exists():
        return False
    if _identity(os.stat(path)) in _held_here:
        return True
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return None
        if error.errno not in _HELD_BY_OTHERS:
            raise
        return True
    finally:
        os.close(file)
    return False


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _refusal(run_dir: Path, holder: str) -> str:
    return f"run_name: {run_dir} is in use by {holder}; wait for it to end, or stop it, or give another run_name"
