"""A rank that dies on one node, so that the agent of another starts its own ranks again without counting it.

torchrun ... -m tests.distributed.meeting_again DIRECTORY
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from harness.config.schema import TrainerConfig
from harness.distributed.failure_monitor import FailureMonitor
from harness.distributed.meeting import latest_meeting
from harness.distributed.strategies import start


def main() -> None:
    directory = Path(sys.argv[1])
    start(TrainerConfig(), seed=0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    peers = FailureMonitor(rank, world_size, lambda failure: None)
    total = torch.ones(())
    dist.all_reduce(total)
    dist.all_reduce(torch.ones(()), group=dist.new_group(backend="gloo"))
    meeting = latest_meeting()
    assert meeting is not None
    if not meeting.is_restart:
        if os.environ["DIES"] == "yes":
            # What is left at the store must not end the ranks of the next start.
            peers.report(RuntimeError("as it was told"))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)
    for _ in range(30):
        peers.check()
        time.sleep(0.05)
    peers.close()
    record = {"total": total.item(), "count": os.environ["TORCHELASTIC_RESTART_COUNT"], "name": meeting.name}
    (directory / f"rank-{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
