"""A wrapper around a loader's batch sampler, by which an iteration can start at any batch.

`wrap` installs it and `unwrap` removes it. While it is installed, an iteration over the loader follows an
`IterationPlan`: it skips batches, restores random states, and reports its start and each fetch. Batches that workers
load get a seed each, so that a worker draws the same random numbers for a batch from whichever batch it starts.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from harness.data import rng_state


class IterationListener(Protocol):
    """Is notified of an iteration over a wrapped sampler, on the thread that iterates."""

    def on_iteration_start(self) -> None:
        """Called before the sampler draws anything."""

    def on_fetch(self) -> None:
        """Called before a batch is drawn and loaded, if the plan asks for it."""


@dataclass(frozen=True)
class IterationPlan:
    """What the next iteration over a sampler does.

    Args:
        num_skipped: leading batches that are left out.
        listener: is notified of the iteration.
        reports_fetches: whether the listener is notified of fetches too.
        rng_states: random states to restore, one before each of the first fetches; the last one is the state after the
            last step before the interruption.
    """

    num_skipped: int = 0
    listener: IterationListener | None = None
    reports_fetches: bool = False
    rng_states: Sequence[dict[str, Any]] = ()


class _SeededBatch(list[int]):
    """Indices of a batch, with the seed for the worker that loads it."""

    seed: int = 0


# The wrapper's own attributes; any other attribute is read from and set on the wrapped sampler.
_OWN = frozenset(("_inner", "_device", "_seeds_workers", "_reporting", "loads_in_process", "plan"))


class WrappedSampler(BatchSampler):
    """Another batch sampler, whose iterations follow a plan.

    Attributes:
        loads_in_process: whether this process loads the batches, and not workers.
        plan: of the next iteration only.
    """

    def __init__(self, inner: Any, device: torch.device, *, loads_in_process: bool, seeds_workers: bool) -> None:
        self._inner = inner
        self._device = device
        self._seeds_workers = seeds_workers
        # Identity of the iteration that reports its fetches.
        self._reporting: object | None = None
        self.loads_in_process = loads_in_process
        self.plan = IterationPlan()

    def reset(self) -> None:
        """Cancel the plan, and the reports of an iteration that runs."""
        self._reporting = None
        self.plan = IterationPlan()

    def __reduce__(self) -> Any:
        # A copy of the loader gets the wrapped sampler: a listener would bring the training objects along.
        return copy.copy, (self._inner,)

    def __getattr__(self, name: str) -> Any:
        # accelerate reads the sampler's size, its inner sampler and its epoch.
        return getattr(self.__dict__["_inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate's `join_uneven_inputs` sets `even_batches`.
        inner = self.__dict__.get("_inner")
        holder = inner if name not in _OWN and hasattr(inner, name) else super()
        holder.__setattr__(name, value)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[int]]:
        # The plan is for this iteration: a nested one over the same loader is the script's own.
        plan, self.plan = self.plan, IterationPlan()
        this = object()
        if plan.reports_fetches:
            self._reporting = this
        # Reported here and not before the loader's iteration, in which old and new workers draw differently.
        if plan.listener is not None:
            plan.listener.on_iteration_start()
        # One random number for each epoch; the batches' seeds follow from it, on any rank and in any worker.
        epoch_seed = int(torch.empty((), dtype=torch.int64).random_().item()) if self._seeds_workers else 0
        iterator = iter(self._inner)
        position = 0
        while position < plan.num_skipped and next(iterator, None) is not None:
            position += 1
        rng_states = list(plan.rng_states)
        while True:
            if rng_states:
                rng_state.restore(rng_states.pop(0), self._device)
            # Before the indices are drawn: a sampler may draw each of them from this process's generators.
            if plan.listener is not None and self._reporting is this:
                plan.listener.on_fetch()
            indices = next(iterator, None)
            if indices is None:
                if rng_states:
                    rng_state.restore(rng_states[-1], self._device)
                return
            yield _seeded(indices, epoch_seed, position) if self._seeds_workers else indices
            position += 1


def _seeded(indices: list[int], epoch_seed: int, position: int) -> _SeededBatch:
    batch = _SeededBatch(indices)
    # Generators are seeded with this value as it is, so it must differ widely between neighbouring batches.
    batch.seed = int(np.random.SeedSequence([epoch_seed & (2**63 - 1), position]).generate_state(1, np.uint32)[0])
    return batch


def wrap(loader: Any, base: Any, device: torch.device, *, seeds_workers: bool) -> WrappedSampler | None:
    """Wrap a loader's batch sampler.

    Args:
        loader: as training iterates over it.
        base: the torch loader inside it.
        device: this rank's.
        seeds_workers: whether batches that workers load get a seed each.

    Returns:
        The wrapper, which may be there already; None if the loader's kind is not supported.
    """
    if isinstance(loader, DataLoaderDispatcher):
        return None  # rank zero reads several of its batches at once, for all ranks
    if type(base) is not DataLoader or isinstance(base.dataset, IterableDataset) or base.batch_sampler is None:
        return None
    if isinstance(base.batch_sampler, WrappedSampler):
        return base.batch_sampler
    loads_in_process = base.num_workers == 0
    seeds_workers = seeds_workers and not loads_in_process
    sampler = WrappedSampler(base.batch_sampler, device, loads_in_process=loads_in_process, seeds_workers=seeds_workers)
    _set_sampler(base, base.batch_sampler, sampler)
    if seeds_workers:
        base.worker_init_fn = functools.partial(_init_worker, base.worker_init_fn)
    return sampler


def unwrap(base: DataLoader[Any]) -> None:
    """Undo `wrap`; an iteration that runs continues."""
    sampler, init = base.batch_sampler, base.worker_init_fn
    if isinstance(sampler, WrappedSampler):
        _set_sampler(base, sampler, sampler._inner)
    if isinstance(init, functools.partial) and init.func is _init_worker:
        base.worker_init_fn = init.args[0]


def _set_sampler(base: DataLoader[Any], old: Any, new: Any) -> None:
    # A loader refuses the assignment of this attribute after its construction.
    base.__dict__["batch_sampler"] = new
    # Persistent workers' iterator is reused for later epochs and has a reference of its own.
    iterator: Any = getattr(base, "_iterator", None)
    if getattr(iterator, "_index_sampler", None) is old:
        iterator._index_sampler = new


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """In a worker: seed its generators for each batch."""
    if init is not None:
        init(worker)
    info = get_worker_info()
    assert info is not None
    dataset: Any = info.dataset
    get_items = getattr(dataset, "__getitems__", None)

    def fetch(indices: list[int]) -> Any:
        seed = getattr(indices, "seed", None)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return get_items(indices) if get_items is not None else [dataset[index] for index in indices]

    # A data set with slots refuses the attribute: its workers keep torch's seeds.
    with suppress(AttributeError):
        dataset.__getitems__ = fetch
