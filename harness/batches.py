"""One epoch's batches of a prepared loader, from any position on, with the random numbers as they were.

    epoch begins   the random numbers, and those of the loader's generator        are kept
    a fetch        in this process: the random numbers before it                  are kept
                   in a worker: they are seeded by epoch and batch, whoever loads it
    a checkpoint   has what is kept, and the random numbers after its step
    resumed        as the epoch began -> the sampler skips -> as before that fetch -> as after that step

accelerate fetches one batch ahead, so the batch after a checkpoint was fetched before its step was done:
with other random numbers than those that the checkpoint ends with.
"""

from __future__ import annotations

import base64
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from harness import random_state


@dataclass
class DataState:
    """What of the random numbers is needed to go on within an epoch; of one rank.

    Args:
        start: before the epoch's iteration began; empty: it has not.
        generator: of the loader's own generator, at the same time; None: it has none.
        fetch: before the latest batch was fetched in this process; None: workers fetch.
    """

    start: dict[str, Any]
    generator: torch.Tensor | None = None
    fetch: dict[str, Any] | None = None

    def encoded(self) -> dict[str, Any]:
        """As JSON values; from any thread."""
        generator = None if self.generator is None else base64.b64encode(self.generator.numpy().tobytes()).decode()
        fetch = None if self.fetch is None else random_state.encoded(self.fetch)
        return {"start": random_state.encoded(self.start), "generator": generator, "fetch": fetch}

    @classmethod
    def decoded(cls, record: dict[str, Any]) -> DataState:
        """What `encoded` was called on."""
        generator, fetch = record["generator"], record["fetch"]
        return cls(
            random_state.decoded(record["start"]),
            None if generator is None else torch.frombuffer(bytearray(base64.b64decode(generator)), dtype=torch.uint8),
            None if fetch is None else random_state.decoded(fetch),
        )


@dataclass(frozen=True)
class Continuation:
    """Where to go on, of one rank.

    Args:
        num_taken: batches of the epoch that are done.
        data: as it was then; None: the random numbers are not those of that run (another number of ranks).
        random: the random numbers after the last step, as `random_state.take` gives them.
    """

    num_taken: int
    data: DataState | None
    random: dict[str, Any]


class TrainingBatches:
    """Iterates over training loaders, and knows what a checkpoint must have to go on in the middle.

    Effects: as accelerate's own iteration; main thread; a loader's batch sampler is wrapped, for good.

    Args:
        accelerator: that prepared the loaders.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._state: DataState | None = None
        self._generator: torch.Generator | None = None

    @property
    def state(self) -> DataState | None:
        """What a checkpoint of now needs beside its random numbers."""
        # A copy: it is encoded while the next batches are fetched.
        return None if self._state is None else replace(self._state)

    def begin(self, loader: Any, continuation: Continuation | None) -> tuple[Any, Iterator[Any]]:
        """Begin an epoch, or go on in one.

        Args:
            loader: a loader that went through `accelerator.prepare`.
            continuation: from where; None: from the epoch's start.

        Returns:
            The loader that is really iterated over, and its batches.
        """
        self._generator = getattr(loader, "synchronized_generator", None)
        start = functools.partial(self._start, None if continuation is None else continuation.data)
        sampler = _wrapped(loader, self._accelerator.device)
        if sampler is None:
            start()
            if continuation is not None and continuation.num_taken:
                # Nothing is known of what it draws: the batches are drawn again, and dropped.
                loader = self._accelerator.skip_first_batches(loader, continuation.num_taken)
        else:
            sampler.at_start = start
            sampler.num_skipped = 0 if continuation is None else continuation.num_taken
            # A loader that accelerate has not prepared does not fetch ahead.
            is_ahead = hasattr(loader, "base_dataloader")
            sampler.before_fetch = self._keep if sampler.fetches_here and is_ahead else None
            if sampler.fetches_here and continuation is not None and continuation.num_taken:
                sampler.resumed, continuation = continuation, None
        return loader, self._iterate(loader, continuation)

    def _start(self, before: DataState | None) -> None:
        """The sampler begins: as it began before, if this epoch goes on."""
        device, generator = self._accelerator.device, self._generator
        if before is not None:
            if before.start:
                random_state.put_back(before.start, device)
            if generator is not None and before.generator is not None:
                generator.set_state(before.generator)
        self._state = DataState(random_state.take(device), None if generator is None else generator.get_state(), None)

    def _iterate(self, loader: Any, continuation: Continuation | None) -> Iterator[Any]:
        iterator = iter(loader)
        if continuation is not None and continuation.num_taken:
            # Nothing that is fetched from here on draws from this process's random numbers.
            first = next(iterator, None)
            random_state.put_back(continuation.random, self._accelerator.device)
            if first is None:
                return
            yield first
        yield from iterator

    def _keep(self) -> None:
        assert self._state is not None
        self._state.fetch = random_state.take(self._accelerator.device)

    def end(self) -> None:
        """The epoch is over: of it a checkpoint needs only where the loader's generator stands."""
        generator = self._generator
        self._state = None if generator is None else DataState({}, generator.get_state())


