"""The batch sampler that is put around a loader's own while training iterates over it.

wrap    by it a loader begins at any batch, with the random numbers as they were, and says when one is fetched
unwrap  the loader is as it was
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from harness.data import rng_state


class _Batch(list[int]):
    """Indices of a batch, with the seed of the random numbers that its worker draws."""

    seed: int = 0


# Attributes of the sampler below that are not those of the one within.
_OWN = frozenset(
    ("_inner", "_device", "_seeds", "_told", "fetches_here", "num_skipped", "at_start", "before_fetch", "resumed")
)


class WrappedSampler(BatchSampler):
    """Another batch sampler, which can begin later, and says when a batch is about to be fetched.

    Attributes:
        fetches_here: whether this process loads the batches, and no worker.
        num_skipped: batches that the next pass leaves out.
        at_start: called as the next pass begins.
        before_fetch: called before each batch of the next pass is drawn and loaded.
        resumed: random states to restore in the next pass, one before each of its first batches is drawn and loaded;
            the last one is that after the last step.
    """

    def __init__(self, inner: Any, device: torch.device, *, fetches_here: bool, seeds: bool) -> None:
        self._inner = inner
        self._device = device
        self._seeds = seeds
        # The pass that tells of its fetches.
        self._told: object | None = None
        self.fetches_here = fetches_here
        self.num_skipped = 0
        self.at_start: Callable[[], None] | None = None
        self.before_fetch: Callable[[], None] | None = None
        self.resumed: Sequence[dict[str, Any]] = ()

    def reset(self) -> None:
        """Whoever iterates next gets all batches, nothing is put back, and no pass that runs tells of its fetches."""
        self._told = None
        self._take()

    def _take(self) -> Any:
        taken = self.num_skipped, self.at_start, self.before_fetch, self.resumed
        self.num_skipped, self.at_start, self.before_fetch, self.resumed = 0, None, None, ()
        return taken

    def __reduce__(self) -> Any:
        # A copy of a loader is nobody's, and what is called here would bring the whole training along.
        return copy.copy, (self._inner,)

    def __getattr__(self, name: str) -> Any:
        # accelerate asks the sampler for its size, its own sampler, its epoch.
        return getattr(self.__dict__["_inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # And sets what it finds there, for a while: `join_uneven_inputs` whether batches are even.
        inner = self.__dict__.get("_inner")
        holder = inner if name not in _OWN and hasattr(inner, name) else super()
        holder.__setattr__(name, value)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[int]]:
        # For this pass: another over the same loader, within it, is none of ours.
        num_skipped, at_start, before_fetch, resumed = self._take()
        this = object()
        if before_fetch is not None:
            self._told = this
        # Here and not before the loader's iteration: what that draws differs between workers that are new and old.
        if at_start is not None:
            at_start()
        # One number of the epoch's, from which each batch's follow: on any rank, in any worker.
        seed = int(torch.empty((), dtype=torch.int64).random_().item()) if self._seeds else 0
        iterator = iter(self._inner)
        position = 0
        while position < num_skipped and next(iterator, None) is not None:
            position += 1
        to_restore = list(resumed)
        while True:
            if to_restore:
                rng_state.restore(to_restore.pop(0), self._device)
            # Before the indices are drawn: a sampler may draw each of them from this process's random numbers.
            if before_fetch is not None and self._told is this:
                before_fetch()
            indices = next(iterator, None)
            if indices is None:
                if to_restore:
                    rng_state.restore(to_restore[-1], self._device)
                return
            yield _seeded(indices, seed, position) if self._seeds else indices
            position += 1


def _seeded(indices: list[int], seed: int, position: int) -> _Batch:
    batch = _Batch(indices)
    # Far apart for neighbours: generators are seeded with it as it is.
    batch.seed = int(np.random.SeedSequence([seed & (2**63 - 1), position]).generate_state(1, np.uint32)[0])
    return batch


def wrap(loader: Any, base: Any, device: torch.device, *, seeds_workers: bool) -> WrappedSampler | None:
    """The sampler of a loader, wrapped; None where its batches do not come from one that is understood."""
    if isinstance(loader, DataLoaderDispatcher):
        return None  # it takes several batches of this at once, on rank zero alone
    if type(base) is not DataLoader or isinstance(base.dataset, IterableDataset) or base.batch_sampler is None:
        return None
    if isinstance(base.batch_sampler, WrappedSampler):
        return base.batch_sampler
    fetches_here = base.num_workers == 0
    seeds = seeds_workers and not fetches_here
    sampler = WrappedSampler(base.batch_sampler, device, fetches_here=fetches_here, seeds=seeds)
    # Persistent workers' passes to come ask what their first one has asked.
    iterator: Any = getattr(base, "_iterator", None)
    if getattr(iterator, "_index_sampler", None) is base.batch_sampler:
        iterator._index_sampler = sampler
    # Not by assignment, which a loader refuses once it is made.
    base.__dict__["batch_sampler"] = sampler
    if seeds:
        base.worker_init_fn = functools.partial(_begin_worker, base.worker_init_fn)
    return sampler


def unwrap(base: DataLoader[Any]) -> None:
    """Put back what `wrap` has replaced; an iteration that runs goes on."""
    sampler, begins, iterator = base.batch_sampler, base.worker_init_fn, getattr(base, "_iterator", None)
    if isinstance(sampler, WrappedSampler):
        base.__dict__["batch_sampler"] = sampler._inner
        # Persistent workers' passes to come ask what their first one has asked.
        if getattr(iterator, "_index_sampler", None) is sampler:
            iterator._index_sampler = sampler._inner  # type: ignore[union-attr]
    if isinstance(begins, functools.partial) and begins.func is _begin_worker:
        base.worker_init_fn = begins.args[0]


def _begin_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """In a worker: have the random numbers of each batch begin with its seed."""
    if then is not None:
        then(worker)
    info = get_worker_info()
    assert info is not None
    dataset: Any = info.dataset
    of_many = getattr(dataset, "__getitems__", None)

    def fetch(indices: list[int]) -> Any:
        seed = getattr(indices, "seed", None)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return of_many(indices) if of_many is not None else [dataset[index] for index in indices]

    # One with slots goes on as torch has seeded its workers.
    with suppress(AttributeError):
        dataset.__getitems__ = fetch
