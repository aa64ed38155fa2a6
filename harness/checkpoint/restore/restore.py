"""Restores a checkpoint's tensors, whatever strategy and number of ranks wrote them.

    headers  ->  build the optimizer's state  ->  find what this rank holds  ->  read plan  ->  read and check

Each rank reads what it holds and computes digests of that; ranges that no rank reads whole are checked together at the
end. After each stage the ranks exchange their failures, so that all of them stop with the same error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from harness.checkpoint.format.commit import FileRecord, Manifest, read_manifest
from harness.checkpoint.format.files import Files, LocalFiles
from harness.checkpoint.format.index import CheckpointIndex
from harness.checkpoint.format.partial_digests import Span, are_complete, combine, require_digest
from harness.checkpoint.restore.read import digest_leaves, read
from harness.checkpoint.restore.read_plan import ReadPlan, make_read_plan
from harness.checkpoint.sharding.local_shards import LocalShards, innermost
from harness.checkpoint.state.materialize import BuiltState, build_state
from harness.checkpoint.state.optimizer_record import OptimizerRecord
from harness.checkpoint.state.parts import find_watched, find_watched_optimized
from harness.checkpoint.state.trainer_state import AnyWatched, read_trainer_state
from harness.distributed.collectives import Collectives


@dataclass(frozen=True)
class Restored:
    """The result of restoring.

    Args:
        wanted_bytes: bytes of the files that this rank holds, each counted once.
        read_bytes: bytes that were read, including those read only for their digests.
        notes: what differs from the saved state (rounded, ignored, reset), for the user; the same on all ranks.
    """

    wanted_bytes: int
    read_bytes: int
    notes: tuple[str, ...] = ()


def restore_tensors(
    accelerator: Accelerator,
    watched: AnyWatched,
    checkpoint: Path,
    collectives: Collectives,
    *,
    weights_only: bool = False,
    manifest: Manifest | None = None,
    files: Files | None = None,
    records: Mapping[str, OptimizerRecord] | None = None,
) -> Restored:
    """Fill the weights, the buffers and the optimizer's state from a checkpoint.

    A parameter of which the checkpoint has no state gets none, as if it had never had a gradient; in ZeRO,
    where one state is of many parameters, zeros. State of a parameter that is no longer trained is left out.

    Effects: collective; main thread, before training; blocks until every rank has read its part; nothing on
    disk. The optimizer takes no step, but for what `materialize` says. After an error the tensors hold
    anything, so another checkpoint, or none, has to take its place; the optimizer's state is what it was before.

    Args:
        accelerator: which ranks and which strategy.
        watched: the prepared model and optimizer; without an optimizer, weights only.
        checkpoint: its directory.
        collectives: of all ranks.
        weights_only: leave the optimizer's state as it is; ZeRO's masters become what the weights are.
        manifest: the checkpoint's, where it has been read already.
        files: where its files are read from; None: every rank sees them.
        records: name of the part -> what it has of its optimizer beside tensors, where that has been read already.

    Raises:
        DamagedError: on all ranks, if the checkpoint is damaged for any of them.
        CheckpointError: on all ranks, if it is of another model or optimizer, or a rank fails otherwise.
    """
    files = files or LocalFiles(checkpoint)
    weights_only = weights_only or all(part.optimizer is None for part in watched.parts)

    def headers() -> tuple[CheckpointIndex, Mapping[str, OptimizerRecord]]:
        found = manifest or read_manifest(checkpoint)
        of_parts = records or {}
        if records is None and not weights_only and found.can_be_resumed:
            of_parts = {part.name: part.optimizer for part in read_trainer_state(checkpoint, found, files).parts}
        return CheckpointIndex.of(checkpoint, found, files), of_parts

    stored, of_parts = collectives.run_on_all_ranks("reading the checkpoint's headers", lambda: files.reading(headers))
    return _restore(accelerator, watched, stored, files, collectives, None if weights_only else of_parts, strict=True)


def restore_weights(
    accelerator: Accelerator,
    watched: AnyWatched,
    directory: Path,
    collectives: Collectives,
    records: Sequence[FileRecord] | None = None,
    files: Files | None = None,
) -> Restored:
    """Fill the weights and buffers from a checkpoint, or from any directory of safetensors as Hugging Face has it.

    Names that the directory lacks, and names that the model lacks, are in the notes.

    Effects: as `restore_tensors`, but the optimizer makes no step.

    Args:
        accelerator: which ranks and which strategy.
        watched: the prepared model and optimizer; ZeRO's masters become what the weights are.
        directory: of the weights.
        collectives: of all ranks.
        records: of the files of weights in it, where they have been found already.
        files: where they are read from; None: every rank sees them.

    Raises:
        CheckpointError: on all ranks, if none of the names is the model's, a shape is another, or it is damaged.
    """
    files = files or LocalFiles(directory)
    what = "reading the headers of the weights"
    stored = collectives.run_on_all_ranks(
        what, lambda: files.reading(lambda: CheckpointIndex.of_weights(directory, records, files))
    )
    return _restore(accelerator, watched, stored, files, collectives, None, strict=False)


def _restore(
    accelerator: Accelerator,
    watched: AnyWatched,
    stored: CheckpointIndex,
    files: Files,
    collectives: Collectives,
    records: Mapping[str, OptimizerRecord] | None,
    *,
    strict: bool,
) -> Restored:
    """Fill what it holds; without records of the optimizers, the weights only."""
    weights_only = records is None
    built: list[BuiltState] = []
    try:
        if records is not None:
            what = "building the optimizer's state"
            collectives.run_on_all_ranks(what, lambda: _build_states(built, watched, stored, records))

        def make_plan() -> tuple[ReadPlan, LocalShards]:
            shards = find_watched(accelerator, watched, weights_only=weights_only, dtype=None, restoring=True)
            return make_read_plan(shards, stored, weights_only=weights_only, strict=strict), shards

        plan, shards = collectives.run_on_all_ranks("matching the names in the checkpoint", make_plan)
        what = "reading the tensors"
        read_bytes, spans = collectives.run_on_all_ranks(
            what, lambda: files.reading(lambda: _fill(plan, stored, files))
        )
        read_bytes += _check(stored, spans, files, collectives)
        collectives.run_on_all_ranks("loading the state of the optimizer's objects", lambda: _finish(built))
        shards.refresh()
    except BaseException:
        for each in built:
            each.undo()
        raise
    return Restored(plan.requested_bytes, read_bytes, tuple(plan.notes))


def _build_states(
    built: list[BuiltState], watched: AnyWatched, stored: CheckpointIndex, records: Mapping[str, OptimizerRecord]
) -> None:
    for part, stepped in find_watched_optimized(watched):
        built.append(BuiltState(innermost(part.optimizer)))
        build_state(built[-1], stepped, stored, records.get(part.name, OptimizerRecord()))


def _finish(built: Sequence[BuiltState]) -> None:
    for each in built:
        each.finish()


def _fill(plan: ReadPlan, stored: CheckpointIndex, files: Files) -> tuple[int, dict[str, dict[int, list[Span]]]]:
    """Read the plan; how many bytes, and by file what this rank knows of the ranges' digests."""
    read_bytes = 0
    spans: dict[str, dict[int, list[Span]]] = {}
    with torch.no_grad():
        for name, record in stored.records.items():
            reading = read(stored.checkpoint / name, record, plan.requests.get(name, []), files)
            read_bytes += reading.read_bytes
            spans[name] = reading.spans
        for step in plan.after:
            step.finish(plan.notes)
    return read_bytes, spans


