"""Trying until it works: how long to wait in between, and when to leave it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# Once the trainer is gone, how long a store that is away is waited for.
LINGER_S = 20.0


class Retries:
    """What the publisher's two lanes share of waiting for a store that is away.

    Args:
        is_permanent: whether an error of the store means no for good.
        trainer_is_gone: asked between tries.
        told: told of what is tried again, and why.
        sleep: how to pause, in seconds.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        is_permanent: Callable[[Exception], bool],
        trainer_is_gone: Callable[[], bool],
        told: Callable[[str, Exception], None],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_permanent = is_permanent
        self._trainer_is_gone = trainer_is_gone
        self._told = told
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._gone_since_s: float | None = None

    def until_done(self, what: str, action: Callable[[], None], is_over: Callable[[], bool] | None = None) -> bool:
        """Do it until it works; False: given up, as the trainer is gone and the store stayed away.

        Args:
            what: names it in the log.
            action: raises an error where it did not work.
            is_over: whether nobody waits for it any more, asked each second; None: somebody does.

        Raises:
            Exception: what the store says no to for good.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                action()
                return True
            except Exception as error:
                if self.is_permanent(error):
                    raise
                self._told(what, error)
                if self._has_lingered():
                    return False
                # With jitter: many jobs that lost one server shall not come back in step.
                if not self._has_paused(random.uniform(0.5, 1.0) * pause_s, is_over):
                    return False
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _has_paused(self, left_s: float, is_over: Callable[[], bool] | None) -> bool:
        if is_over is None:
            self._sleep(left_s)
            return True
        while left_s > 0 and not is_over():
            self._sleep(min(left_s, 1.0))
            left_s -= 1.0
        return not is_over()

    def _has_lingered(self) -> bool:
        with self._lock:
            if not self._trainer_is_gone():
                return False
            now_s = self._clock()
            if self._gone_since_s is None:
                self._gone_since_s = now_s
            return now_s - self._gone_since_s > LINGER_S