class _Batch(list[int]):
    """Indices of a batch, with the seed of the random numbers that its worker draws."""

    seed: int = 0


class _Sampler(BatchSampler):
    """Another batch sampler, which can begin later, and says when a batch is about to be fetched."""

    def __init__(self, inner: Any, device: torch.device, *, fetches_here: bool) -> None:
        self._inner = inner
        self._device = device
        self.fetches_here = fetches_here
        self.num_skipped = 0
        self.at_start: Callable[[], None] | None = None
        self.before_fetch: Callable[[], None] | None = None
        self.resumed: Continuation | None = None

    def __getattr__(self, name: str) -> Any:
        # accelerate asks the sampler for its size, its own sampler, its epoch.
        return getattr(self.__dict__["_inner"], name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[int]]:
        # Here and not before the loader's iteration: what that draws differs between workers that are new and old.
        if self.at_start is not None:
            self.at_start()
        # One number of the epoch's, from which each batch's follow: on any rank, in any worker.
        seed = 0 if self.fetches_here else int(torch.empty((), dtype=torch.int64).random_().item())
        iterator = iter(self._inner)
        position = 0
        while position < self.num_skipped and next(iterator, None) is not None:
            position += 1
        resumed, self.resumed = self.resumed, None
        num_asked = 0
        fetch = None if resumed is None or resumed.data is None else resumed.data.fetch
        while True:
            if resumed is not None and fetch is not None and num_asked == 1:
                random_state.put_back(resumed.random, self._device)
            indices = next(iterator, None)
            if resumed is not None and num_asked == 0:
                random_state.put_back(resumed.random if indices is None or fetch is None else fetch, self._device)
            if indices is None:
                return
            if self.before_fetch is not None:
                self.before_fetch()
            yield indices if self.fetches_here else _seeded(indices, seed, position)
            position += 1
            num_asked += 1


def _seeded(indices: list[int], seed: int, position: int) -> _Batch:
    batch = _Batch(indices)
    # Far apart for neighbours: generators are seeded with it as it is.
    batch.seed = int(np.random.SeedSequence([seed & (2**63 - 1), position]).generate_state(1, np.uint32)[0])
    return batch


def _wrapped(loader: Any, device: torch.device) -> _Sampler | None:
    """The sampler of a loader, wrapped; None where its batches do not come from one that is understood."""
    base = getattr(loader, "base_dataloader", loader)
    if type(base) is not DataLoader or isinstance(base.dataset, IterableDataset) or base.batch_sampler is None:
        return None
    if isinstance(base.batch_sampler, _Sampler):
        return base.batch_sampler
    sampler = _Sampler(base.batch_sampler, device, fetches_here=base.num_workers == 0)
    # Not by assignment, which a loader refuses once it is made.
    base.__dict__["batch_sampler"] = sampler
    if base.num_workers:
        base.worker_init_fn = functools.partial(_begin_worker, base.worker_init_fn)
    return sampler


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
