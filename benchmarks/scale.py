"""What a checkpoint of a 70 B-parameter model costs rank zero, by the number of ranks: no tensor data is moved.

    python benchmarks/scale.py --json

A Llama of 70 B parameters under FSDP2 with AdamW: 723 tensors with two moments and a step count each. A rank consists
of the messages that it sends; the code is that of a real save. Measured on rank zero for each number of ranks:

    describe      describe and pack this rank's shards
    plan          unpack all ranks' shards, find this rank's ranges, and check that each byte has one owner
    table         merge the ranges of all ranks, in the order of the files
    acks          from the time at which ranks may acknowledge their part until rank zero has parsed all
                  acknowledgements: a real TCPStore, with the ranks in four other processes of 16 connections each
    manifest      the records of the files, and the text of the manifest with its checksum
    read          parse and validate that text
    gather        find the position in the files of each chunk that rank zero would receive

`memory` is the growth of this process's peak. The 847 GB of tensors do not exist.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.checkpoint.format.all_ranges import pack_ranges  # noqa: E402
from harness.checkpoint.format.commit import Manifest, commit, read_manifest  # noqa: E402
from harness.checkpoint.format.layout import TensorSpec, plan_layout  # noqa: E402
from harness.checkpoint.format.tensor_shard import ElementRange  # noqa: E402
from harness.checkpoint.save.commit_store import CommitStore  # noqa: E402
from harness.checkpoint.save.plan import Plan, _stage, assign, hash_of, plan_of, with_all_ranges  # noqa: E402
from harness.checkpoint.save.save_runner import RankRecord  # noqa: E402
from harness.checkpoint.save.transport import _chunks, places  # noqa: E402
from harness.checkpoint.sharding.shard_catalog import ShardCatalog, kinds_of, sharing_of  # noqa: E402
from harness.checkpoint.state.rank_state import RankState  # noqa: E402
from harness.data import rng_state  # noqa: E402

T = TypeVar("T")

HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, LAYERS = 8192, 28672, 1024, 128256, 80
NUM_PROCESSES = 4
# Of each of them: of a thousand to one store on this one machine, half were made and the others waited.
NUM_CONNECTIONS = 16


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of Llama 70 B, by transformers' names."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": (KEYS, HIDDEN),
            f"{at}self_attn.v_proj.weight": (KEYS, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def specifications() -> list[TensorSpec]:
    found = [TensorSpec("model", name, "F32", shape) for name, shape in shapes().items()]
    for name, shape in shapes().items():
        found.append(TensorSpec("optimizer", f"step.{name}", "F32", ()))
        found += [TensorSpec("optimizer", f"{kind}.{name}", "F32", shape) for kind in ("exp_avg", "exp_avg_sq")]
    return found


def held(spec: TensorSpec, world_size: int, rank: int) -> tuple[ElementRange, ...]:
    """Return FSDP2's row shards; the step counts are on every rank."""
    if not spec.shape:
        return (ElementRange(0, 0, 1),)
    rows = -(-spec.shape[0] // world_size)
    first, last = (min(each * rows, spec.shape[0]) for each in (rank, rank + 1))
    inner = spec.num_items // spec.shape[0]
    return (ElementRange(first * inner, 0, (last - first) * inner),) if first < last else ()


def timed(seconds: dict[str, list[float]], name: str, run: Callable[[], T]) -> T:
    begun_s = time.perf_counter()
    found = run()
    seconds.setdefault(name, []).append(time.perf_counter() - begun_s)
    return found


def acknowledge(port: int, world_size: int, which: list[tuple[int, int]], rounds: int) -> None:
    """Run several ranks in one process, which acknowledge at once."""
    state = RankState(rng_state.capture(torch.device("cpu"))).encoded()
    records = {rank: RankRecord({"rank_state": state}, random.randbytes(16 * num)).encoded() for rank, num in which}
    stores = [TCPStore("127.0.0.1", port, is_master=False) for _ in range(NUM_CONNECTIONS)]
    boards = {
        rank: CommitStore(rank, world_size, stores[rank // NUM_PROCESSES % len(stores)], "scale") for rank, _ in which
    }
    control = TCPStore("127.0.0.1", port, is_master=False)
    for save in range(rounds):
        control.add(f"there/{save}", 1)
        control.wait([f"go/{save}"])
        with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
            list(threads.map(lambda rank: boards[rank].publish_record(save, records[rank]), boards))  # noqa: B023


def acknowledgements(seconds: dict[str, list[float]], plan: Plan, world_size: int, rounds: int) -> list[RankRecord]:
    """Measure the acknowledgements through a real store, with all other ranks in other processes."""
    assert plan.all_ranges is not None
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    board = CommitStore(0, world_size, TCPStore("127.0.0.1", store.port, is_master=False), "scale")
    nums = [len(plan.all_ranges.of_rank(rank)) for rank in range(world_size)]
    context = multiprocessing.get_context("spawn")
    processes = []
    for number in range(NUM_PROCESSES):
        which = [(rank, nums[rank]) for rank in range(1 + number, world_size, NUM_PROCESSES)]
        processes.append(context.Process(target=acknowledge, args=(store.port, world_size, which, rounds)))
        processes[-1].start()
    state = RankState(rng_state.capture(torch.device("cpu"))).encoded()
    own = RankRecord({"rank_state": state}, random.randbytes(16 * nums[0])).encoded()

    def collect() -> list[RankRecord]:
        store.set(f"go/{save}", "")
        board.publish_record(save, own)
        return [RankRecord.decoded(data) for data in board.collect_records(save, 120.0)]

    for save in range(rounds):
        while store.add(f"there/{save}", 0) < NUM_PROCESSES:
            time.sleep(0.01)
        told = timed(seconds, "acks", collect)
    for process in processes:
        process.join()
    return told


def places_of_all(plan: Plan, world_size: int) -> int:
    assert plan.all_ranges is not None
    found = 0
    for rank in range(1, world_size):
        ranges = plan.all_ranges.of_rank(rank)
        for begin, end in _chunks(plan.all_ranges.staging_bytes[rank]):
            found += sum(1 for _ in places(ranges, begin, end))
    return found


def measure(world_size: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Measure one number of ranks, in a process of its own."""
    specs = specifications()
    structure = hash_of(specs, {})
    # What the others do, each on its own node.
    described = [
        ShardCatalog.of(structure, [held(spec, world_size, rank) for spec in specs]).packed()
        for rank in range(world_size)
    ]
    told = told_by_all(specs, described)
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        mine = timed(
            seconds,
            "describe",
            lambda: ShardCatalog.of(structure, [held(spec, world_size, 0) for spec in specs]).packed(),
        )
        assert mine == described[0]
        plan = timed(
            seconds,
            "plan",
            lambda: plan_of(specs, {}, [ShardCatalog.unpacked(part) for part in described], 0, None),
        )
        assert pack_ranges(plan.staging_bytes, plan.ranges) == told[0]
        plan = timed(seconds, "table", lambda: with_all_ranges(plan, told))  # noqa: B023
    answers = acknowledgements(seconds, plan, world_size, rounds)
    for number in range(rounds):
        temporary, final = directory / f"tmp-{world_size}-{number}", directory / f"{world_size}-{number}"
        temporary.mkdir()
        assert plan.all_ranges is not None
        everything = plan.all_ranges

        def write() -> None:
            files = everything.records([each.digests for each in answers])  # noqa: B023
            commit(temporary, final, Manifest("key", 0, 0, 0, {}, tuple(files), {}, {}))  # noqa: B023

        timed(seconds, "manifest", write)
        manifest = timed(seconds, "read", lambda: read_manifest(final))  # noqa: B023
        timed(seconds, "gather", lambda: places_of_all(plan, world_size))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before
    return {
        "num_ranks": world_size,
        "num_ranges": sum(len(file.ranges) for file in manifest.files),
        "exchanged_bytes": sum(map(len, described)),
        "told_bytes": sum(map(len, told)),
        "ack_bytes": sum(len(each.encoded()) for each in answers),
        "manifest_bytes": (final / "manifest.json").stat().st_size,
        "memory_mib": memory / 1024,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_max": {name: max(values) for name, values in seconds.items()},
    }


def told_by_all(specs: list[TensorSpec], described: list[bytes]) -> list[bytes]:
    """Compute each rank's message one after another; results that are equal on all ranks are computed once."""
    holdings = [ShardCatalog.unpacked(part) for part in described]
    layout = plan_layout(specs, {})
    kinds = kinds_of(specs, holdings)
    sharing = sharing_of(kinds)
    told = []
    for rank, mine in enumerate(holdings):
        _, ranges, size_bytes = _stage(specs, layout, assign(specs, mine, kinds, sharing, rank))
        told.append(pack_ranges(size_bytes, ranges))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description="what a checkpoint costs rank zero, by the number of ranks")
    parser.add_argument("--num_ranks", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory(prefix="harness-scale-") as directory:
            print(json.dumps(measure(arguments.num_ranks[0], arguments.rounds, Path(directory))))
        return
    found = []
    for num_ranks in arguments.num_ranks:
        # A process of its own for each, so that the peak of memory is its own.
        words = [sys.executable, __file__, "--one", "--rounds", str(arguments.rounds), "--num_ranks", str(num_ranks)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        found.append(json.loads(done.stdout))
    result = {
        "benchmark": "scale",
        "model": "70 B parameters, fp32, AdamW, FSDP2",
        "num_tensors": len(specifications()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "ranks": found,
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for each in found:
        seconds = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in each["seconds"].items())
        print(f"{each['num_ranks']:5} ranks, ms: {seconds}; {each['memory_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
