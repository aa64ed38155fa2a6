"""`by_epoch`, whose ranks and launcher are killed within an epoch, behind a checkpoint that one rank has asked for.

It asks in the first epoch's last batch, where the ranks still vote at each step: the second epoch's first one saves.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from torch import nn

from tests.autologged import by_epoch

ASKS_AT, DIES_AT = 13, 23
ASKING_RANK = 1
LIMIT_S = 60
LAUNCHER = os.getppid()
loss_of = nn.functional.cross_entropy
num_batches = 0


def wait_for_checkpoint_within_epoch():
    deadline_s = time.monotonic() + LIMIT_S
    while not list(Path("runs").glob("*/checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline_s, f"there is no checkpoint of a step after {LIMIT_S} s"
        time.sleep(0.02)


def counted(*args, **kwargs):
    global num_batches
    num_batches += 1
    if num_batches == ASKS_AT and int(os.environ["RANK"]) == ASKING_RANK:
        os.kill(os.getpid(), signal.SIGUSR2)
    if num_batches == DIES_AT:
        wait_for_checkpoint_within_epoch()
        for pid in (LAUNCHER, os.getpid()):  # each by itself: a launcher asks what is left of them to stop
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return loss_of(*args, **kwargs)


nn.functional.cross_entropy = counted
by_epoch.main()
