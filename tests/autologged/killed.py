"""`by_epoch`, which asks for a checkpoint within its second epoch, and is killed when that is there: all of it."""

import os
import signal
import time
from pathlib import Path

from torch import nn

from tests.autologged import by_epoch

ASKS_AT, DIES_AT = 15, 23
loss_of = nn.functional.cross_entropy
num_batches = 0


def checkpoints_within_epochs():
    return [path for path in Path("runs").glob("*/checkpoints/step-*") if (path / "manifest.json").exists()]


def counted(*args, **kwargs):
    global num_batches
    num_batches += 1
    if num_batches == ASKS_AT:
        os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.06)  # the ranks ask each other each tenth of a second, and so after each step of two batches
    if num_batches == DIES_AT:
        deadline_s = time.monotonic() + 60
        while not checkpoints_within_epochs() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        os.killpg(0, signal.SIGKILL)
    return loss_of(*args, **kwargs)


nn.functional.cross_entropy = counted
by_epoch.main()
