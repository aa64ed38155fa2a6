from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import settings
from torch import Tensor

from harness.checkpoint.format.all_ranges import AllRanges, pack_ranges
from harness.checkpoint.format.commit import Manifest, commit, temporary_of
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.tensor_shard import DTYPE_NAMES, full_range
from harness.checkpoint.save.plan import hash_of, plan_of
from harness.checkpoint.save.writer import RangeWriter
from harness.checkpoint.save.writer_client import output_files, write_json
from harness.checkpoint.sharding.shard_catalog import ShardCatalog

# One profile for all: the time of an example says nothing on a machine that other jobs share.
settings.register_profile("unit", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("unit")

torch.set_num_threads(1)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """A real Accelerator of one process, on the CPU."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A committed checkpoint of given tensors, each of which all ranks hold, so that they divide its bytes."""

    def make(
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor] | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        num_ranks: int = 1,
        max_shard_size_bytes: int | None = None,
        name: str = "epoch-0001",
    ) -> Path:
        tensors = [*model.values(), *(optimizer or {}).values()]
        specs = [TensorSpec("model", key, DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in model.items()]
        specs += [
            TensorSpec("optimizer", key, DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in (optimizer or {}).items()
        ]
        holdings = [ShardCatalog.of(hash_of(specs, aliases or {}), [full_range(t) for t in tensors])] * num_ranks
        final = tmp_path / "checkpoints" / name
        temporary = temporary_of(final, "test")
        temporary.mkdir(parents=True)
        digests, told = [], []
        for rank in range(num_ranks):
            plan = plan_of(specs, aliases or {}, holdings, rank, max_shard_size_bytes)
            memory = bytearray(plan.staging_bytes)
            for piece in plan.pieces:
                item = specs[piece.source].item_bytes
                data = tensors[piece.source].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                part = data[piece.local * item : (piece.local + piece.num_items) * item]
                memory[piece.staging : piece.staging + len(part)] = part
            files = output_files(plan.layout, with_headers=rank == 0)
            writer = RangeWriter(memoryview(memory), files, plan.ranges)
            digests.append(bytes.fromhex(writer.write(temporary, iter([len(memory)]))["digests"]))
            told.append(pack_ranges(plan.staging_bytes, plan.ranges))
        records = AllRanges(plan.layout, told).records(digests)
        if plan.layout.index is not None:
            records.append(write_json(temporary / "model.safetensors.index.json", plan.layout.index))
        topology = {"strategy": "ddp", "world_size": num_ranks}
        commit(
            temporary, final, Manifest("key", 1, 10, 1, {"eval/loss": 0.5}, tuple(records), topology, {}, {"copy_s": 1})
        )
        return final

    return make
