"""Find the checkpoint that a run resumes from at its start, and restore it in `watch`.

start     ->  find                                 the run's own checkpoints, or the one that the user named
watch     ->  restore                              tensors, optimizer, scheduler; or initial weights; or nothing
batches   ->  is_loader_done, begin_loader         complete loaders of the epoch; the position in the next one
end_epoch ->  begin_training                       the resume is complete
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.checkpoint.format.names import some
from harness.checkpoint.restore.locate import FoundCheckpoints, find_checkpoints, locate, locate_weights
from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.checkpoint.restore.restore import restore_weights
from harness.checkpoint.restore.resume import (
    PreviousRun,
    Resumed,
    read_previous_run,
    restore_trainer,
    resume,
    set_damaged_aside,
)
from harness.checkpoint.restore.visibility import open_weights, refuse_unseen_checkpoints
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.trainer_state import AnyWatched, TrainerState
from harness.data import dataloaders
from harness.data.resumable_loader import ResumePoint
from harness.errors import CheckpointError
from harness.training.registered_objects import RegisteredObjects
from harness.training.state import TrainingContext


@dataclass(frozen=True)
class ResumeOptions:
    """The source of a run's initial state; see `PeriodicLogger`."""

    resume_from: str = "auto"
    initial_weights: str | None = None
    resets_scheduler: bool = False


