"""An optimizer's state before its first step, so that there is something to read a checkpoint into.

It is built from the names, types and shapes in the checkpoint and the recorded form, not by a step: a step would move
counters that the optimizer keeps elsewhere, and some optimizers cannot take one with gradients of zero. A step is taken
for two things alone, and leaves no trace:

- objects in a state (with ``state_dict`` and ``load_state_dict``), which no file can make;
- the check whether a checkpoint is of another optimizer, where the recorded class is another or none.
"""

from __future__ import annotations

import copy
import ctypes
import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.index import CheckpointIndex, StoredPlace
from harness.checkpoint.format.tensor_shard import DTYPES
from harness.checkpoint.sharding.local_shards import OptimizedTensor
from harness.checkpoint.sharding.state_form import (
    Branch,
    Form,
    Path,
    build,
    is_leaf,
    is_object,
    leaves_of,
    objects_in,
    plain_form,
)
from harness.checkpoint.state.optimizer_record import OptimizerRecord, class_name
from harness.checkpoint.state.zero_step import zero_step
from harness.errors import CheckpointError, DamagedError

_NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float}
_MIN_HUGE_BYTES = 1 << 20
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class BuiltState:
    """The state that was built for a restore, until its tensors are read.

    Args:
        optimizer: the user's own, inside all wrappers.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._before: list[tuple[Tensor, Any]] = []
        self._objects: list[tuple[Branch, Path, Any]] = []

    def put(self, tensor: Tensor, state: dict[Any, Any]) -> None:
        """Give the optimizer a state of a tensor."""
        self._before.append((tensor, self.optimizer.state.pop(tensor, None)))
        self.optimizer.state[tensor] = state

    def expect(self, state: dict[Any, Any], path: Path, value: Any) -> None:
        """Register an object: `finish` passes it the values read at its path, and puts it there."""
        self._objects.append((Branch(state), path, value))

    def finish(self) -> None:
        """Once all is read: let the objects load what was read for them."""
        for branch, path, value in self._objects:
            value.load_state_dict(branch[path])
            branch[path] = value

    def undo(self) -> None:
        """After an error: the optimizer has the state that it had before."""
        for tensor, before in reversed(self._before):
            self.optimizer.state.pop(tensor, None)
            if before is not None:
                self.optimizer.state[tensor] = before


def build_state(
    built: BuiltState, stepped: Sequence[OptimizedTensor], stored: CheckpointIndex, record: OptimizerRecord
) -> None:
    """Give the innermost optimizer a state of what the checkpoint has a state of.

    Effects: not collective, but for the step of an optimizer whose step is collective; main thread, before training;
    nothing on disk. The values are not read yet. What is there already is kept.

    Args:
        built: of the optimizer; undo it after an error.
        stepped: all that it steps on, by `find_stepped`.
        stored: the checkpoint.
        record: what the checkpoint has of the optimizer beside tensors.

    Raises:
        CheckpointError: if the checkpoint is of another optimizer, or objects in its state cannot be made.
        DamagedError: if the checkpoint contradicts itself.
    """
    wanted = [each for each in stepped if any(stored.state_of(name) for name in each.names)]
    example: Mapping[Any, Any] = {}
    if record.class_name != class_name(built.optimizer):
        example = _refuse_another(built.optimizer, stepped, wanted, stored, record)
    for each in wanted:
        _build(built, each, stored, record, example)


def _build(
    built: BuiltState,
    each: OptimizedTensor,
    stored: CheckpointIndex,
    record: OptimizerRecord,
    example: Mapping[Any, Any],
) -> None:
    optimizer = built.optimizer
    # In a flat partition there is one state of what may have been many; that with the most is taken as the example.
    name = max((stored.name_of(name) for name in each.names), key=lambda name: len(stored.state_of(name)))
    form = record.forms.get(name) or _form_without(record, stored.state_of(name))
    state = build(form, lambda path, kind: _leaf(each, name, path, kind, stored, example))
    live = optimizer.state.get(each.tensor) or {}
    objects = list(objects_in(form))
    if live.keys() >= state.keys() and not objects:
        return
    # An object, live or not, gives copies of its state, so the file is read into what was built.
    with_objects = {path[0] for path in objects}
    state |= {kind: value for kind, value in live.items() if kind not in with_objects}
    made: Branch | None = None
    for path in objects:
        value = _found(Branch(live), path)
        if value is None:
            made = made or Branch(zero_step(optimizer, [each])[0])
            value = _made(optimizer, made, path, name)
        if isinstance(value, Tensor):
            Branch(state)[path] = value
        else:
            built.expect(state, path, value)
    built.put(each.tensor, state)


def _form_without(record: OptimizerRecord, kinds: Mapping[str, StoredPlace]) -> Form:
    """The form of a state that has none in the checkpoint: a dict of tensors.

    A checkpoint from before forms were recorded does not tell a plain number from a tensor of 64 bits without
    dimensions; a plain number is assumed.
    """
    form = plain_form(set(kinds))
    if record.class_name is None:
        numbers = {"I64": "int"} if torch.get_default_dtype() == torch.float64 else {"I64": "int", "F64": "float"}
        for item in form["dict"]:
            place = kinds[item[0]]
            if not place.tensor.shape:
                item[1] = numbers.get(place.tensor.dtype, item[1])
    return form


def _leaf(
    each: OptimizedTensor, name: str, path: Path, kind: Form, stored: CheckpointIndex, example: Mapping[Any, Any]
) -> Any:
    """Memory for one tensor, or a number, to be read into; a number as another class of optimizer has it."""
    of_name = ".".join(map(str, path))
    place = stored.state_of(name).get(of_name)
    if place is None:
        raise DamagedError(
            f"{stored.checkpoint}: trainer_state.json has {of_name}.{name}, and optimizer.safetensors has not; use "
            "another checkpoint"
        )
    is_step = of_name == "step" and not place.tensor.shape
    if is_step or not _has_shape_of_parameter(each, of_name, stored):
        number = example.get(path[0]) if len(path) == 1 else None
        if is_leaf(number) and (not isinstance(number, Tensor) or number.numel() == 1):
            return copy.deepcopy(number)
    if isinstance(kind, str) and kind in _NUMBERS:
        return _NUMBERS[kind](0)
    is_like_parameter = not is_step and _has_shape_of_parameter(each, of_name, stored)
    is_flat = is_like_parameter and (len(each.names) > 1 or tuple(each.tensor.shape) != stored.model[name].tensor.shape)
    is_sharded = is_like_parameter and isinstance(each.tensor, DTensor)
    if isinstance(kind, dict) and not is_flat and not is_sharded:
        return _in_order(each, kind["order"], _dtype(each, name, place, stored), place)
    if is_like_parameter:
        # Of a flat partition, padding and parameters without a state are zero.
        make = torch.zeros_like if is_flat else torch.empty_like
        value = make(each.tensor, dtype=_dtype(each, name, place, stored), requires_grad=False)
        _advise_huge_pages(getattr(value, "_local_tensor", value))
        return value
    shape = place.tensor.shape
    if math.prod(shape) != 1:
        return torch.empty(shape, dtype=_dtype(each, name, place, stored), device=each.tensor.device)
    # As torch's load_state_dict: on the host, where no kernel reads it.
    is_on_device = kind == "device_tensor" or each.group.get("capturable") or each.group.get("fused")
    return torch.empty(shape, dtype=DTYPES[place.tensor.dtype], device=each.tensor.device if is_on_device else "cpu")


def _advise_huge_pages(tensor: Tensor) -> None:
    """Ask the kernel for large pages in a tensor's new memory on the CPU.

    Reading 144 MB from the page cache into new memory takes 128 ms with pages of 4 KiB, and 62 ms with 2 MiB.
    """
    if _libc is None or _MADV_HUGEPAGE is None or tensor.device.type != "cpu" or tensor.nbytes < _MIN_HUGE_BYTES:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)


def _in_order(each: OptimizedTensor, order: Sequence[int], dtype: torch.dtype, place: StoredPlace) -> Tensor:
    shape = place.tensor.shape
    if len(order) != len(shape):
        raise DamagedError(
            f"{place.file}: a tensor of shape {list(shape)} has the order {list(order)} in trainer_state.json"
        )
    lying = torch.empty([shape[dim] for dim in order], dtype=dtype, device=each.tensor.device)
    return lying.permute([order.index(dim) for dim in range(len(order))])


def _has_shape_of_parameter(each: OptimizedTensor, of_name: str, stored: CheckpointIndex) -> bool:
    names = [stored.name_of(name) for name in each.names]
    pairs = [(stored.state_of(name).get(of_name), stored.model.get(name)) for name in names]
    return all(place is None or (model and place.tensor.shape == model.tensor.shape) for place, model in pairs)


def _dtype(each: OptimizedTensor, name: str, place: StoredPlace, stored: CheckpointIndex) -> torch.dtype:
    """That of what is stepped on now, if it was that of what was stepped on then; else what is stored."""
    then = stored.master(name)
    is_same = then is not None and then.dtype == place.dtype and place.dtype.is_floating_point
    return each.tensor.dtype if is_same else place.dtype


def _made(optimizer: Any, made: Branch, path: Path, name: str) -> Any:
    value = _found(made, path)
    if value is not None:
        return value
    raise CheckpointError(
        f"{type(optimizer).__name__}: has made no {'.'.join(map(str, path))} of {name} in a step with gradients of "
        "zero, so it cannot be resumed; restore its weights only"
    )


def _found(state: Branch, path: Path) -> Any:
    """The object or the tensor at a path of a state; None if there is neither."""
    try:
        value = state[path]
    except (KeyError, IndexError, TypeError):
        return None
    return value if isinstance(value, Tensor) or is_object(value) else None


def _refuse_another(
    optimizer: Any,
    stepped: Sequence[OptimizedTensor],
    wanted: Sequence[OptimizedTensor],
    stored: CheckpointIndex,
    record: OptimizerRecord,
) -> Mapping[Any, Any]:
    """Refuse a checkpoint of another optimizer, by what this one keeps of one parameter after a step.

    Returns:
        What it keeps; nothing if it cannot take such a step, and is not refused.

    Raises:
        CheckpointError: if it keeps something else.
    """
    if not wanted and not stored.step:
        return {}
    candidates = [each for each in wanted or stepped if each.tensor.numel() and (wanted or each.tensor.requires_grad)]
    if not candidates:
        return {}
    each = min(candidates, key=lambda each: each.tensor.numel())
    try:
        (state,) = zero_step(optimizer, [each])
    except CheckpointError:
        return {}
    keeps = {leaf.name for leaf in leaves_of(state)}
    name = max((stored.name_of(name) for name in each.names), key=lambda name: len(stored.state_of(name)))
    has = set(stored.state_of(name))
    if keeps == has:
        return state
    if not wanted:
        raise CheckpointError(
            f"{stored.checkpoint}: has no state of the optimizer after step {stored.step}, though "
            f"{type(optimizer).__name__} keeps one: it holds the weights only, or is of another optimizer; restore its "
            "weights only, or resume with the optimizer that was saved"
        )
    was = f"{record.class_name} was saved" if record.class_name else "another optimizer was saved"
    raise CheckpointError(
        f"{stored.checkpoint}: has {_some(has)} of {name}, and {type(optimizer).__name__} keeps {_some(keeps)} ({was})"
        "; resume with the optimizer that was saved, or restore the weights only"
    )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def check_objects(optimizer: Any, stepped: Sequence[OptimizedTensor], forms: Mapping[str, Form]) -> None:
    """Refuse objects in a state that could not be made again at a resume.

    Effects: as `zero_step`, for one tensor with objects in its state; main thread, between steps.

    Args:
        optimizer: the user's own, inside all wrappers.
        stepped: all that it steps on, by `find_stepped`.
        forms: parameter -> form of its state.

    Raises:
        CheckpointError: if the optimizer does not make them in a step with gradients of zero.
    """
    for each in stepped:
        name = next((name for name in each.names if any(objects_in(forms.get(name)))), None)
        if name is None:
            continue
        values = each.tensor.detach().clone()
        try:
            made = Branch(zero_step(optimizer, [each])[0])
            for path in objects_in(forms[name]):
                _made(optimizer, made, path, name)
        finally:
            with torch.no_grad():
                each.tensor.copy_(values)
        return