def _check(
    stored: CheckpointIndex, spans: dict[str, dict[int, list[Span]]], files: Files, collectives: Collectives
) -> int:
    """Put together what the ranks know of the digests; what none knows they divide, and read. How many bytes."""
    # Where as many ranks resume as have written, each range has come by one of them whole and was looked at there: that
    # is one bit of it, where a thousand ranks would tell one another millions of digests.
    flags = [flag for name, record in stored.records.items() for flag in are_complete(record, spans[name])]
    are_right = iter(collectives.all_reduce_any("the ranges that are right", flags))
    unsure = {
        name: [number for number in range(len(record.ranges)) if not next(are_right)]
        for name, record in stored.records.items()
    }
    mine = {
        name: {number: spans[name][number] for number in numbers if number in spans[name]}
        for name, numbers in unsure.items()
    }
    told = collectives.all_gather("what they know of the other digests", mine)
    known = {
        name: combine(record, unsure[name], [each[name] for each in told]) for name, record in stored.records.items()
    }
    # Divided among those that have a disk: a digest is not worth sending what nobody else wants.
    readers = range(collectives.world_size) if files.readers is None else files.readers

    def read_mine() -> tuple[int, dict[str, list[tuple[int, int]]]]:
        read_bytes = 0
        found = {}
        for name, (_, lacking) in known.items():
            own = lacking[readers.index(collectives.rank) :: len(readers)] if collectives.rank in readers else []
            if own:
                more_bytes, digests = digest_leaves(stored.checkpoint / name, stored.records[name], own, files)
                read_bytes += more_bytes
                found[name] = [(leaves.range, digest) for leaves, digest in zip(own, digests, strict=True)]
        return read_bytes, found

    what = "reading the rest for its digests"
    read_bytes, found = collectives.run_on_all_ranks(what, lambda: files.reading(read_mine))
    for each in collectives.all_gather("the rest of the digests", found):
        for name, parts in each.items():
            for number, digest in parts:
                known[name][0][number] ^= digest
    # The same on every rank, and so is the error.
    for name, record in stored.records.items():
        for number, digest in known[name][0].items():
            require_digest(stored.checkpoint / name, record.ranges[number], digest)
    return read_bytes
