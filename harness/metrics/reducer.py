"""Weighted means over a window of steps and all ranks, in one fused, asynchronous reduction.

    log({...}, weight)  ->  WeightedSums      device tensors, no synchronisation, one window's worth
    WeightedSums        ->  Reducer.start     packed into one float64 vector, copied to the host
    Reducer.start       ->  all_reduce        on a separate gloo group, in gloo's thread
    Reducer.finish      ->  Reduced           one window later, when the reduction is usually complete

Ranks need not log the same names: a rank may have had no batch of some kind. Beside the sums each reduction carries the
encoded size of the names that are new on a rank. If any is new, all ranks exchange their lists and reduce the new names
in a second collective. In the steady state there is one collective for each window.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.errors import MetricError, PeerFailure
from harness.metrics.values import LoggedValues, as_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Device values that are held for each name before they are summed on their device.
_MAX_PENDING = 256


class _Cell:
    """The sum and the weight logged under one name, and the values that are not summed yet.

    A cell of weight 0 has no value: all that was logged was refused.
    """

    __slots__ = ("held", "total", "weight")

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.weight = 0.0
        # (value, its version or -1 without one, weight)
        self.held: list[tuple[Tensor, int, float]] = []


class WeightedSums:
    """Accumulate value x weight, and the weights, for each name since the last `pop`.

    Effects: not collective; main thread; `add` and `pop` never synchronise with the device, `partial` does; nothing on
    disk.

    Args:
        values: converts what is neither a tensor nor a float, and warns once for each name; None warns in the log.
        holds_all: treat host tensors like device tensors, so that tests reach that path without a device.
    """

    def __init__(self, values: LoggedValues | None = None, *, holds_all: bool = False) -> None:
        self._values = values or LoggedValues(logging.getLogger(__name__).warning)
        self._holds_all = holds_all
        self._cells: dict[str, _Cell] = {}

    def add(self, values: Mapping[str, Any], weight: float = 1.0) -> None:
        """Add one batch's means. Values that are not numbers are left out.

        Args:
            values: name -> 0-d tensor (or of one element), any dtype and device, or number.
            weight: number of items that the means are over. A batch of weight 0 is ignored.

        Raises:
            MetricError: if a tensor has more than one element, the weight is negative, or a held tensor was changed in
                place.
        """
        if not weight >= 0:
            raise MetricError(f"weight: must be 0 or more, got {weight}; give the number of items of the batch")
        if weight == 0:
            return
        # Hot path, run for each metric of each step: avoid extra look-ups and tensor attributes.
        cells, holds_all = self._cells, self._holds_all
        for name, value in values.items():
            cell = cells.get(name)
            if cell is None:
                cell = self._begin(name)
            if isinstance(value, Tensor):
                if value.ndim:
                    if value.numel() != 1:
                        raise MetricError(
                            f"{name}: must be a single number, got a tensor of shape {tuple(value.shape)}; log its "
                            ".mean()"
                        )
                    value = value.reshape(())
                if holds_all or not value.is_cpu:
                    self._hold(name, cell, value, weight)
                    continue
                value = value.item()  # in host memory: does not synchronise
            if type(value) is not float and (value := self._values.number(as_name(name), value)) is None:
                continue
            cell.total += value * weight
            cell.weight += weight

    def _begin(self, name: Any) -> _Cell:
        # A key that is not a str is never found in `_cells`, and is converted here each time.
        return self._cells.setdefault(as_name(name), _Cell())

    def _hold(self, name: str, cell: _Cell, value: Tensor, weight: float) -> None:
        """Keep a device value for later, as reading it now would wait for all work queued on the device."""
        if value.is_complex():
            # Left out with a warning that needs only the type: a host zero avoids a synchronisation.
            self._values.number(as_name(name), value.new_zeros((), device="cpu"))
            return
        if value.requires_grad:
            value = value.detach()  # frees the graph
        held = cell.held
        try:
            held.append((value, value._version, weight))
        except RuntimeError:
            # An inference-mode tensor has no version to detect an in-place change by: copy it.
            held.append((value.clone(), -1, weight))
        if len(held) >= _MAX_PENDING:
            _sum_up(name, cell)

    def _sum_up_all(self) -> Iterator[tuple[str, _Cell]]:
        for name, cell in self._cells.items():
            _sum_up(name, cell)
            if cell.weight:
                yield name, cell

    def pop(self) -> tuple[dict[str, Tensor | float], dict[str, float]]:
        """Return the sums and the weights by name, and reset."""
        found = dict(self._sum_up_all())
        self._cells = {}
        return {name: cell.total for name, cell in found.items()}, {name: cell.weight for name, cell in found.items()}

    def partial(self) -> dict[str, tuple[float, float]]:
        """Return sum and weight of each name without a reset. Waits for values on a device."""
        return {name: (float(cell.total), cell.weight) for name, cell in self._sum_up_all()}

    def restore(self, partial: Mapping[str, tuple[float, float]]) -> None:
        """Restore what `partial` returned."""
        for name, (total, weight) in partial.items():
            cell = self._cells[name] = _Cell()
            cell.total, cell.weight = total, weight


def _sum_up(name: str, cell: _Cell) -> None:
    if not cell.held:
        return
    values = [value for value, _, _ in cell.held]
    for value, version, _ in cell.held:
        if version >= 0 and value._version != version:
            raise MetricError(
                f"{name}: the tensor was changed in place after it was logged; log a copy ({name!r}: x.clone())"
            )
    device = values[-1].device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    # Values of one dtype, the usual case, are converted together.
    same = len({value.dtype for value in values}) == 1
    stacked = torch.stack(values if same else [value.to(dtype) for value in values]).to(dtype)
    held_weights = [weight for _, _, weight in cell.held]
    weights = torch.tensor(held_weights, dtype=dtype)
    if device.type == "cuda":
        weights = weights.pin_memory().to(device, non_blocking=True)
    cell.total = cell.total + (stacked * weights.to(device)).sum()
    cell.weight += sum(held_weights)
    cell.held = []


@dataclass(frozen=True)
class Reduced:
    """The reduced values of one window; the same on every rank.

    Args:
        step: the optimizer step at the window's end.
        values: name -> weighted mean.
        gauges: name -> each rank's own value, in the order of ranks.
    """

    step: int
    values: Mapping[str, float]
    gauges: Mapping[str, tuple[float, ...]]


@dataclass
class _Window:
    """One window in flight: its copy from the device, then its reduction."""

    step: int
    sums: dict[str, float]
    device_sums: Tensor | None
    device_names: tuple[str, ...]
    copied: torch.cuda.Event | None
    weights: dict[str, float]
    gauges: dict[str, float]
    work: dist.Work | None = None
    vector: Tensor | None = None

    def settle(self) -> None:
        if self.device_sums is not None:
            if self.copied is not None:
                self.copied.synchronize()
            self.sums.update(zip(self.device_names, self.device_sums.tolist(), strict=True))
            self.device_sums = None


class Reducer:
    """Reduce windows over all ranks, one at a time, in the order in which they were started.

    Effects: collective on its own group (every rank calls `start` and `finish` at the same steps); main thread; `start`
    and `poll` do not block, `finish` waits at most `timeout_s` for the other ranks to start the same window; nothing on
    disk.

    Args:
        group: a gloo group used by this object alone, or None for a single process.
        gauge_names: names of the values that are kept for each rank.
        timeout_s: limit of each wait, in seconds.
    """

    def __init__(self, group: ProcessGroup | None, gauge_names: Sequence[str], timeout_s: float = 600.0) -> None:
        self._group = group
        self._world_size = 1 if group is None else group.size()
        self._rank = 0 if group is None else group.rank()
        self._gauge_names = tuple(gauge_names)
        self._timeout_s = timeout_s
        self._names: tuple[str, ...] = ()
        self._window: _Window | None = None

    def start(self, sums: WeightedSums, step: int, gauges: Mapping[str, float]) -> None:
        """Start the reduction of the values logged since the last one, which must be finished."""
        assert self._window is None, "a window was started before the one before it was finished"
        by_name, weights = sums.pop()
        on_device = {name: value for name, value in by_name.items() if isinstance(value, Tensor)}
        host = {name: value for name, value in by_name.items() if not isinstance(value, Tensor)}
        device_sums, copied = _copy_to_host(list(on_device.values()))
        self._window = _Window(
            step, host, device_sums, tuple(on_device), copied, weights, {n: float(gauges[n]) for n in self._gauge_names}
        )
        self.poll()

    def poll(self) -> None:
        """Start the all-reduce once the window's copy from the device is complete. Cheap; call it each step."""
        window = self._window
        if window is None or window.work is not None or self._group is None:
            return
        if window.copied is None or window.copied.query():  # type: ignore[no-untyped-call]
            self._send(window)

    @property
    def is_waiting(self) -> bool:
        """Whether a window still waits for its copy from the device."""
        return self._group is not None and self._window is not None and self._window.work is None

    @property
    def is_complete(self) -> bool:
        """Whether `finish` would return without a wait for other ranks, for a rank that is about to end alone."""
        window = self._window
        if window is None or self._group is None:
            return True
        if window.work is None or window.vector is None or not window.work.is_completed():
            return False
        return not window.vector[0]  # not 0: the ranks have names to exchange

    def _send(self, window: _Window) -> None:
        assert self._group is not None
        window.settle()
        unknown = _encode_names(window.sums.keys() - set(self._names))
        # A list: filling a tensor element by element takes ten times as long.
        gauges = [0.0] * (self._world_size * len(self._gauge_names))
        gauges[self._rank :: self._world_size] = [window.gauges[name] for name in self._gauge_names]
        window.vector = torch.tensor(
            [len(unknown), *_sums_and_weights(self._names, window), *gauges], dtype=torch.float64
        )
        window.work = self._group.allreduce([window.vector])

    def finish(self) -> Reduced | None:
        """Return the result of the window that was started, or None without one.

        Raises:
            PeerFailure: if a collective fails or exceeds `timeout_s`.
        """
        window, self._window = self._window, None
        if window is None:
            return None
        if self._group is None:
            window.settle()
            means = {name: window.sums[name] / window.weights[name] for name in sorted(window.sums)}
            return Reduced(window.step, means, {name: (value,) for name, value in window.gauges.items()})
        if window.work is None:
            self._send(window)
        assert window.work is not None and window.vector is not None
        self._wait(window.work, window.step, "the sums")
        unknown_bytes, *summed = window.vector.tolist()
        means = _means(summed, self._names)
        gauges = summed[2 * len(self._names) :]
        if unknown_bytes:
            new_names = self._exchange_names(window, int(unknown_bytes))
            vector = torch.tensor(_sums_and_weights(new_names, window), dtype=torch.float64)
            self._wait(self._group.allreduce([vector]), window.step, "new metrics")
            means |= _means(vector.tolist(), new_names)
            self._names = tuple(sorted({*self._names, *new_names}))
        of_ranks = zip(*[iter(gauges)] * self._world_size, strict=True)
        return Reduced(window.step, dict(sorted(means.items())), dict(zip(self._gauge_names, of_ranks, strict=True)))

    def _exchange_names(self, window: _Window, num_bytes: int) -> tuple[str, ...]:
        """Return the names that some rank has and the agreed list lacks. Collective."""
        mine = _encode_names(window.sums.keys() - set(self._names))
        # Every rank knows the sum of all list sizes, and each list fits into it.
        padded = torch.frombuffer(bytearray(mine.ljust(num_bytes)), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in range(self._world_size)]
        assert self._group is not None
        work = self._group.allgather([gathered], [padded])
        self._wait(work, window.step, "the names of new metrics")
        found: set[str] = set()
        for part in gathered:
            text = bytes(part.numpy()).strip()
            found |= set(json.loads(text)) if text else set()
        return tuple(sorted(found))

    def _wait(self, work: dist.Work | None, step: int, what: str) -> None:
        assert work is not None
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise PeerFailure(
                None, f"the reduction of {what} at step {step} did not complete ({_first_line(error)})"
            ) from error


def _sums_and_weights(names: Sequence[str], window: _Window) -> list[float]:
    return [value for name in names for value in (window.sums.get(name, 0.0), window.weights.get(name, 0.0))]


def _means(values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    pairs = zip(names, values[0 : 2 * len(names) : 2], values[1 : 2 * len(names) : 2], strict=True)
    return {name: total / weight for name, total, weight in pairs if weight}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _encode_names(names: set[str]) -> bytes:
    return json.dumps(sorted(names)).encode() if names else b""


def _copy_to_host(values: list[Tensor]) -> tuple[Tensor | None, torch.cuda.Event | None]:
    """Return 0-d tensors as one host tensor, and the event after which it may be read (None: at once)."""
    if not values:
        return None, None
    device = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
    stacked = torch.stack([value.to(device) for value in values])
    if device.type != "cuda":
        return stacked.to("cpu", torch.float64), None
    host = torch.empty(stacked.shape, dtype=torch.float64, pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event
