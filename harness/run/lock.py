"""A lock that admits one job for each run directory. The kernel releases it when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from harness.errors import RunDirError
from harness.io.lock_file import holder_of, open_lock, write_holder

FILE = "run.lock"
# A killed process frees its memory before it releases its locks.
TIMEOUT_S = 10.0
_POLL_S = 0.1
_HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# (device, inode) of the locks of this process. A POSIX lock does not exclude its own process, and closing any
# descriptor of the file releases it.
_held_here: set[tuple[int, int]] = set()


class RunLock:
    """The exclusive right to write into a run's directory, held from construction to `release` or the process's death.

    A POSIX record lock. A `flock` belongs to the open file, which forked data loader workers share: a worker that
    outlives its killed parent would keep the run locked.

    Effects: not collective, rank zero only; any thread; blocks for at most `timeout_s`; leaves ``<run_dir>/run.lock``
    (0600), which names the holder.

    Attributes:
        works: whether the file system supports locks; without them no job is excluded.

    Raises:
        RunDirError: if another job holds the lock; names its host, process id, user and start time.
        OSError: if the file cannot be written.
    """

    def __init__(self, run_dir: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.works = True
        path = run_dir / FILE
        # Do not open a file that this process has locked: closing it again would release the lock.
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
        # Last: the error path above closes the file, which releases the lock.
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
        """Release the lock. Repeated calls have no effect."""
        if self._identity in _held_here:
            _held_here.discard(self._identity)
            os.close(self._file)


def is_held(run_dir: Path) -> bool | None:
    """Return whether any job holds the run's lock now; None if the file system has no locks.

    Effects: not collective; any thread; acquires the lock for a moment and releases it.
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
