"""Wrap a loader's batch sampler so that an iteration can start at any batch.

`wrap` installs the wrapper and `unwrap` removes it. Each iteration over a wrapped loader follows an `IterationPlan`: it
skips batches, restores random states, and reports its start and each fetch. Each batch that workers load has its own
seed, so a worker draws the same random numbers for a batch wherever the iteration starts.
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
    """Is notified of an iteration over a wrapped sampler, on the iterating thread."""

    def on_iteration_start(self) -> None:
        """Handle the start, before the sampler draws anything."""

    def on_fetch(self) -> None:
        """Handle a fetch, before the batch is drawn and loaded, if the plan reports fetches."""


@dataclass(frozen=True)
class IterationPlan:
    """The skipped batches, listener and random states of a sampler's next iteration.

    Args:
        num_skipped: number of leading batches to skip.
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


# The wrapper's own attributes; all others are those of the wrapped sampler.
_OWN = frozenset(("_inner", "_device", "_seeds_workers", "_reporting", "loads_in_process", "plan"))


class WrappedSampler(BatchSampler):
    """Iterates over another batch sampler by a plan, which is for the next iteration only."""

    def __init__(self, inner: Any, device: torch.device, *, loads_in_process: bool, seeds_workers: bool) -> None:
        self._inner = inner
        self._device = device
        self._seeds_workers = seeds_workers
        # Identity of the iteration that reports its fetches.
        self._reporting: object | None = None
        self.loads_in_process = loads_in_process
        self.plan = IterationPlan()

    def reset(self) -> None:
        """Cancel the plan, and the reports of a running iteration."""
        self._reporting = None
        self.plan = IterationPlan()

    def __reduce__(self) -> Any:
        # A copy of the loader gets the wrapped sampler, because a listener refers to the training objects.
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
        # The plan is for this iteration only: a nested one over the same loader belongs to the script.
        plan, self.plan = self.plan, IterationPlan()
        this = object()
        if plan.reports_fetches:
            self._reporting = this
        # Reported here, because the loader has then drawn the workers' seeds, which new and persistent workers do
        # differently.
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
            # Before the indices are drawn, because a sampler may draw each from this process's generators.
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
    # Hashed, because generators use this seed as it is, so seeds of adjacent batches must differ widely.
    batch.seed = int(np.random.SeedSequence([epoch_seed & (2**63 - 1), position]).generate_state(1, np.uint32)[0])
    return batch


def wrap(loader: Any, base: Any, device: torch.device, *, seeds_workers: bool) -> WrappedSampler | None:
    """Wrap a loader's batch sampler, or return the wrapper that it has; None if the loader's kind is not supported.

    Training iterates over `loader`, which is or contains the torch loader `base`.
    """
    if isinstance(loader, DataLoaderDispatcher):
        return None  # rank 0 reads several of its batches at once, for all ranks
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
    """Undo `wrap`; a running iteration continues."""
    sampler, init = base.batch_sampler, base.worker_init_fn
    if isinstance(sampler, WrappedSampler):
        _set_sampler(base, sampler, sampler._inner)
    if isinstance(init, functools.partial) and init.func is _init_worker:
        base.worker_init_fn = init.args[0]


def _set_sampler(base: DataLoader[Any], old: Any, new: Any) -> None:
    # A loader refuses to set this attribute after its construction.
    base.__dict__["batch_sampler"] = new
    # The iterator of persistent workers is reused in later epochs and has its own reference.
    iterator: Any = getattr(base, "_iterator", None)
    if getattr(iterator, "_index_sampler", None) is old:
        iterator._index_sampler = new


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Make a worker seed its generators for each batch."""
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

    # A data set with slots refuses the attribute; its workers keep torch's seeds.
    with suppress(AttributeError):
        dataset.__getitems__ = fetch
