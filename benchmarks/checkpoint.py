"""What a checkpoint costs the training: ours, its peers and the limits, in turn within one run.

    python benchmarks/checkpoint.py --json                        FSDP2, 2 ranks, 100 MB of weights
    python benchmarks/checkpoint.py --strategy zero3 --json
    python benchmarks/checkpoint.py --strategy ddp --num_processes 4 --peers ours memcpy --rounds 20

Each round has one window of a few training steps for each peer, in a changing order, and one without a save. A
window starts with the save. Measured on each rank, and reported for the worst one:

    blocked_s    time of the trainer's thread: the call, and for ours the wait at the fence before the next step
    added_s      the window's time less that of the window without a save in the same round
    durable_s    from the call until all bytes are on disk (for the gathered peers: uploaded)
    in flight    the 99th percentile of steps that started before the save was durable, over the median step of windows
                 without a save; beside it the same of all steps without a save: the noise
    host memory  ours: the rank's peak during the save, less its use before, and the writer process's own

The writes are awaited between windows, outside of the measured time. `memcpy` is a blocking copy of the rank's share
into existing memory; `pwrite` writes and syncs it, from all ranks at once. A process trains on one core, so on two
cores one process leaves a core free and two leave none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.save.plan import Plan
from harness.config.schema import TrainerConfig
from harness.distributed.strategies import start

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1024


class Layer(nn.Module):
    """4 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Stack(nn.Module):
    """Return a model of about the given size."""

    _no_split_modules = ("Layer",)

    def __init__(self, size_mb: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(max(1, size_mb * 10**6 // (4 * WIDTH * WIDTH)))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Peer:
    """One way to save. `save` is measured; `finish` waits until it is durable."""

    def save(self, directory: Path) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until the save is durable."""

    def fence_s(self) -> float:
        """Return the trainer thread's time for the save after `save` returned, so far."""
        return 0.0

    def durable_s(self, begun_s: float) -> float:
        return time.perf_counter() - begun_s


class Ours(Peer):
    def __init__(self, logger: PeriodicLogger) -> None:
        self.logger = logger
        self.saver = logger._checkpoints.saver
        self.number = 0

    def save(self, directory: Path) -> None:
        self.number += 1
        self.logger._checkpoints._saved_at = None
        self.logger._checkpoints.save(f"step-{self.number:08d}")

    def finish(self) -> None:
        self.logger._checkpoints.resolve()
        self.saver.wait()
        self.saver._record_fence()
        self.seconds = dict(self.saver.last_seconds)
        dist_barrier()
        if self.logger.accelerator.is_main_process:
            assert self.saver.last_error is None, self.saver.last_error
            shutil.rmtree(self.logger.run_path / "checkpoints" / f"step-{self.number:08d}")  # type: ignore[operator]

    def fence_s(self) -> float:
        return self.saver._fence.waited_s

    def durable_s(self, begun_s: float) -> float:
        return self.seconds.get("durable_s", 0.0)


def dist_barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class WriterThread:
    """The writer's work in a thread of the trainer, to compare with the writer process."""

    def __init__(self, memory: Any, layout: Any, ranges: Any, *, makes_files: bool) -> None:
        import mmap

        from harness.checkpoint.save.writer import RangeWriter
        from harness.checkpoint.save.writer_client import output_files

        mapped = memoryview(mmap.mmap(memory.descriptor, memory.size_bytes, prot=mmap.PROT_READ))
        self.writer = RangeWriter(mapped, output_files(layout, with_headers=makes_files), ranges)
        self.marks: SimpleQueue[int] = SimpleQueue()
        self.thread = ThreadPoolExecutor(1)

    def start(self) -> None:
        """Start nothing."""

    def request(self, directory: Path | None, ready_bytes: int) -> None:
        self.marks = SimpleQueue()
        self.answers = self.thread.submit(self.writer.write, directory, iter(self.marks.get, None))

    def report_ready(self, num_bytes: int) -> None:
        self.marks.put(num_bytes)

    def await_digests(self, timeout_s: float) -> tuple[list[str], dict[str, float]]:

        record = self.answers.result(timeout_s)
        return bytes.fromhex(record["digests"]), {key: record[key] for key in ("write_s", "sync_s")}

    def close(self) -> None:
        self.thread.shutdown()


class Memcpy(Peer):
    """The limit: a blocking copy of this rank's share."""

    def __init__(self, share: list[Tensor]) -> None:
        self.share = share
        self.target = [torch.zeros_like(part) for part in share]

    def save(self, directory: Path) -> None:
        torch._foreach_copy_(self.target, self.share)


class Pwrite(Peer):
    """The limit: this rank's share written to its own file without a copy."""

    def __init__(self, share: list[Tensor]) -> None:
        self.share = share

    def save(self, directory: Path) -> None:
        descriptor = os.open(directory / f"{os.environ.get('RANK', '0')}.bin", os.O_WRONLY | os.O_CREAT)
        for part in self.share:
            os.write(descriptor, memoryview(part.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        os.fsync(descriptor)
        os.close(descriptor)


class Dcp(Peer):
    """`torch.distributed.checkpoint.async_save`, on its own process group."""

    def __init__(self, model: nn.Module, optimizer: Any, kind: str) -> None:
        self.model, self.optimizer, self.kind = model, optimizer, kind
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.future: Any = None

    def save(self, directory: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        weights, moments = get_state_dict(self.model, inner)
        arguments: dict[str, Any] = {"process_group": self.group}
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        if self.kind == "safetensors":
            state = dict(weights)
            for name, values in moments["state"].items():
                state |= {f"{kind}.{name}": value for kind, value in values.items() if value.ndim}
            arguments["storage_writer"] = dcp.HuggingFaceStorageWriter(
                str(directory), save_distributed=True, enable_consolidation=True
            )
        else:
            arguments["checkpoint_id"] = str(directory)
        if self.kind == "process":
            arguments["async_checkpointer_type"] = AsyncCheckpointerType.PROCESS
        self.future = dcp.async_save(state, **arguments)

    def finish(self) -> None:
        getattr(self.future, "upload_completion", self.future).result()


class TorchCheckpointing(Peer):
    """`torch_checkpointing` with its defaults: staged in a thread, written by a process, each rank its own file.

    What it stages must not change meanwhile, which it leaves to the caller: so the next step waits for it.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        from torch_checkpointing.builder import make_async_checkpoint_saver
        from torch_checkpointing.checkpoint_base import CheckpointBase, CheckpointItem
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        class State(CheckpointBase):
            def get_items(self) -> dict[str, Any]:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                return {name: CheckpointItem(value=value) for name, value in state.items()}

            def load_state_dict(self, state_dict: Any) -> None:
                raise NotImplementedError

        self.state = State()
        # Its default, O_DIRECT through a buffered file, fails on ext4 with EINVAL.
        self.saver = make_async_checkpoint_saver(storage_config=LocalFileSystemStorageConfig(use_direct_io=False))
        self.staged: Any = None
        self.written: Any = None
        self.waited_s = 0.0
        register_optimizer_step_pre_hook(lambda *_: self._wait())

    def save(self, directory: Path) -> None:
        self.waited_s = 0.0
        self.staged, self.written = self.saver.save(str(directory), self.state)

    def _wait(self) -> None:
        if self.staged is not None:
            begun_s = time.perf_counter()
            self.staged.result()
            self.staged = None
            self.waited_s = time.perf_counter() - begun_s

    def fence_s(self) -> float:
        return self.waited_s

    def finish(self) -> None:
        self.written.result()


class Gathered(Peer):
    """The usual: gather on rank zero, save, upload, in the loop."""

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Any, kind: str, run_id: str, uri: str) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.kind, self.run_id, self.uri = kind, run_id, uri

    def save(self, directory: Path) -> None:
        sys.path.insert(0, str(ROOT))
        from tests.distributed.gathered import gather_state

        state = gather_state(self.accelerator, self.model, self.optimizer)
        if not self.accelerator.is_main_process:
            return
        tensors = state.model | state.optimizer
        path = directory / f"model.{'pt' if self.kind == 'torch_save' else 'safetensors'}"
        if self.kind == "torch_save":
            torch.save(tensors, path)
        else:
            from safetensors.torch import save_file

            save_file(tensors, path)
        from mlflow import MlflowClient

        MlflowClient(self.uri).log_artifact(self.run_id, str(path))


PEERS = ("none", "ours", "memcpy", "pwrite", "dcp_thread", "dcp_process", "dcp_safetensors", "save_file", "torch_save")
# Installed by hand, where it is to be compared with: pip install --no-deps torch_checkpointing
OPTIONAL_PEERS = ("torch_checkpointing",)


def worker(arguments: argparse.Namespace) -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    if arguments.writer == "thread":
        from harness.checkpoint.save import pipeline as pipeline_module

        pipeline_module.WriterProcess = WriterThread  # type: ignore[assignment, misc]
    accelerator = start(TrainerConfig(), seed=0)
    set_seed(0)
    model: Any = Stack(arguments.size_mb)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(torch.randn(4096, WIDTH), batch_size=arguments.batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    directory = Path(arguments.directory)
    checkpoint = CheckpointConfig(every_n_epochs=None, save_last=False, when_busy="wait", transport=arguments.transport)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.peers}
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        begun_s = time.perf_counter()
        accelerator.backward(model(next(batches)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun_s

    for _ in range(3):
        step()
    with PeriodicLogger(
        accelerator,
        None,
        run_dir=directory,
        run_name="ours",
        checkpoint=checkpoint,
        tracking=TrackingConfig(enabled=False),
    ) as logger:
        logger.watch(model, optimizer)
        without_bytes = _peak_bytes(lambda: [step() for _ in range(3)])
        logger._checkpoints.saver.prepare()
        step()
        ours = Ours(logger)
        first = [_window("ours", ours, step, arguments.steps, directory / "ours-first")]
        with_bytes = _peak_bytes(
            lambda: [_window("ours", ours, step, arguments.steps, directory / "ours-warm") for _ in range(2)]
        )
        memory = {"bytes": with_bytes - without_bytes + _writer_bytes(logger)}
        peers = _make_peers(arguments, accelerator, model, optimizer, logger, directory)
        peers["ours"] = ours
        pipeline = logger._checkpoints.saver._pipeline
        assert pipeline is not None
        share_bytes = pipeline.plan.staging_bytes
        memory["share_bytes"] = share_bytes
        order = random.Random(0)
        for round_number in range(arguments.rounds + 1):  # the first is to warm the peers up
            names = list(arguments.peers)
            order.shuffle(names)
            for name in names:
                found = _window(name, peers.get(name), step, arguments.steps, directory / f"{name}-{round_number}")
                if round_number:
                    results[name].append(found)
        mode = pipeline.mode.mode
    gathered: list[Any] = [None] * accelerator.num_processes
    if dist.is_initialized():
        dist.all_gather_object(gathered, {"windows": results, "first": first, "memory": memory})
    else:
        gathered = [{"windows": results, "first": first, "memory": memory}]
    if accelerator.is_main_process:
        record = {
            "share_bytes": share_bytes,
            "mode": mode,
            "transport": logger._checkpoints.saver._runner.context.transport,
            "logical_bytes": pipeline.plan.layout.size_bytes,
            "written_bytes": _written_bytes(pipeline.plan, accelerator.num_processes),
            "ranks": gathered,
        }
        Path(arguments.output).write_text(json.dumps(record))


def _written_bytes(plan: Plan, num_processes: int) -> int:
    assert plan.all_ranges is not None
    written = sum(part.size for rank in range(num_processes) for part in plan.all_ranges.of_rank(rank))
    return written + sum(len(file.header) for file in plan.layout.files)


def _window(name: str, peer: Peer | None, step: Callable[[], float], num_steps: int, directory: Path) -> dict[str, Any]:
    """Run one window: a save and some steps; then wait, unmeasured, until the save is durable."""
    if dist.is_initialized():
        dist.barrier()
    directory.mkdir(parents=True, exist_ok=True)
    dist_barrier()
    begun_s = time.perf_counter()
    if peer is not None:
        peer.save(directory)
    call_s = time.perf_counter() - begun_s
    starts_s, steps_s = [], []
    for _ in range(num_steps):
        starts_s.append(time.perf_counter() - begun_s)
        steps_s.append(step())
    wall_s = time.perf_counter() - begun_s
    fence_s = 0.0 if peer is None else peer.fence_s()
    if peer is not None:
        peer.finish()
    durable_s = call_s if type(peer) in (Memcpy, Pwrite, Gathered) else 0.0 if peer is None else peer.durable_s(begun_s)
    dist_barrier()
    shutil.rmtree(directory, ignore_errors=True)
    return {
        "blocked_s": call_s + fence_s,
        "call_s": call_s,
        "fence_s": fence_s,
        "wall_s": wall_s,
        "durable_s": durable_s,
        "steps_s": steps_s,
        "in_flight_s": [step_s for start_s, step_s in zip(starts_s, steps_s, strict=True) if start_s < durable_s],
    }


def _make_peers(
    arguments: argparse.Namespace, accelerator: Any, model: Any, optimizer: Any, logger: PeriodicLogger, directory: Path
) -> dict[str, Peer]:
    peers: dict[str, Peer] = {"ours": Ours(logger)}
    saver = logger._checkpoints.saver
    if saver._pipeline is None:
        saver.prepare()
    pipeline = saver._pipeline
    assert pipeline is not None
    share: list[Tensor] = []
    for piece in pipeline.plan.pieces:
        value = pipeline.shards.tensors[piece.source].live()
        if isinstance(value, Tensor):
            share.append(value.detach().reshape(-1)[piece.local : piece.local + piece.num_items])
    for name in arguments.peers:
        if name in ("memcpy", "pwrite"):
            peers[name] = Memcpy(share) if name == "memcpy" else Pwrite(share)
        elif name.startswith("dcp_"):
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise SystemExit(f"{name}: torch DCP does not know DeepSpeed's shards; leave it out with --peers")
            peers[name] = Dcp(model, optimizer, name.removeprefix("dcp_"))
        elif name == "torch_checkpointing":
            peers[name] = TorchCheckpointing(model, optimizer)
        elif name in ("save_file", "torch_save"):
            run_id, uri = "", f"sqlite:///{directory}/peers.db"
            if accelerator.is_main_process:
                from mlflow import MlflowClient

                client = MlflowClient(uri)
                experiment = client.create_experiment(name, artifact_location=str(directory / "artifacts"))
                run_id = client.create_run(experiment).info.run_id
            peers[name] = Gathered(accelerator, model, optimizer, name, run_id, uri)
    return peers


def _peak_bytes(run: Callable[[], Any]) -> int:
    """Return this process's peak memory during a call, shared memory included."""
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return _kilobytes("/proc/self/status", "VmHWM:")


def _writer_bytes(logger: PeriodicLogger) -> int:
    """Return the writer process's private memory."""
    pipeline = logger._checkpoints.saver._pipeline
    process = None if pipeline is None else getattr(pipeline.writer, "_process", None)
    if process is None:
        return 0
    rollup = f"/proc/{process.pid}/smaps_rollup"
    return _kilobytes(rollup, "Private_Clean:") + _kilobytes(rollup, "Private_Dirty:")


def _kilobytes(file: str, label: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(label))
    return 1024 * int(line.split()[1])


# ------------------------------------------------------------------------------------------ the figures


def percentile(values: list[float], part: float) -> float:
    """Return a quantile by the nearest-rank method."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return for each peer the medians over the rounds, for the worst rank."""
    ranks = [rank["windows"] for rank in record["ranks"]]
    names = list(ranks[0])
    without = [max(rank["none"][i]["wall_s"] for rank in ranks) for i in range(len(ranks[0]["none"]))]
    base = statistics.median(without)
    quiet_s = [step_s for rank in ranks for window in rank["none"] for step_s in window["steps_s"]]
    p50 = statistics.median(quiet_s)
    peers = {}
    for name in names:
        windows = [[rank[name][i] for rank in ranks] for i in range(len(ranks[0][name]))]
        worst = {
            key: [max(rank[key] for rank in window) for window in windows]
            for key, value in windows[0][0].items()
            if isinstance(value, float)
        }
        in_flight_s = [step_s for window in windows for rank in window for step_s in rank["in_flight_s"]]
        # Against the window without a save of the same round: the machine's pace changes from round to round.
        added = [wall - other for wall, other in zip(worst["wall_s"], without, strict=False)]
        peers[name] = {
            "saves": len(windows),
            "blocked_ms": 1e3 * statistics.median(worst["blocked_s"]),
            "blocked_ms_95": [1e3 * bound for bound in interval(worst["blocked_s"])],
            "added_ms": 1e3 * statistics.median(added),
            "added_ms_95": [1e3 * bound for bound in interval(added)],
            "call_ms": 1e3 * statistics.median(worst["call_s"]),
            "fence_ms": 1e3 * statistics.median(worst["fence_s"]),
            "durable_ms": 1e3 * statistics.median(worst["durable_s"]),
            "steps_in_flight": len(in_flight_s),
            "in_flight_p99_over_p50": percentile(in_flight_s, 0.99) / p50 if in_flight_s else None,
        }
    peers["none"]["p99_over_p50"] = percentile(quiet_s, 0.99) / p50
    if "ours" in peers:
        first_ms = 1e3 * max(rank["first"][0]["blocked_s"] for rank in record["ranks"])
        peers["ours"] |= {
            "first_blocked_ms": first_ms,
            "first_over_later": first_ms / peers["ours"]["blocked_ms"],
            "host_memory_over_share": [
                rank["memory"]["bytes"] / rank["memory"]["share_bytes"] for rank in record["ranks"]
            ],
            "host_memory_less_share_mib": [
                (rank["memory"]["bytes"] - 1.1 * rank["memory"]["share_bytes"]) / 2**20 for rank in record["ranks"]
            ],
        }
    memcpy = peers["memcpy"]["blocked_ms"] if "memcpy" in peers else float("nan")
    for figures in peers.values():
        figures["blocked_over_memcpy"] = figures["blocked_ms"] / memcpy
        figures["added_over_memcpy"] = figures["added_ms"] / memcpy
        if "pwrite" in peers:
            figures["added_over_memcpy_and_pwrite"] = figures["added_ms"] / (memcpy + peers["pwrite"]["durable_ms"])
            figures["durable_over_pwrite"] = figures["durable_ms"] / peers["pwrite"]["durable_ms"]
    return {
        "window_without_save_ms": 1e3 * base,
        "step_p50_ms": 1e3 * p50,
        **{key: value for key, value in record.items() if key != "ranks"},
        "peers": peers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="what a checkpoint costs the training")
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--size_mb", type=int, default=100, help="of fp32 weights; with AdamW three times as much")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="of each window")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--writer", choices=["process", "thread"], default="process", help="of ours")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS + OPTIONAL_PEERS, default=None, help="default: all that know the strategy"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--directory", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = [name for name in PEERS if not (arguments.strategy.startswith("zero") and name.startswith("dcp"))]
    arguments.peers = arguments.peers or known
    if "none" not in arguments.peers:
        arguments.peers.insert(0, "none")
    if arguments.output is not None:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="harness-checkpoint-") as directory:
        output = Path(directory) / "record.json"
        words = [sys.executable, "-m", "accelerate.commands.launch"]
        words += [
            "--config_file",
            str(ROOT / f"configs/accelerate/{arguments.strategy}.yaml"),
            "--main_process_port",
            "0",
        ]
        words += ["--num_processes", str(arguments.num_processes), __file__, *sys.argv[1:]]
        words += ["--directory", directory, "--output", str(output)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        subprocess.run(words, check=True, env=environment, stdout=sys.stderr)
        record = json.loads(output.read_text())
    result = {
        "benchmark": "checkpoint",
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
    print(f"{arguments.strategy} x {arguments.num_processes}, window {result['window_without_save_ms']:.0f} ms")
    for name, figures in result["peers"].items():
        print(
            f"{name:16} blocked {figures['blocked_ms']:8.2f} ms  added {figures['added_ms']:8.1f} ms "
            f"({figures['added_ms_95'][0]:.0f} to {figures['added_ms_95'][1]:.0f})  "
            f"durable {figures['durable_ms']:8.0f} ms"
        )


if __name__ == "__main__":
    main()
