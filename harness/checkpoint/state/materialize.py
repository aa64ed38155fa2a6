"""Build an optimizer's state before its first step, as memory into which a checkpoint is read.

The state is built from names, types and shapes in the checkpoint and from the recorded form, not by a step: a step may
change counters that the optimizer keeps elsewhere, and some optimizers cannot step with zero gradients. Two cases need
`zero_step`:

- objects in a state (with ``state_dict`` and ``load_state_dict``), which only the optimizer can create;
- the check for another optimizer, if the recorded class differs or is missing.
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
    """Record the state that a restore has built, so that it can be undone. `optimizer` is the innermost one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._previous: list[tuple[Tensor, Any]] = []
        self._objects: list[tuple[Branch, Path, Any]] = []

    def put(self, tensor: Tensor, state: dict[Any, Any]) -> None:
        """Set the optimizer's state of a tensor."""
        self._previous.append((tensor, self.optimizer.state.pop(tensor, None)))
        self.optimizer.state[tensor] = state

    def expect(self, state: dict[Any, Any], path: Path, value: Any) -> None:
        """Register an object. `finish` loads into it the values read at `path`, and stores the object there."""
        self._objects.append((Branch(state), path, value))

    def finish(self) -> None:
        """Load the values that were read into the registered objects, and store the objects."""
        for branch, path, value in self._objects:
            value.load_state_dict(branch[path])
            branch[path] = value

    def undo(self) -> None:
        """Restore the optimizer's previous state after an error."""
        for tensor, state in reversed(self._previous):
            self.optimizer.state.pop(tensor, None)
            if state is not None:
                self.optimizer.state[tensor] = state


def build_state(
    built: BuiltState, optimized: Sequence[OptimizedTensor], stored: CheckpointIndex, record: OptimizerRecord
) -> None:
    """Build the innermost optimizer's state, without values, of every tensor that has state in the checkpoint.

    Effects: not collective, unless the optimizer's step is; main thread, before training. Existing state is kept.

    Args:
        built: records the changes; call its `undo` after an error.
        optimized: all tensors that the optimizer steps on, from `find_optimized`.
        stored: index of the checkpoint.
        record: the optimizer's record in the checkpoint.

    Raises:
        CheckpointError: if another optimizer was saved, or objects in its state cannot be created.
        DamagedError: if the recorded form does not match the stored tensors.
    """
    wanted = [each for each in optimized if any(stored.state_of(name) for name in each.names)]
    example: Mapping[Any, Any] = {}
    if record.class_name != class_name(built.optimizer):
        example = _check_optimizer(built.optimizer, optimized, wanted, stored, record)
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
    # A flat partition has one state for many parameters; use the form of the one with the most kinds.
    name = max((stored.name_of(name) for name in each.names), key=lambda name: len(stored.state_of(name)))
    form = record.forms.get(name) or _form_without(record, stored.state_of(name))
    state = build(form, lambda path, kind: _leaf(each, name, path, kind, stored, example))
    live = optimizer.state.get(each.tensor) or {}
    objects = list(objects_in(form))
    if live.keys() >= state.keys() and not objects:
        return
    # An object's state_dict may return copies, so the file is read into the built state.
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
    """Return the form of a state without a recorded one: a dict of tensors.

    Checkpoints of versions that did not record forms do not distinguish a plain number from a 0-dimensional 64-bit
    tensor; a plain number is assumed, except for F64 if torch's default type is float64.
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
    """Allocate one tensor or number. A number gets its type from `example`, a state that this optimizer created."""
    of_name = ".".join(map(str, path))
    place = stored.state_of(name).get(of_name)
    if place is None:
        raise DamagedError(
            f"{stored.checkpoint}: trainer_state.json lists {of_name}.{name}, which optimizer.safetensors lacks; use "
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
        # In a flat partition, padding and parameters without state must be zero.
        make = torch.zeros_like if is_flat else torch.empty_like
        value = make(each.tensor, dtype=_dtype(each, name, place, stored), requires_grad=False)
        _advise_huge_pages(getattr(value, "_local_tensor", value))
        return value
    shape = place.tensor.shape
    if math.prod(shape) != 1:
        return torch.empty(shape, dtype=_dtype(each, name, place, stored), device=each.tensor.device)
    # Single elements are on the host unless a kernel reads them, as in torch's load_state_dict.
    is_on_device = kind == "device_tensor" or each.group.get("capturable") or each.group.get("fused")
    return torch.empty(shape, dtype=DTYPES[place.tensor.dtype], device=each.tensor.device if is_on_device else "cpu")


def _advise_huge_pages(tensor: Tensor) -> None:
    """Request huge pages for a new CPU tensor: reading 144 MB from the page cache takes 62 instead of 128 ms."""
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
    """Return the type of the optimized tensor if stored state and master have the same type, else the stored type."""
    master = stored.master(name)
    is_same = master is not None and master.dtype == place.dtype and place.dtype.is_floating_point
    return each.tensor.dtype if is_same else place.dtype


def _made(optimizer: Any, made: Branch, path: Path, name: str) -> Any:
    value = _found(made, path)
    if value is not None:
        return value
    raise CheckpointError(
        f"{type(optimizer).__name__}: made no {'.'.join(map(str, path))} of {name} in a step with zero gradients, so "
        "it cannot be resumed; restore the weights only"
    )


def _found(state: Branch, path: Path) -> Any:
    """Return the object or tensor at a path of a state, or None."""
    try:
        value = state[path]
    except (KeyError, IndexError, TypeError):
        return None
    return value if isinstance(value, Tensor) or is_object(value) else None


def _check_optimizer(
    optimizer: Any,
    optimized: Sequence[OptimizedTensor],
    wanted: Sequence[OptimizedTensor],
    stored: CheckpointIndex,
    record: OptimizerRecord,
) -> Mapping[Any, Any]:
    """Compare the names in the checkpoint's state of one parameter with those that `zero_step` creates.

    Return the state that it creates, or an empty one if it fails. Raise `CheckpointError` if the names differ.
    """
    if not wanted and not stored.step:
        return {}
    candidates = [each for each in wanted or optimized if each.tensor.numel() and (wanted or each.tensor.requires_grad)]
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
            f"{type(optimizer).__name__} keeps one: it holds the weights only, or another optimizer was saved; restore "
            "the weights only, or resume with the optimizer that was saved"
        )
    was = f"{record.class_name} was saved" if record.class_name else "another optimizer was saved"
    raise CheckpointError(
        f"{stored.checkpoint}: has {_some(has)} of {name}, and {type(optimizer).__name__} keeps {_some(keeps)} ({was})"
        "; resume with the optimizer that was saved, or restore the weights only"
    )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def check_objects(optimizer: Any, optimized: Sequence[OptimizedTensor], forms: Mapping[str, Form]) -> None:
    """Check that a resume can create the objects in an optimizer's state, by one `zero_step` of one such tensor.

    Effects: as `zero_step`; the tensor's values are restored.

    Raises:
        CheckpointError: if the optimizer does not create the objects, or the step fails.
    """
    for each in optimized:
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
