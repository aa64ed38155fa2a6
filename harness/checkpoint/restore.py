"""A checkpoint's tensors into what the ranks hold now, whatever strategy and world size wrote them.

    optimizer makes its state  ->  what this rank holds  ->  its bytes of each file  ->  read and checked

Each rank reads what it holds and nothing else; the digests that no rank has come by are divided at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.agreement import Agreement
from harness.checkpoint.commit import FileRecord, read_manifest
from harness.checkpoint.layout import Section, StoredTensor, read_header
from harness.checkpoint.read import Want, check_ranges, read
from harness.checkpoint.shards.held import Held
from harness.checkpoint.shards.source import DTYPES, Source
from harness.errors import CheckpointError

_OPTIMIZER_FILE = "optimizer.safetensors"
_MASTER = "master."
_GRADIENT_BYTES = 64 << 20


@dataclass(frozen=True)
class Restored:
    """What restoring took.

    Args:
        wanted_bytes: of the files, that this rank holds.
        read_bytes: from the files, with what was read for its digest alone.
    """

    wanted_bytes: int
    read_bytes: int


def restore_tensors(held: Held, checkpoint: Path, agreement: Agreement) -> Restored:
    """Fill what the ranks hold from a checkpoint.

    Effects: collective; main thread; blocks until every rank has read its part; nothing on disk. After an
    error the tensors hold anything, so another checkpoint, or none, has to take its place.

    Args:
        held: found with `restoring`, after `materialize`.
        checkpoint: its directory, which every rank sees.
        agreement: of all ranks.

    Raises:
        CheckpointError: on all ranks, if the checkpoint is damaged on any of them, or is of another model.
    """
    wanted_bytes = read_bytes = 0
    unchecked: dict[str, list[int]] = {}
    records: dict[str, FileRecord] = {}
    failure: CheckpointError | None = None
    try:
        stored = _Stored.of(checkpoint)
        records = stored.records
        targets = _targets(held, stored)
        with torch.no_grad():
            for name, record in records.items():
                wants = targets.wants.get(name, [])
                reading = read(checkpoint / name, record, wants)
                wanted_bytes += sum(want.end - want.start for want in wants)
                read_bytes += reading.read_bytes
                unchecked[name] = reading.unchecked
            for finish in targets.after:
                finish()
    except Exception as error:
        failure = _as_checkpoint_error(error)
    told = agreement.gather("what they have read", (unchecked, None if failure is None else str(failure)))
    _raise_first(failure, [text for _, text in told])
    try:
        for name, record in records.items():
            left = sorted(set.intersection(*(set(numbers[name]) for numbers, _ in told)))
            read_bytes += check_ranges(checkpoint / name, record, left[agreement.rank :: agreement.world_size])
    except Exception as error:
        failure = _as_checkpoint_error(error)
    _raise_first(failure, agreement.gather("what they have checked", None if failure is None else str(failure)))
    return Restored(wanted_bytes, read_bytes)


def _as_checkpoint_error(error: Exception) -> CheckpointError:
    """This rank's failure, that all are told of, whatever it is."""
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"cannot be restored: {error or type(error).__name__}")


def _raise_first(failure: CheckpointError | None, told: Sequence[str | None]) -> None:
    if failure is not None:
        raise failure
    for rank, text in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {text}")


