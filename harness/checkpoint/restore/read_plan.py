"""What a rank holds and what a checkpoint has, matched by name: what is to be read from where.

Precision: a weight takes the fp32 master, where there is one and the weight is not of the type that is
stored; a master without one takes the weight. So bf16 with masters -> fp32 -> bf16 with masters loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.format.index import MASTER, CheckpointIndex, StoredPlace, split_name
from harness.checkpoint.format.layout import StoredTensor
from harness.checkpoint.format.names import some
from harness.checkpoint.format.tensor_shard import DTYPE_NAMES, DTYPES, TensorShard
from harness.checkpoint.restore.read import Want, unique_bytes
from harness.checkpoint.sharding.local_shards import LocalShards
from harness.data import memory_layout
from harness.errors import CheckpointError


@dataclass
class Targets:
    """What a rank reads.

    Attributes:
        wants: by file.
        after: what is to be done, in order, when all of them are there.
        notes: what is not as it was saved, for a person.
    """

    wants: dict[str, list[Want]] = field(default_factory=dict)
    after: list[Callable[[], None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def wanted_bytes(self) -> int:
        """Of all files, each byte once."""
        return sum(unique_bytes(wants) for wants in self.wants.values())


def match(held: LocalShards, stored: CheckpointIndex, *, weights_only: bool, strict: bool = True) -> Targets:
    """Find where each tensor is.

    Effects: not collective; main thread; reads metadata only.

    Args:
        held: found with `restoring`, once the optimizer has a state for what the checkpoint has one of.
        stored: what the checkpoint has.
        weights_only: what it has of the optimizer's state does not matter.
        strict: names that are missing, or that nothing is there for, are an error; else they are noted, and
            what is missing stays as it is.

    Raises:
        CheckpointError: with all names that are missing, or that nothing is there for; or with a shape.
    """
    pairs, missing = _find(held, stored)
    unexpected = _unexpected(held, stored, pairs, weights_only)
    if not strict and not pairs:
        raise CheckpointError(
            f"{stored.checkpoint}: has none of the model's names; it has {some(unexpected)}, and the model "
            f"{some(missing)}"
        )
    if strict and (missing or unexpected):
        parts = [f"has no {some(missing)}"] if missing else []
        parts += [f"has {some(unexpected)}, which is not there now"] if unexpected else []
        raise CheckpointError(
            f"{stored.checkpoint}: {', and '.join(parts)}; resume with the model and the optimizer that were saved, or "
            "start another run"
        )
    shapes = [(source, place) for source, place in pairs if place.tensor.shape != source.spec.shape]
    if shapes:
        source, place = shapes[0]
        more = f" (and {len(shapes) - 1} more tensors)" if len(shapes) > 1 else ""
        raise CheckpointError(
            f"{source.spec.name}: has shape {list(place.tensor.shape)} in the checkpoint and {list(source.spec.shape)} "
            f"in the model{more}; resume with the model that was saved, or start another run"
        )
    targets = Targets()
    if missing:
        targets.notes.append(f"{len(missing)} tensors are missing, and stay as they were: {some(missing, 20)}")
    if unexpected:
        targets.notes.append(f"{len(unexpected)} tensors are not in the model, and left out: {some(unexpected, 20)}")
    targets.notes += _notes(held, stored, pairs, weights_only)
    names = _names(held)
    numbers: dict[int, _Numbers] = {}
    for source, place in pairs:
        if not source.ranges:
            continue
        wants = targets.wants.setdefault(place.file, [])
        if _is_number(source):
            of_holder = numbers.setdefault(id(source.holder), _Numbers(source.holder))
            wants.append(of_holder.want(source, place.tensor, split_name(source.spec.name, names)[1]))
        else:
            wants += _wants(source, place.tensor, targets.after)
    for each in numbers.values():
        targets.after.append(partial(each.finish, targets.notes))
    return targets


def _names(held: LocalShards) -> set[str]:
    return {source.spec.name for source in held.tensors if source.spec.section == "model"}


def _find(held: LocalShards, stored: CheckpointIndex) -> tuple[list[tuple[TensorShard, StoredPlace]], list[str]]:
    """What is held with its place, and the names of which the checkpoint has nothing."""
    names = _names(held)
    pairs: list[tuple[TensorShard, StoredPlace]] = []
    missing: list[str] = []
    for source in held.tensors:
        place: StoredPlace | None
        if source.spec.section == "model":
            place = stored.weight(source.spec.name, source.dtype)
        else:
            kind, parameter = split_name(source.spec.name, names)
            if kind == MASTER:
                place = stored.master(parameter)
            else:
                kinds = stored.state_of(parameter)
                place = kinds.get(kind)
                if not kinds and (stored.has_state or not stored.step):
                    continue  # it starts without; in a flat partition, with what the optimizer begins with
            if place is None and kind == MASTER:
                continue  # its weight is missing, which says it
        if place is None:
            missing.append(source.spec.name)
        else:
            pairs.append((source, place))
    return pairs, missing


def _unexpected(
    held: LocalShards, stored: CheckpointIndex, pairs: Sequence[tuple[TensorShard, StoredPlace]], weights_only: bool
) -> list[str]:
    """What the checkpoint has and nothing is there for now."""
    names = {stored.name_of(name) for name in _names(held)}
    unexpected = [name for name in stored.model if name not in names]
    if weights_only:
        return unexpected
    taken = {place for source, place in pairs if source.spec.section == "optimizer"}
    for parameter in sorted({stored.name_of(name) for name in _trained(held)}):
        kinds = stored.state_of(parameter)
        unexpected += [f"{kind}.{parameter}" for kind, place in kinds.items() if place not in taken]
    return unexpected + list(stored.strange)


def _trained(held: LocalShards) -> Iterable[str]:
    return (name for _, in_group in held.groups for name in in_group)


def _notes(
    held: LocalShards, stored: CheckpointIndex, pairs: Sequence[tuple[TensorShard, StoredPlace]], weights_only: bool
) -> Iterator[str]:
    """What is not as it was saved."""
    names = _names(held)
    have_masters = {
        split_name(source.spec.name, names)[1] for source, _ in pairs if source.spec.name.startswith(f"{MASTER}.")
    }
    rounded: list[tuple[TensorShard, StoredPlace]] = []
    coarse: list[tuple[TensorShard, StoredPlace]] = []
    for source, place in pairs:
        if source.dtype is None or not (source.dtype.is_floating_point and place.dtype.is_floating_point):
            continue
        name, is_weight = source.spec.name, source.spec.section == "model"
        precise = (stored.master(name) or place) if is_weight else place
        if name in have_masters:
            continue  # what the weight is rounded from is kept beside it
        if precise.dtype != source.dtype and precise.dtype.itemsize >= source.dtype.itemsize:
            rounded.append((source, precise))
        if place.dtype.itemsize < source.dtype.itemsize and (is_weight or name.startswith(f"{MASTER}.")):
            coarse.append((source, place))
    if rounded:
        source, place = rounded[0]
        yield f"{len(rounded)} tensors were rounded: {source.spec.name} from {_types(source, place)}"
    if coarse:
        source, place = coarse[0]
        yield (
            f"{len(coarse)} weights had been rounded when they were saved: {source.spec.name} from "
            f"{_types(source, place)}, and no fp32 master of them"
        )
    if weights_only:
        return
    trained = [stored.name_of(name) for name in _trained(held)]
    left_out = sorted({name for name in stored.states if stored.state_of(name)} - set(trained))
    if left_out:
        yield f"the state of {len(left_out)} parameters that are not trained now was left out: {some(left_out)}"
    without = [name for name in trained if not stored.state_of(name)]
    if stored.has_state and without:
        yield f"{len(without)} trained parameters had no state in the checkpoint, and start anew: {some(without)}"


def _types(source: TensorShard, place: StoredPlace) -> str:
    assert source.dtype is not None
    return f"{place.tensor.dtype} to {DTYPE_NAMES[source.dtype]}"


def _is_number(source: TensorShard) -> bool:
    """Of an optimizer's state: a step count, say, as a plain number or a tensor without dimensions."""
    if source.spec.section != "optimizer" or source.spec.shape:
        return False
    live = source.live()
    return not isinstance(live, Tensor) or live.numel() == 1


