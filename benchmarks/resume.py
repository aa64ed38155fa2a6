"""How long restoring a checkpoint takes: ours, torch DCP, and reading the same bytes, in turn within one run.

    python benchmarks/resume.py --json                        FSDP2, 2 ranks, 100 MB of weights with AdamW
    python benchmarks/resume.py --strategy zero3 --json
    python benchmarks/resume.py --strategy ddp --num_processes 4 --rounds 20

Each round runs every peer once with the files in the page cache (`warm`) and once without (`cold`). Measured on each
rank, and reported for the slowest:

    seconds      ours: from a model and an optimizer without state until all ranks have weights and moments and every
                 digest of the checkpoint is verified; allocation of the optimizer's state included
    read         `pread` of this rank's bytes to their destination: weights into existing memory, the optimizer's state
                 into new memory
    scan         the same bytes through one buffer of 8 MiB
    dcp          `torch.distributed.checkpoint.load` of the same state from its own checkpoint, without verification
    host memory  the rank's peak during ours, less the use before and less its own weights and moments
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, set_seed

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.restore.restore import restore_tensors
from harness.checkpoint.sharding.local_shards import innermost
from harness.checkpoint.state.trainer_state import Watched
from harness.config.schema import TrainerConfig
from harness.distributed.collectives import Collectives
from harness.distributed.strategies import start

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.checkpoint import WIDTH, Stack, _kilobytes, interval  # noqa: E402

CHUNK_BYTES = 8 << 20


def worker(arguments: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    accelerator = start(TrainerConfig(mixed_precision="fp32"), seed=0)
    set_seed(1)
    model: Any = Stack(arguments.size_mb)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = torch.utils.data.DataLoader(torch.randn(64, WIDTH), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    directory = Path(arguments.directory)
    checkpoint = CheckpointConfig(every_n_epochs=None, save_last=False, when_busy="wait")
    with PeriodicLogger(
        accelerator, None, run_dir=directory, run_name="ours", checkpoint=checkpoint, tracking=TrackingConfig(False)
    ) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(1):
            for batch in logger.batches(loader, 2):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            logger.save()
    path = directory / "ours" / "checkpoints" / "step-00000002"
    rank, world_size = accelerator.process_index, accelerator.num_processes
    collectives = Collectives(rank, world_size)
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    def forget() -> None:
        if not is_deepspeed:  # its states are made with the engine
            innermost(optimizer).state.clear()

    wanted: list[int] = []

    def ours() -> None:
        wanted[:] = [restore_tensors(accelerator, Watched(model, optimizer, None), path, collectives).wanted_bytes]

    kept = torch.empty(total_bytes(path), dtype=torch.uint8)
    kept.fill_(1)

    def read() -> None:
        read_into(lambda file, size: kept if file.name.startswith("model") else torch.empty(size, dtype=torch.uint8))

    def scan() -> None:
        read_into(lambda *_: kept[:CHUNK_BYTES])

    def read_into(memory_of: Callable[[Path, int], torch.Tensor]) -> None:
        left = wanted[0]
        for file in sorted(path.glob("*.safetensors")):
            descriptor = os.open(file, os.O_RDONLY)
            size = file.stat().st_size
            # This rank's part of the file, in one piece.
            first = size * rank // world_size if wanted[0] < total_bytes(path) else 0
            position, end = first, min(size, first + left)
            memory = memoryview(memory_of(file, end - first).numpy())  # type: ignore[arg-type]
            while position < end:
                at = (position - first) % len(memory)
                count = os.preadv(descriptor, [memory[at : at + min(CHUNK_BYTES, end - position)]], position)
                position += count
            left -= end - first
            os.close(descriptor)

    peers: dict[str, Callable[[], None]] = {"ours": ours, "read": read, "scan": scan}
    if not is_deepspeed and world_size > 1:
        peers["dcp"] = dcp(accelerator, model, optimizer, directory)
    forget()
    before = own_bytes()
    ours()
    memory = peak_bytes() - before
    results: dict[str, list[float]] = {f"{name}_{kind}": [] for name in peers for kind in ("warm", "cold")}
    order = random.Random(0)
    for round_number in range(arguments.rounds + 1):
        names = list(results)
        order.shuffle(names)
        for name in names:
            peer, kind = name.rsplit("_", 1)
            if peer == "ours":
                forget()
            if kind == "cold":
                drop(directory)
            barrier()
            begun_s = time.perf_counter()
            peers[peer]()
            barrier()
            if round_number:
                results[name].append(time.perf_counter() - begun_s)
    # The weights were there before; the moments are this rank's own.
    state = innermost(optimizer).state.values() if not is_deepspeed else ()
    local = [getattr(value, "_local_tensor", value) for kinds in state for value in kinds.values()]
    own = sum(value.nbytes for value in local if isinstance(value, torch.Tensor))
    record = {"seconds": results, "wanted_bytes": wanted[0], "memory_bytes": memory - own}
    gathered = collectives.all_gather("the results", record)
    if rank == 0:
        Path(arguments.output).write_text(json.dumps({"ranks": gathered, "bytes": total_bytes(path)}))


def total_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def drop(directory: Path) -> None:
    """Drop the files from the page cache."""
    barrier()
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def own_bytes() -> int:
    """Return this process's memory, and reset its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("/proc/self/status", "VmRSS:")