@dataclass(frozen=True)
class _Stored:
    """The tensors of a checkpoint: section and name -> file and place."""

    records: dict[str, FileRecord]
    places: dict[tuple[Section, str], tuple[str, StoredTensor]]

    @classmethod
    def of(cls, checkpoint: Path) -> _Stored:
        manifest = read_manifest(checkpoint)
        records = {file.name: file for file in manifest.files if file.name.endswith(".safetensors")}
        places: dict[tuple[Section, str], tuple[str, StoredTensor]] = {}
        for file, record in records.items():
            section: Section = "optimizer" if file == _OPTIMIZER_FILE else "model"
            tensors, metadata = read_header(checkpoint / file, record)
            places |= {(section, name): (file, tensor) for name, tensor in tensors.items()}
            # A name that was tied when it was written may stand for itself now.
            for alias, name in metadata.items():
                if section == "model" and name in tensors:
                    places.setdefault((section, alias), (file, tensors[name]))
        return cls(records, places)

    def find(self, source: Source) -> tuple[str, StoredTensor] | None:
        """Where the values of a tensor are: the most precise ones."""
        section, name = source.spec.section, source.spec.name
        if section == "optimizer" and name.startswith(_MASTER):
            # A weight that is fp32 itself is its own master.
            return self.places.get((section, name)) or self.places.get(("model", name.removeprefix(_MASTER)))
        place = self.places.get((section, name))
        master = self.places.get(("optimizer", _MASTER + name)) if section == "model" else None
        if place is not None and master is not None and source.spec.item_bytes > DTYPES[place[1].dtype].itemsize:
            return master
        return place


@dataclass
class _Targets:
    """What is read from each file, and what is to be done when all is there."""

    wants: dict[str, list[Want]] = field(default_factory=dict)
    after: list[Callable[[], None]] = field(default_factory=list)


def _targets(held: Held, stored: _Stored) -> _Targets:
    targets = _Targets()
    missing: list[str] = []
    for source in held.sources:
        place = stored.find(source)
        if place is None:
            missing.append(source.spec.name)
            continue
        file, tensor = place
        if tensor.shape != source.spec.shape:
            raise CheckpointError(
                f"{source.spec.name}: has shape {list(tensor.shape)} in the checkpoint and {list(source.spec.shape)} "
                "in the model; resume with the model that was saved, or start another run"
            )
        if source.runs:
            targets.wants.setdefault(file, []).extend(_wants(source, tensor, targets.after))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"the checkpoint has no {', '.join(missing[:3])}{more}; resume with the model and the optimizer that were "
            "saved, or start another run"
        )
    return targets


def _wants(source: Source, tensor: StoredTensor, after: list[Callable[[], None]]) -> Iterator[Want]:
    item = DTYPES[tensor.dtype].itemsize
    live: Any = source.live()
    if not isinstance(live, Tensor):
        number = torch.empty(1, dtype=DTYPES[tensor.dtype])
        yield Want(tensor.start, tensor.dtype, number)
        kind, place = type(live), source.holder
        after.append(lambda: place.__setitem__(source.key, kind(number.item())))
        return
    flat = live.detach()
    if not flat.is_contiguous():
        flat = ordered = torch.empty(live.shape, dtype=live.dtype, device=live.device)
        after.append(lambda: _put(live, ordered))
    flat = flat.view(-1)
    for run in source.runs:
        yield Want(tensor.start + run.logical * item, tensor.dtype, flat[run.local : run.local + run.num_items])


def _put(live: Tensor, ordered: Tensor) -> None:
    live.detach().copy_(ordered)


def materialize(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer make the state that its first step makes: with gradients of zero, at a rate of zero.

    So types, devices and what is a plain number are the optimizer's own choice. The values are of no use.

    Effects: not collective; main thread, before training; blocks for a step; at most 64 MiB of gradients at a
    time, or as much as the largest parameter has.

    Raises:
        CheckpointError: if the optimizer cannot step so.
    """
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    for group, rate in rates:
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    try:
        for part in _parts(
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and not optimizer.state.get(parameter)
        ):
            for parameter in part:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            for parameter in part:
                parameter.grad = None
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{type(optimizer).__name__}: cannot make its state before training: {error}; it cannot be resumed"
        ) from error
    finally:
        for group, rate in rates:
            group["lr"] = rate


def _parts(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    for parameter in parameters:
        part.append(parameter)
        if sum(each.nbytes for each in part) >= _GRADIENT_BYTES:
            yield part
            part = []
    if part:
        yield part
