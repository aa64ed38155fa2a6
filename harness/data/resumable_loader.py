"""Yield an epoch's batches from any position, with the random states of that position.

    epoch start    capture the states of this process's generators and the loader's
    fetch          in this process: capture the states before it
                   in a worker: seed the generators by epoch and batch, so that any worker can load it
    checkpoint     store the captured states, and the states after its step
    resume         states of the epoch's start -> the sampler skips -> states before the fetch -> states after the step

A loader from `accelerator.prepare` fetches one batch ahead. The batch after a checkpoint was therefore fetched before
the checkpoint's step, with other random states. A loader that was not prepared fetches each batch on demand, with the
states after the previous step.
"""

from __future__ import annotations

import base64
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
from harness.data.batch_sampler import IterationPlan, WrappedSampler, unwrap, wrap


@dataclass
class DataState:
    """The random states of one rank that a resume within an epoch needs.

    Args:
        start: states of this process before the current loader started; empty if no loader is current.
        generators: for each loader of the epoch, the states of its generators; the current loader's before it started.
        fetch: states before the latest fetch in this process; None if workers fetch, or batches are fetched on demand.
    """

    start: dict[str, Any] = field(default_factory=dict)
    generators: Sequence[Sequence[Tensor]] = ()
    fetch: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert the states to JSON values; from any thread."""
        return {
            "start": rng_state.encode(self.start),
            "generators": [
                [base64.b64encode(state.numpy().tobytes()).decode() for state in each] for each in self.generators
            ],
            "fetch": None if self.fetch is None else rng_state.encode(self.fetch),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> DataState:
        """Read the result of `to_json`."""
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
class ResumePoint:
    """A position in a loader, of one rank.

    Args:
        batches_done: number of the loader's batches that were trained on.
        rng_states: captured states after the last step; None if the number of ranks has changed.
    """

    batches_done: int
    data: DataState
    rng_states: dict[str, Any] | None


class ResumableLoader:
    """Iterates over an epoch's training loaders, and provides the state that a resume within the epoch needs.

    Effects: as accelerate's own iteration; main thread; a loader's batch sampler is wrapped until `close`.

    Args:
        seeds_workers: seed workers for each batch, so that they draw the same numbers after a resume. If false, workers
            draw as without this class, and draw new numbers after a resume within an epoch.

    Attributes:
        loaders_done: number of completed training loaders of the epoch.
        batches_done: number of completed batches of the next loader.
        iteration_id: number of the current iteration, from 1; 0 if none is current.
    """

    def __init__(self, accelerator: Accelerator, *, seeds_workers: bool = True) -> None:
        self._accelerator = accelerator
        self._device = accelerator.device
        self._seeds_workers = seeds_workers
        self.loaders_done = 0
        self.batches_done = 0
        self.iteration_id = 0
        self._num_iterations = 0
        # The generators of each loader of the epoch, and the index of the latest loader, skipped ones included.
        self._generators: list[list[torch.Generator]] = []
        self._index = -1
        self._current: DataState | None = None
        self._sampler: WrappedSampler | None = None
        self._wrapped: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()
        # The start position of the current iteration; None for the first batch.
        self._resume_point: ResumePoint | None = None
        # The state that a resume restores, until a loader has started; and its generator states.
        self._resumed: DataState | None = None
        self._saved_generators: Sequence[Sequence[Tensor]] = ()
        self._restored_ids: set[int] = set()
        # torch's state before the only seed that persistent workers draw.
        self._state_before_seed: Tensor | None = None
        # By id: earlier states of generators from which the next epoch has already drawn.
        self._states_before_next_epoch: Mapping[int, Tensor] = {}

    @property
    def state(self) -> DataState:
        """The state that a checkpoint stores now, besides the process's random states."""
        if self._resumed is not None:
            return self._resumed
        now = [[self._state_of(generator) for generator in each] for each in self._generators]
        if self._current is None:
            return DataState({}, now, None)
        # A copy, because it is encoded while the next batches are fetched.
        now[self._index] = list(self._current.generators[0])
        return replace(self._current, generators=now)

    def _state_of(self, generator: torch.Generator) -> Tensor:
        earlier = self._states_before_next_epoch.get(id(generator))
        return generator.get_state() if earlier is None else earlier

    @contextmanager
    def before_next_epoch(self, generator_states: Mapping[int, Tensor]) -> Iterator[None]:
        """Exclude the next epoch's iteration, which has started already, from `state` within the context.

        The argument has the generators' states before that iteration, by `id`.
        """
        self._states_before_next_epoch = generator_states
        try:
            yield
        finally:
            self._states_before_next_epoch = {}

    def restore(self, data: DataState, loaders_done: int, batches_done: int) -> None:
        """Resume at a position; generators are restored when their loaders start or are skipped."""
        self._resumed, self._saved_generators = data, data.generators
        self.loaders_done, self.batches_done = loaders_done, batches_done

    def skip_loader(self, loader: Any) -> None:
        """Skip a loader of the epoch that was completed before the interruption."""
        self._register(loader)
        self._restore_generators()

    def begin(self, loader: Any, resume_point: ResumePoint | None) -> tuple[Any, Iterator[Any]]:
        """Start the epoch's next loader at a position, or at its first batch, and return it with its batches."""
        point = resume_point if resume_point is not None and resume_point.batches_done else None
        self._begin_iteration(loader, 0 if point is None else point.batches_done)
        # Without worker seeds an uninterrupted run must draw exactly as without this class.
        sets_states = self._seeds_workers or self._resumed is not None
        self._state_before_seed = torch.get_rng_state() if sets_states and _draws_seed_once(loader) else None
        if point is None:
            # Before the iteration, because it draws the workers' seeds first.
            self._restore_generators()
        self._resume_point = point
        sampler = self._sampler = self.wrap_sampler(loader)
        prefetches = hasattr(loader, "base_dataloader")  # accelerate's loaders do
        if sampler is None:
            self.on_iteration_start()
            return loader, self._replay(loader, point, prefetches=prefetches)
        rng_states: Sequence[dict[str, Any]] = ()
        if sampler.loads_in_process and point is not None and point.rng_states:
            after = point.rng_states
            rng_states = (point.data.fetch or after, after) if prefetches else (after,)
        reports_fetches = sampler.loads_in_process and prefetches
        sampler.plan = IterationPlan(self.batches_done, self, reports_fetches, rng_states)
        if prefetches and (point is None or rng_states):
            # accelerate's iteration draws nothing before its first batch is requested.
            return loader, iter(loader)
        return loader, self._iterate(loader, None if rng_states else point, prefetches=prefetches)

    def wrap_sampler(self, loader: Any) -> WrappedSampler | None:
        """Wrap a loader's batch sampler until `close`; None if the loader's kind is not supported."""
        base = getattr(loader, "base_dataloader", loader)
        sampler = wrap(loader, base, self._device, seeds_workers=self._seeds_workers)
        if sampler is not None:
            self._wrapped.add(base)
        return sampler

    def adopt(self, loader: Any, sampler: WrappedSampler | None, data: DataState) -> None:
        """Make an iteration over a loader that has started already the current one.

        The iteration's listener continues to update `data`.
        """
        self._begin_iteration(loader, 0)
        self._resumed, self._current, self._sampler = None, data, sampler

    def _begin_iteration(self, loader: Any, batches_done: int) -> None:
        self._register(loader)
        self._num_iterations += 1
        self.iteration_id, self.batches_done = self._num_iterations, batches_done

    def _register(self, loader: Any) -> None:
        self._index += 1
        if self._index == len(self._generators):
            self._generators.append([])
        if self._index < len(self._saved_generators) and self._saved_generators[self._index]:
            _ensure_generator(loader)
        self._generators[self._index] = dataloaders.generators_of(loader)

    def _restore_generators(self) -> None:
        """Restore each generator once, because a loader's second iteration in an epoch continues from its first."""
        saved = self._saved_generators[self._index] if self._index < len(self._saved_generators) else ()
        for generator, state in zip(self._generators[self._index], saved, strict=False):
            if id(generator) not in self._restored_ids:
                generator.set_state(state)

    def on_iteration_start(self) -> None:
        """Restore the states of the iteration's start on a resume, then capture them. The sampler calls this."""
        if self._state_before_seed is not None:
            torch.set_rng_state(self._state_before_seed)
        if self._resume_point is not None:
            if self._resume_point.data.start:
                rng_state.restore(self._resume_point.data.start, self._device)
            self._restore_generators()
        self._resumed = None
        self._restored_ids |= {id(generator) for each in self._generators[: self._index + 1] for generator in each}
        generators = [each.get_state() for each in self._generators[self._index]]
        self._current = DataState(rng_state.capture(self._device), [generators], None)

    def on_fetch(self) -> None:
        """Capture the random states before a fetch in this process. The sampler calls this."""
        assert self._current is not None
        self._current.fetch = rng_state.capture(self._device)

    def _iterate(self, loader: Any, point: ResumePoint | None, *, prefetches: bool) -> Iterator[Any]:
        """Yield the batches of a loader whose sampler skips."""
        iterator = iter(loader)
        if point is not None and point.rng_states:
            # Workers load the batches, and this process draws only indices, which a prefetching loader requests early.
            first = next(iterator, None) if prefetches else None
            rng_state.restore(point.rng_states, self._device)
            if prefetches:
                if first is None:
                    return
                yield first
        yield from iterator

    def _replay(self, loader: Any, point: ResumePoint | None, *, prefetches: bool) -> Iterator[Any]:
        """Yield the batches of a loader that cannot skip, after it has loaded and dropped the completed ones again.

        Batches are requested in the same order as before the checkpoint, with the captured random states.
        """
        iterator, iteration_id = iter(loader), self.iteration_id
        loads_in_process = getattr(getattr(loader, "base_dataloader", loader), "num_workers", 0) == 0
        if point is not None:
            for number in range(1, point.batches_done + 1):
                is_last = number == point.batches_done
                if prefetches and is_last and number > 1 and point.rng_states and point.data.fetch:
                    # The request for the last of these batches fetches the next one too.
                    rng_state.restore(point.data.fetch, self._device)
                next(iterator, None)
            if point.rng_states:
                rng_state.restore(point.rng_states, self._device)
        while True:
            if prefetches and loads_in_process and self.iteration_id == iteration_id:
                self.on_fetch()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch

    def end_loader(self) -> None:
        """Mark the loader as completed; a later checkpoint stores only its generators' states."""
        self._current = None
        self.iteration_id, self.loaders_done, self.batches_done = 0, self._index + 1, 0

    def cancel(self) -> None:
        """Undo `begin` for an iteration that does not train and has yielded no batch."""
        self.release()
        self._current = None
        self._index -= 1
        self.iteration_id = self.batches_done = 0

    def release(self) -> None:
        """Stop observing the loader; its next iteration belongs to the script and covers all batches."""
        if self._sampler is not None:
            self._sampler.reset()
            self._sampler = None

    def close(self) -> None:
        """Unwrap every loader's sampler; a running iteration continues."""
        self.release()
        while self._wrapped:
            unwrap(self._wrapped.pop())

    def end_epoch(self) -> None:
        """Reset the position; the next loader is the first one of an epoch."""
        self._index, self.loaders_done, self.batches_done = -1, 0, 0

    @property
    def next_loader_index(self) -> int:
        """Index of the epoch's next loader, skipped ones included."""
        return self._index + 1


def _draws_seed_once(loader: Any) -> bool:
    """Whether only this iteration, the first one of persistent workers, draws a seed.

    It may be the first one in a resumed process and a later one in an uninterrupted process.
    """
    base = getattr(loader, "base_dataloader", loader)
    is_first = getattr(base, "_iterator", None) is None
    return getattr(base, "persistent_workers", False) and is_first and base.generator is None


def _ensure_generator(loader: Any) -> None:
    """Add a generator to a shuffling sampler, as accelerate does on several ranks."""
    sampler = dataloaders.sampler_of(loader)
    if dataloaders.has_random_order(loader) and sampler.generator is None:
        sampler.generator = torch.Generator()