def peak_bytes() -> int:
    return _kilobytes("/proc/self/status", "VmHWM:")


def dcp(accelerator: Any, model: Any, optimizer: Any, directory: Path) -> Callable[[], None]:
    """DCP's own checkpoint of the same state, and its loading."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    path = directory / "dcp"
    weights, state = get_state_dict(model, innermost(optimizer))
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    descriptor = os.open(path, os.O_RDONLY)
    os.sync()
    os.close(descriptor)

    def load() -> None:
        weights, state = get_state_dict(model, innermost(optimizer))
        both: dict[str, Any] = {"model": weights, "optimizer": state}
        checkpoint.load(both, checkpoint_id=path)
        set_state_dict(model, innermost(optimizer), model_state_dict=both["model"], optim_state_dict=both["optimizer"])

    return load


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return the medians over the rounds, for the slowest rank."""
    ranks = record["ranks"]
    peers: dict[str, Any] = {}
    for name in ranks[0]["seconds"]:
        worst = [max(rank["seconds"][name][i] for rank in ranks) for i in range(len(ranks[0]["seconds"][name]))]
        peers[name] = {"ms": 1e3 * statistics.median(worst), "ms_95": [1e3 * bound for bound in interval(worst)]}
    for name, figures in peers.items():
        figures["over_read"] = figures["ms"] / peers[f"read_{name.rsplit('_', 1)[1]}"]["ms"]
    return {
        "bytes": record["bytes"],
        "wanted_bytes": [rank["wanted_bytes"] for rank in ranks],
        "memory_less_own_mib": [rank["memory_bytes"] / 2**20 for rank in ranks],
        "peers": peers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="how long restoring a checkpoint takes")
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--size_mb", type=int, default=100, help="of fp32 weights; with AdamW three times as much")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--directory", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.output is not None:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="harness-resume-", dir=os.environ.get("TMPDIR")) as directory:
        output = Path(directory) / "record.json"
        words = [sys.executable, "-m", "accelerate.commands.launch"]
        words += ["--config_file", str(ROOT / f"configs/accelerate/{arguments.strategy}.yaml")]
        words += ["--main_process_port", "0", "--num_processes", str(arguments.num_processes), __file__, *sys.argv[1:]]
        words += ["--directory", directory, "--output", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(words, check=True, env=environment, stdout=sys.stderr)
        record = json.loads(output.read_text())
    result = {
        "benchmark": "resume",
        "strategy": arguments.strategy,
        "num_processes": arguments.num_processes,
        "size_mb": arguments.size_mb,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **summary(record),
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for name, figures in result["peers"].items():
        print(f"{name:12} {figures['ms']:8.1f} ms  {figures['over_read']:.2f} x reading")


if __name__ == "__main__":
    main()