class _Numbers:
    """The numbers in one holder, such as ``step``: of one parameter, or of all in a flat partition.

    In a flat partition there is one number for what may have been many. It is that of the parameter with the
    most steps: for the others, nearly always none, the correction of their moments ends a little early.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._read: dict[str, dict[str, Tensor]] = {}
        self._source: dict[str, TensorShard] = {}

    def want(self, source: TensorShard, tensor: StoredTensor, parameter: str) -> Want:
        """What is read for it."""
        number = torch.empty(1, dtype=DTYPES[tensor.dtype])
        self._read.setdefault(source.key, {})[parameter] = number
        self._source[source.key] = source
        return Want(tensor.start, tensor.dtype, number)

    def finish(self, notes: list[str]) -> None:
        """Put them there, once all are read."""
        steps = self._read.get("step") or next(iter(self._read.values()))
        first = max(steps, key=lambda parameter: steps[parameter].item())
        for kind, numbers in self._read.items():
            value = numbers.get(first, next(iter(numbers.values())))
            if any(number.item() != value.item() for number in numbers.values()):
                notes.append(f"{kind}: differed among parameters that have one together now; it is {value.item()}")
            live = self._source[kind].live()
            if isinstance(live, Tensor):
                live.copy_(value.reshape(live.shape))
            else:
                self._holder[kind] = type(live)(value.item())


def _wants(source: TensorShard, tensor: StoredTensor, after: list[Callable[[], None]]) -> Iterator[Want]:
    item = DTYPES[tensor.dtype].itemsize
    live = source.live()
    flat = memory_layout.flat_view(live)
    if flat is None:
        flat = torch.empty(live.numel(), dtype=live.dtype, device=live.device)
        after.append(partial(_put, source.spec.name, live, flat))
    for run in source.ranges:
        yield Want(tensor.start + run.logical * item, tensor.dtype, flat[run.local : run.local + run.num_items])


def _put(name: str, live: Tensor, ordered: Tensor) -> None:
    try:
        memory_layout.copy_into(live, ordered)
    except ValueError as error:
        raise CheckpointError(
            f"{name}: cannot be restored: {error} in the checkpoint; give it memory of its own with .clone(), as it "
            "had when the checkpoint was saved"
        ) from error
