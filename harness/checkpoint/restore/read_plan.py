"""Plans a restore: matches what a rank holds and what a checkpoint has by name.

Precision: a weight is read from the fp32 master if there is one and the weight's dtype is not the stored dtype; a
master without a stored master is read from the weight. So bf16 with masters -> fp32 -> bf16 with masters loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.checkpoint.format.index import MASTER, CheckpointIndex, StoredPlace, split_name
from harness.checkpoint.format.layout import StoredTensor
from harness.checkpoint.format.names import some
from harness.checkpoint.format.tensor_shard import DTYPE_NAMES, DTYPES, TensorShard
from harness.checkpoint.restore.read import ReadRequest, unique_bytes
from harness.checkpoint.sharding.local_shards import LocalShards
from harness.data import memory_layout
from harness.errors import CheckpointError


class AfterRead(Protocol):
    """A step that remains once everything is read."""

    def finish(self, notes: list[str]) -> None:
        """Store what was read where it belongs; append what the user should know."""


@dataclass
class ReadPlan:
    """What a rank reads.

    Attributes:
        requests: by file.
        after: steps once all requests are read, in order.
        notes: what differs from the saved state, for the user.
    """

    requests: dict[str, list[ReadRequest]] = field(default_factory=dict)
    after: list[AfterRead] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def requested_bytes(self) -> int:
        """Number of bytes of all files, each byte counted once."""
        return sum(unique_bytes(requests) for requests in self.requests.values())


def make_read_plan(
    shards: LocalShards, stored: CheckpointIndex, *, weights_only: bool, strict: bool = True
) -> ReadPlan:
    """Find the place of each tensor in the checkpoint.

    Effects: not collective; main thread; reads metadata only.

    Args:
        shards: found with `restoring`, once the optimizer has the states that the checkpoint has.
        stored: the checkpoint's index.
        weights_only: ignore the checkpoint's optimizer state.
        strict: raise for names that only the checkpoint or only the model has. Otherwise they are noted, and tensors
            that are missing in the checkpoint stay as they are.

    Raises:
        CheckpointError: with all such names, or with a shape that differs.
    """
    pairs, missing = _find(shards, stored)
    unexpected = _unexpected(shards, stored, pairs, weights_only)
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
    plan = ReadPlan()
    if missing:
        plan.notes.append(f"{len(missing)} tensors are missing, and stay as they were: {some(missing, 20)}")
    if unexpected:
        plan.notes.append(f"{len(unexpected)} tensors are not in the model, and left out: {some(unexpected, 20)}")
    plan.notes += _notes(shards, stored, pairs, weights_only)
    names = _names(shards)
    numbers: dict[int, _Numbers] = {}
    for source, place in pairs:
        if not source.ranges:
            continue
        requests = plan.requests.setdefault(place.file, [])
        if _is_number(source):
            of_holder = numbers.setdefault(id(source.holder), _Numbers(source.holder))
            requests.append(of_holder.request(source, place.tensor, split_name(source.spec.name, names)[1]))
        else:
            requests += _requests(source, place.tensor, plan.after)
    plan.after += numbers.values()
    return plan


def _names(shards: LocalShards) -> set[str]:
    return {source.spec.name for source in shards.tensors if source.spec.section == "model"}


def _find(shards: LocalShards, stored: CheckpointIndex) -> tuple[list[tuple[TensorShard, StoredPlace]], list[str]]:
    """Return the tensors with their places, and the names that the checkpoint lacks."""
    names = _names(shards)
    pairs: list[tuple[TensorShard, StoredPlace]] = []
    missing: list[str] = []
    for source in shards.tensors:
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
                    continue  # it starts without a state, or in a flat partition with the optimizer's initial one
            if place is None and kind == MASTER:
                continue  # its weight is missing too, and is reported
        if place is None:
            missing.append(source.spec.name)
        else:
            pairs.append((source, place))
    return pairs, missing


def _unexpected(
    shards: LocalShards, stored: CheckpointIndex, pairs: Sequence[tuple[TensorShard, StoredPlace]], weights_only: bool
) -> list[str]:
    """Return the names that only the checkpoint has."""
    names = {stored.name_of(name) for name in _names(shards)}
    unexpected = [name for name in stored.model if name not in names]
    if weights_only:
        return unexpected
    used = {place for source, place in pairs if source.spec.section == "optimizer"}
    for parameter in sorted({stored.name_of(name) for name in _trained(shards)}):
        kinds = stored.state_of(parameter)
        unexpected += [f"{kind}.{parameter}" for kind, place in kinds.items() if place not in used]
    return unexpected + list(stored.strange)


def _trained(shards: LocalShards) -> Iterable[str]:
    return (name for _, in_group in shards.groups for name in in_group)


def _notes(
    shards: LocalShards, stored: CheckpointIndex, pairs: Sequence[tuple[TensorShard, StoredPlace]], weights_only: bool
) -> Iterator[str]:
    """Yield what differs from the saved state."""
    names = _names(shards)
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
            continue  # the master has the full precision
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
    trained = [stored.name_of(name) for name in _trained(shards)]
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
    """Return whether it is a number of the optimizer's state, such as a step count; a tensor may hold it."""
    if source.spec.section != "optimizer" or source.spec.shape:
        return False
    live = source.live()
    return not isinstance(live, Tensor) or live.numel() == 1


class _Numbers:
    """The numbers in one holder, such as ``step``: of one parameter, or of all parameters of a flat partition.

    A flat partition has one number where the checkpoint may have several. The parameter with the most steps sets it.
    For the others, of which there are hardly ever any, the bias correction of their moments ends a little early.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._read: dict[str, dict[str, Tensor]] = {}
        self._source: dict[str, TensorShard] = {}

    def request(self, source: TensorShard, tensor: StoredTensor, parameter: str) -> ReadRequest:
        """Return the request for one number."""
        number = torch.empty(1, dtype=DTYPES[tensor.dtype])
        self._read.setdefault(source.key, {})[parameter] = number
        self._source[source.key] = source
        return ReadRequest(tensor.start, tensor.dtype, number)

    def finish(self, notes: list[str]) -> None:
        """Store the numbers in the holder; see `AfterRead`."""
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


def _requests(source: TensorShard, tensor: StoredTensor, after: list[AfterRead]) -> Iterator[ReadRequest]:
    item = DTYPES[tensor.dtype].itemsize
    live = source.live()
    flat = memory_layout.flat_view(live)
    if flat is None:
        flat = torch.empty(live.numel(), dtype=live.dtype, device=live.device)
        after.append(_Reordered(source.spec.name, live, flat))
    for run in source.ranges:
        yield ReadRequest(tensor.start + run.logical * item, tensor.dtype, flat[run.local : run.local + run.num_items])


@dataclass(frozen=True)
class _Reordered:
    """A tensor whose memory is not in the order of its elements; it is read into `ordered` first."""

    name: str
    live: Tensor
    ordered: Tensor

    def finish(self, notes: list[str]) -> None:
        try:
            memory_layout.copy_into(self.live, self.ordered)
        except ValueError as error:
            raise CheckpointError(
                f"{self.name}: cannot be restored: {error} in the checkpoint; give it memory of its own with .clone(), "
                "as it had when the checkpoint was saved"
            ) from error
