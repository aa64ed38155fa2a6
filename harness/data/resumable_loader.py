"""One epoch's batches of prepared loaders, from any position on, with the random numbers as they were.

    epoch begins   the random numbers, and those of the loader's generator        are kept
    a fetch        in this process: the random numbers before it                  are kept
                   in a worker: they are seeded by epoch and batch, whoever loads it
    a checkpoint   has what is kept, and the random numbers after its step
    resumed        as the epoch began -> the sampler skips -> as before that fetch -> as after that step

A loader that accelerate has prepared fetches one batch ahead. The batch after a checkpoint was therefore fetched before
the checkpoint's step, from other random numbers than those after it. A loader that was not prepared fetches each batch
when it is asked for, from the random numbers after the step before.
"""

from __future__ import annotations

import base64
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from harness.data import dataloaders, rng_state
from harness.data.batch_sampler import WrappedSampler, unwrap, wrap


@dataclass
class DataState:
    """What of the random numbers is needed to go on within an epoch; of one rank.

    Args:
        start: of this process, before the loader that is running began; empty: none is.
        generators: by loader of the epoch, the states of its own generators: of the one that is running, before
            it began; of the others, now.
        fetch: before the latest batch was fetched in this process; None: workers fetch, or it is fetched when it is
            asked for.
    """

    start: dict[str, Any] = field(default_factory=dict)
    generators: Sequence[Sequence[Tensor]] = ()
    fetch: dict[str, Any] | None = None

    def encoded(self) -> dict[str, Any]:
        """As JSON values; from any thread."""
        return {
            "start": rng_state.encode(self.start),
            "generators": [
                [base64.b64encode(state.numpy().tobytes()).decode() for state in each] for each in self.generators
            ],
            "fetch": None if self.fetch is None else rng_state.encode(self.fetch),
        }

    @classmethod
    def decoded(cls, record: dict[str, Any]) -> DataState:
        """What `encoded` was called on."""
        fetch = record["fetch"]
        return cls(
            rng_state.decode(record["start"]),
            [
                [torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for state in each]
                for each in record["generators"]
            ],
            None if fetch is None else rng_state.decode(fetch),
        )


@dataclass(frozen=True)
class Continuation:
    """Where to go on in a loader, of one rank.

    Args:
        num_taken: batches of it that are done.
        data: as it was then.
        random: the random numbers after the last step, as `rng_state.capture` returns them; None: they are not
            those of that run (another number of ranks).
    """

    num_taken: int
    data: DataState
    random: dict[str, Any] | None