class ResumeManager:
    """Find and restore the checkpoint that a run resumes from.

    Effects: `find` and `restore` are collective; main thread; they block for reading and may download files.

    Attributes:
        previous_run: facts of the resumed run, known before anything is restored; empty for a new run.
    """

    def __init__(
        self, context: TrainingContext, registered: RegisteredObjects, run_path: Path, options: ResumeOptions
    ) -> None:
        self._context = context
        self._accelerator = context.accelerator
        self._collectives = context.collectives
        self._registered = registered
        self._run_path = run_path
        self._options = options
        self._remote_files = RemoteFiles(context.collectives)
        self._found: FoundCheckpoints | None = None
        self._watched: AnyWatched | None = None
        # The restored checkpoint until training begins, and the one that the last loader resumed from.
        self._resumed: Resumed | None = None
        self._begun_from: Resumed | None = None
        self.previous_run = PreviousRun()

    def find(self) -> None:
        """Find the checkpoints to resume from, on rank zero.

        Raises:
            HarnessError: on all ranks, if the source that the user named does not exist.
        """
        self._found, self.previous_run = self._collectives.broadcast_from_rank_zero("find the checkpoints", self._find)
        if self._found.is_empty:
            refuse_unseen_checkpoints(self._run_path / "checkpoints", self._collectives)

    def _find(self) -> tuple[FoundCheckpoints, PreviousRun]:
        found = find_checkpoints(self._run_path / "checkpoints")
        for _, reason in found.damaged:
            self._context.warn(reason)
        source = self._options.resume_from
        if source not in ("auto", "never"):
            if found.usable:
                self._context.say(f"the run has checkpoints of its own and resumes from these, not from {source}")
            elif found.is_empty:
                usable = locate("resume_from_checkpoint", source, self._run_path / "downloads", self._tracking_uri)
                found = replace(found, usable=usable)
        return found, read_previous_run(found.usable)

    @property
    def _tracking_uri(self) -> str | None:
        return self._context.tracking.tracking_uri

    def restore(self, watched: AnyWatched) -> Resumed | None:
        """Restore the newest checkpoint, or the initial weights of a new run; return None for a new run.

        Raises:
            CheckpointError: on all ranks, if none of the checkpoints can be restored.
        """
        assert self._found is not None
        resumed = self._resumed = resume(
            self._found,
            self._accelerator,
            self._collectives,
            watched,
            self._remote_files,
            self._context.say,
            resets_scheduler=self._options.resets_scheduler,
        )
        weights = self._options.initial_weights
        if resumed is None:
            if weights is not None:
                self._restore_weights(watched, weights)
            return None
        if weights is not None:
            self._context.say(f"the run is resumed, so initial_weights ({weights}) is not used")
        self._watched = watched
        self._registered.restore(resumed.state.registered)
        return resumed

    def _restore_weights(self, watched: AnyWatched, source: str) -> None:
        context, collectives = self._context, self._collectives
        path = collectives.broadcast_from_rank_zero(
            "find the initial weights",
            lambda: locate_weights("initial_weights", source, self._run_path / "downloads", self._tracking_uri),
        )
        records, files = open_weights(path, collectives, self._remote_files, context.say)
        restored = restore_weights(self._accelerator, watched, path, collectives, records, files)
        context.say(f"initialized with the weights of {source}")
        for note in restored.notes:
            context.warn(f"{source}: {note}")

    def skip_restore(self) -> frozenset[str]:
        """Return the names of the run's checkpoints without a restore, as the loop restored its state itself.

        Effects: not collective; rank zero renames damaged checkpoints, as `restore` does.
        """
        assert self._found is not None
        if self._collectives.rank == 0:
            set_damaged_aside([path for path, _ in self._found.damaged], self._context.say)
        return frozenset(path.name for path in (*self._found.usable, *self._found.weights_only))

    def restore_again(self, watched: AnyWatched) -> None:
        """Restore all state but the tensors again, before training begins. Not collective."""
        if self._resumed is not None:
            shards = find_watched(self._accelerator, watched, weights_only=False, dtype=None)
            restore_trainer(self._resumed.state, watched, shards.groups, self._accelerator.scaler)
            self._registered.restore_again()

    # ----------------------------------------------------------------- position in the data

    def is_loader_done(self, number: int) -> bool:
        """Return whether training loader `number` of the epoch, from 0, was complete at the checkpoint."""
        return self._resumed is not None and number < self._resumed.state.loaders_done

    def begin_training(self) -> Resumed | None:
        """Complete the resume, as the state changes from here on. Returns the restored checkpoint, once."""
        resumed, self._resumed = self._resumed, None
        if not self._registered.is_closed and resumed is not None:
            self._warn_of_differences(resumed.state)
        self._registered.close()
        return resumed

    def begin_loader(self, loader: Any) -> ResumePoint | None:
        """Return the position at which a loader resumes, once, in batches of this loader's size."""
        is_again = self._begun_from is not None
        resumed = self._begun_from = self.begin_training()
        if resumed is None:
            return None
        state, world_size = resumed.state, self._collectives.world_size
        now = dataloaders.global_batch_size(loader, world_size)
        if not is_again:
            self._warn_of_batch_size(state, now)
        num_batches, before = state.batches_in_epoch, state.samples_per_batch
        if before is None or now is None:
            # The batch sizes are unknown: compare the numbers of ranks, each of which had one batch.
            before, now = len(state.ranks), world_size
        if num_batches and before != now:
            num_batches, remainder = divmod(num_batches * before, now)
            if not is_again:
                again = f"; {remainder} samples are repeated" if remainder else ""
                self._context.say(f"harness: the epoch continues at batch {num_batches}{again}")
        had_generators = any(resumed.data.generators[state.loaders_done : state.loaders_done + 1])
        is_new_order = num_batches and resumed.rank_state is None and not had_generators
        if is_new_order and not is_again and dataloaders.has_random_order(loader):
            self._context.warn(
                "the order of the data comes from the random numbers of each process, which differ on another number "
                "of ranks: samples of this epoch may be repeated or missing; "
                "DataLoaderConfiguration(use_seedable_sampler=True) keeps the order"
            )
        own = resumed.rank_state
        return ResumePoint(num_batches, resumed.data, None if own is None else own.random)

    def undo_begin_loader(self) -> Resumed | None:
        """Have the next loader resume in place of the last one, which did not train; None if that did not resume."""
        self._resumed = self._begun_from
        if self._begun_from is not None:
            self._registered.reopen(self._begun_from.state.registered)
        return self._begun_from

    # ---------------------------------------------------------------------------- warnings

    def warn_if_nothing_is_left(self, num_batches: int) -> None:
        """Warn that the resumed loader has no batch after the complete ones."""
        self._context.warn(
            f"{num_batches} batches of this epoch were done, and its loader now has no more than that: the run "
            "continues with the next epoch"
        )

    def _warn_of_batch_size(self, state: TrainerState, samples_now: int | None) -> None:
        if samples_now is None or state.samples_per_batch is None:
            return
        before = state.samples_per_batch * state.accumulation
        now = samples_now * self._accelerator.gradient_accumulation_steps
        if before != now:
            self._context.warn(f"an optimizer step now takes {now} samples; before the resume it took {before}")

    def _warn_of_differences(self, state: TrainerState) -> None:
        self._warn_of_frozen_parameters(state)
        registered = self._registered.names
        for name in sorted(state.states.keys() - registered):
            self._context.warn(f"the checkpoint has a state of {name!r}, and no object of that name is registered")
        for name in sorted(registered - state.states.keys()):
            self._context.warn(f"{name!r} is not in the checkpoint: it starts from its initial state")

    def _warn_of_frozen_parameters(self, state: TrainerState) -> None:
        """Warn of parameters that are frozen now but were trained, as the loop may have unfrozen them in an epoch."""
        if state.frozen is None or self._watched is None:
            return
        try:
            shards = find_watched(self._accelerator, self._watched, weights_only=False, dtype=None)
        except CheckpointError:
            return  # the loop has changed the model since; the first save raises
        trained = {name for group in state.param_groups for name in group["params"]} - state.frozen
        if frozen := [name for name in shards.frozen_names() if name in trained]:
            self._context.warn(
                f"{some(frozen)}: requires_grad is False, and was True at the checkpoint; set it before the first "
                "batch, unless it is to be frozen from here on"
            )
