"""Ranks of two nodes; one dies, so that the other node's agent restarts its ranks without counting a restart.

torchrun ... -m tests.distributed.restarting_ranks DIRECTORY
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
from harness.distributed.launch_identity import latest_rendezvous
from harness.distributed.strategies import start


def main() -> None:
    directory = Path(sys.argv[1])
    start(TrainerConfig(), seed=0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    monitor = FailureMonitor(rank, world_size)
    total = torch.ones(())
    dist.all_reduce(total)
    dist.all_reduce(torch.ones(()), group=dist.new_group(backend="gloo"))
    rendezvous = latest_rendezvous()
    assert rendezvous is not None
    if not rendezvous.is_restart:
        if os.environ["DIES"] == "yes":
            # This report stays in the store and must not end the ranks of the next start.
            monitor.report(RuntimeError("as configured"))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)
    for _ in range(30):
        monitor.check()
        time.sleep(0.05)
    monitor.close()
    record = {"total": total.item(), "count": os.environ["TORCHELASTIC_RESTART_COUNT"], "name": rendezvous.name}
    (directory / f"rank-{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
