"""Retry deliveries while the store is unreachable."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

from harness.tracking.mlflow.store_protocol import RefusedError, Store
from harness.tracking.publisher.progress import Heartbeat, log

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# How long an unreachable store is retried after the trainer has exited.
LINGER_S = 20.0


class Clock:
    """Monotonic time and pauses, in seconds. Tests replace it."""

    def now_s(self) -> float:
        """Return a time that never decreases."""
        return time.monotonic()

    def sleep(self, pause_s: float) -> None:
        """Pause the calling thread."""
        time.sleep(pause_s)


class Trainer(Protocol):
    """Shows whether the trainer is alive."""

    def has_exited(self) -> bool:
        """Whether the trainer has exited."""
        ...


class RetryPolicy:
    """Retries deliveries of the publisher and its artifact worker, with exponential backoff. Any thread."""

    def __init__(self, store: Store, trainer: Trainer, heartbeat: Heartbeat, clock: Clock) -> None:
        self._store = store
        self._trainer = trainer
        self._heartbeat = heartbeat
        self._clock = clock
        self._lock = threading.Lock()
        self._exited_since_s: float | None = None

    def is_permanent(self, error: Exception) -> bool:
        """Whether a retry is useless."""
        return isinstance(error, RefusedError) or self._store.is_permanent(error)

    def run(self, what: str, action: Callable[[], None], is_cancelled: Callable[[], bool] | None = None) -> bool:
        """Call `action`, named `what` in the log, until it succeeds; return False when it is given up.

        It is given up `LINGER_S` after the trainer's exit, or if `is_cancelled`, polled each second of a pause.

        Raises:
            Exception: a permanent error of the action.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                action()
                return True
            except Exception as error:
                if self.is_permanent(error):
                    raise
                log(f"cannot deliver yet: {what}: {error}")
                self._store.handle_transient_error(error)
                self._heartbeat.beat()
                if self._has_lingered():
                    return False
                # With jitter, so that jobs that lost the same server do not retry simultaneously.
                if not self._pause(random.uniform(0.5, 1.0) * pause_s, is_cancelled):
                    return False
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _pause(self, pause_s: float, is_cancelled: Callable[[], bool] | None) -> bool:
        if is_cancelled is None:
            self._clock.sleep(pause_s)
            return True
        while pause_s > 0 and not is_cancelled():
            self._clock.sleep(min(pause_s, 1.0))
            pause_s -= 1.0
        return not is_cancelled()

    def _has_lingered(self) -> bool:
        with self._lock:
            if not self._trainer.has_exited():
                return False
            now_s = self._clock.now_s()
            if self._exited_since_s is None:
                self._exited_since_s = now_s
            return now_s - self._exited_since_s > LINGER_S