class ResumableLoader:
    """Iterates over an epoch's training loaders, and knows what a checkpoint must have to go on in the middle.

    Effects: as accelerate's own iteration; main thread; a loader's batch sampler is wrapped, until `close`.

    Args:
        accelerator: that prepared the loaders.
        seeds_workers: have each batch's random numbers in a worker begin with a seed of its own, so that they are the
            same from any position on; False: what workers draw stays as it is without this, and so is new after a
            resume within an epoch.

    Attributes:
        loaders_done: training loaders of the epoch that are done.
        num_taken: batches of the next one that are done.
        serial: which iteration is the one that runs, of all that there were; 0: none.
    """

    def __init__(self, accelerator: Accelerator, *, seeds_workers: bool = True) -> None:
        self._accelerator = accelerator
        self._device = accelerator.device
        self._seeds_workers = seeds_workers
        self.loaders_done = 0
        self.num_taken = 0
        self.serial = 0
        self._num_begun = 0
        # By loader of the epoch, in their order; and which of them is the latest, with those that were passed over.
        self._generators: list[list[torch.Generator]] = []
        self._number = -1
        self._running: DataState | None = None
        self._sampler: WrappedSampler | None = None
        self._wrapped: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()
        self._before: Sequence[Sequence[Tensor]] = ()
        # As this process's numbers were before workers were seeded that are seeded once.
        self._unseeded: Tensor | None = None
        # Of generators that the next epoch has drawn from already, their states before that; by id.
        self._before_next: Mapping[int, Tensor] = {}
        # What the run goes on with, until a loader has begun.
        self._resumed: DataState | None = None
        self._put_back: set[int] = set()

    @property
    def state(self) -> DataState:
        """What a checkpoint of now needs beside its random numbers."""
        if self._resumed is not None:
            return self._resumed
        now = [[self._state_of(generator) for generator in each] for each in self._generators]
        if self._running is None:
            return DataState({}, now, None)
        # A copy: it is encoded while the next batches are fetched.
        now[self._number] = list(self._running.generators[0])
        return replace(self._running, generators=now)

    def _state_of(self, generator: torch.Generator) -> Tensor:
        before = self._before_next.get(id(generator))
        return generator.get_state() if before is None else before

    @contextmanager
    def next_has_begun(self, generators: Mapping[int, Tensor]) -> Iterator[None]:
        """Within it `state` is as before a pass that belongs to the next epoch, and had these states then, by `id`."""
        self._before_next = generators
        try:
            yield
        finally:
            self._before_next = {}

    def restore(self, before: DataState, loaders_done: int, num_taken: int) -> None:
        """The run goes on: as its loaders come by, their generators stand where they stood."""
        self._resumed, self._before = before, before.generators
        self.loaders_done, self.num_taken = loaders_done, num_taken

    def skip(self, loader: Any) -> None:
        """A loader of the epoch was done before the run was cut off."""
        self._meet(loader)
        self._put_generators_back()

    def begin(self, loader: Any, continuation: Continuation | None) -> tuple[Any, Iterator[Any]]:
        """Begin the epoch's next loader, or go on in it.

        Args:
            loader: a loader that went through `accelerator.prepare`.
            continuation: from where; None: from its start.

        Returns:
            The loader that is really iterated over, and its batches.
        """
        self._meet(loader)
        self._num_begun += 1
        self.serial = self._num_begun
        self.num_taken = 0 if continuation is None else continuation.num_taken
        # Where nothing was cut off, what is drawn without this is drawn with it.
        is_put_back = self._seeds_workers or self._resumed is not None
        self._unseeded = torch.get_rng_state() if is_put_back and _seeds_workers_once(loader) else None
        goes_on = continuation is not None and continuation.num_taken > 0
        if not goes_on:
            # Before anything is drawn from them: workers' seeds come first.
            self._put_generators_back()
        start = functools.partial(self._start, continuation.data if continuation is not None and goes_on else None)
        sampler = self._sampler = self.wrapped(loader)
        # A loader that accelerate has not prepared does not fetch ahead.
        is_ahead = hasattr(loader, "base_dataloader")
        if sampler is None:
            start()
            return loader, self._replayed(loader, continuation if goes_on else None, is_ahead=is_ahead)
        sampler.at_start = start
        sampler.num_skipped = 0 if continuation is None else continuation.num_taken
        sampler.before_fetch = self._keep if sampler.fetches_here and is_ahead else None
        if sampler.fetches_here and continuation is not None and goes_on and continuation.random:
            after = continuation.random
            sampler.resumed = (continuation.data.fetch or after, after) if is_ahead else (after,)
            continuation = None
        if continuation is None and is_ahead:
            # accelerate's own iteration draws nothing before its first batch is asked for.
            return loader, iter(loader)
        return loader, self._iterate(loader, continuation, is_ahead=is_ahead)

    def wrapped(self, loader: Any) -> WrappedSampler | None:
        """A loader's sampler, wrapped until `close`; None: it is not understood."""
        base = getattr(loader, "base_dataloader", loader)
        sampler = wrap(loader, base, self._device, seeds_workers=self._seeds_workers)
        if sampler is not None:
            self._wrapped.add(base)
        return sampler

    def adopt(self, loader: Any, sampler: WrappedSampler | None, begun: DataState) -> None:
        """A pass that runs is over the epoch's next loader, which was not known when it began.

        Args:
            loader: the loader.
            sampler: what gives its batches, as `wrapped` gave it.
            begun: as it began, and before its latest fetch.
        """
        self._meet(loader)
        self._num_begun += 1
        self.serial = self._num_begun
        self.num_taken = 0
        # Its listener goes on to keep in `begun` what comes before a fetch.
        self._resumed, self._running, self._sampler = None, begun, sampler

    def _meet(self, loader: Any) -> None:
        self._number += 1
        if self._number == len(self._generators):
            self._generators.append([])
        if self._number < len(self._before) and self._before[self._number]:
            _give_generator(loader)
        self._generators[self._number] = dataloaders.generators_of(loader)

    def _put_generators_back(self) -> None:
        """Once each: a loader that comes twice in an epoch has drawn by the second time."""
        before = self._before[self._number] if self._number < len(self._before) else ()
        for generator, state in zip(self._generators[self._number], before, strict=False):
            if id(generator) not in self._put_back:
                generator.set_state(state)

    def _start(self, before: DataState | None) -> None:
        """The sampler begins: as it began before, if this loader goes on."""
        device = self._device
        if self._unseeded is not None:
            torch.set_rng_state(self._unseeded)
        if before is not None:
            if before.start:
                rng_state.restore(before.start, device)
            self._put_generators_back()
        self._resumed = None
        generators = self._generators[self._number]
        self._put_back |= {id(generator) for each in self._generators[: self._number + 1] for generator in each}
        self._running = DataState(rng_state.capture(device), [[each.get_state() for each in generators]], None)

    def _iterate(self, loader: Any, continuation: Continuation | None, *, is_ahead: bool) -> Iterator[Any]:
        """The batches of a loader whose sampler skips."""
        iterator = iter(loader)
        if continuation is not None and continuation.num_taken and continuation.random:
            # Workers load the batches. This process draws for nothing but the indices, which it asks for ahead.
            first = next(iterator, None) if is_ahead else None
            rng_state.restore(continuation.random, self._device)
            if is_ahead:
                if first is None:
                    return
                yield first
        yield from iterator

    def _replayed(self, loader: Any, continuation: Continuation | None, *, is_ahead: bool) -> Iterator[Any]:
        """The batches of a loader that cannot skip: those that are done are loaded again, and dropped.

        Each batch is asked for as it was before the checkpoint, and from the same random numbers where they were kept.
        """
        iterator, serial = iter(loader), self.serial
        fetches_here = getattr(getattr(loader, "base_dataloader", loader), "num_workers", 0) == 0
        for number in range(0 if continuation is None else continuation.num_taken):
            assert continuation is not None
            is_last = number + 1 == continuation.num_taken
            if is_ahead and is_last and number and continuation.random and continuation.data.fetch:
                # With the last of them the loader fetches the next batch.
                rng_state.restore(continuation.data.fetch, self._device)
            next(iterator, None)
        if continuation is not None and continuation.random:
            rng_state.restore(continuation.random, self._device)
        while True:
            if is_ahead and fetches_here and self.serial == serial:
                self._keep()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch

    def _keep(self) -> None:
        assert self._running is not None
        self._running.fetch = rng_state.capture(self._device)

    def end(self) -> None:
        """The loader is done: a checkpoint goes on behind it, and needs only where its generators stand."""
        self._running = None
        self.serial, self.loaders_done, self.num_taken = 0, self._number + 1, 0

    def forget(self) -> None:
        """The iteration that began last was no training's, and has taken nothing."""
        self.leave()
        self._running = None
        self._number -= 1
        self.serial = self.num_taken = 0

    def leave(self) -> None:
        """Nothing is iterated over any more: whoever else uses the loader gets it as it is."""
        if self._sampler is not None:
            self._sampler.reset()
            self._sampler = None

    def close(self) -> None:
        """Nothing of this is in a loader any more; an iteration that runs goes on."""
        self.leave()
        while self._wrapped:
            unwrap(self._wrapped.pop())

    def end_epoch(self) -> None:
        """The next loader is the first one of an epoch again."""
        self._number, self.loaders_done, self.num_taken = -1, 0, 0

    @property
    def next_loader(self) -> int:
        """Number of the epoch's loader that comes next, from 0, with those that were passed over."""
        return self._number + 1


def _seeds_workers_once(loader: Any) -> bool:
    """Whether the iteration that begins draws a seed that those after it do not draw, as persistent workers have it.

    Which iteration is a process's first differs between a run that goes on and one that was not cut off.
    """
    base = getattr(loader, "base_dataloader", loader)
    is_first = getattr(base, "_iterator", None) is None
    return getattr(base, "persistent_workers", False) and is_first and base.generator is None


def _give_generator(loader: Any) -> None:
    """Have the order come from a generator, as it did: accelerate gives a shuffling sampler one on several ranks."""
    sampler = dataloaders.sampler_of(loader)
    if dataloaders.has_random_order(loader) and sampler.generator is None:
        sampler.generator = torch.Generator()
