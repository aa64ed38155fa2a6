"""Decide when a checkpoint is taken, and publish and prune checkpoints once they are committed.

A checkpoint is pending while it is due and cannot be taken: gradients are being accumulated, or the evaluation that
belongs to it has not run. It is taken as soon as possible.

    controller: due  ->  save  ->  Saver: copied, written  ->  on_checkpoint_committed  ->  journal, retention
"""

from __future__ import annotations

import math
from pathlib import Path

from harness.checkpoint.format.commit import Manifest
from harness.checkpoint.restore.locate import remove_downloads
from harness.checkpoint.save.hooks import CheckpointHooks, RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.rank_state import RankState
from harness.checkpoint.state.trainer_state import AnyWatched, Moment
from harness.checkpoint.tools.retention import Retention
from harness.data import rng_state
from harness.metrics.aggregator import MetricAggregator
from harness.tracking import provenance
from harness.training.registered_objects import RegisteredObjects
from harness.training.state import TrainingContext, TrainingState


class CheckpointScheduler(CheckpointHooks):
    """Take each checkpoint once, and publish and prune committed ones. Reads `state` and never changes it.

    Effects: the constructor, `watch`, `prepare`, `save`, `save_and_wait` and `resolve` are collective; main thread;
    they block as `Saver` does. The threads of the hooks are documented in `CheckpointHooks`.

    Attributes:
        saver: writes the checkpoints.
        existing: names of an earlier attempt's checkpoints, which are not saved again.
    """

    def __init__(
        self,
        context: TrainingContext,
        run_path: Path,
        state: TrainingState,
        metrics: MetricAggregator,
        registered: RegisteredObjects,
    ) -> None:
        self._context = context
        self._state = state
        self._metrics = metrics
        self._registered = registered
        self._recorder = context.session.recorder
        self._downloads_dir = run_path / "downloads"
        directory = run_path / "checkpoints"
        self._retention = Retention(directory, context.checkpoint, self, context.progress.say)
        facts = RunFacts(context.session.topology.run_facts, provenance.versions())
        self.saver = Saver(context.accelerator, context.collectives, context.checkpoint, directory, facts, self)
        self._pending: str | None = None
        self._is_watching = False
        # Staging memory is allocated once the optimizer has a state: after its first step.
        self._must_prepare = False
        # The position of the last checkpoint, and whether the other ranks have yet to report if they take part in it.
        self._saved_at: tuple[int, ...] | None = None
        self._is_unresolved = False
        self._latest, self._latest_step = "", 0
        self.existing: frozenset[str] = frozenset()

    @property
    def pending(self) -> str | None:
        """Name of the checkpoint that is due and not taken yet; None without one."""
        return self._pending

    @property
    def is_ready(self) -> bool:
        """Whether a model is watched and the memory for saving it is allocated."""
        return self._is_watching and not self._must_prepare

    @property
    def needs_next_step(self) -> bool:
        """Whether the next step must resolve or take a checkpoint, or allocate memory."""
        return self._is_unresolved or self._must_prepare or self._pending is not None

    # ------------------------------------------------------------------- what is watched

    def watch(self, watched: AnyWatched) -> None:
        """Save these models and optimizers from now on.

        Raises:
            CheckpointError: on all ranks, if their state could not be saved.
        """
        self.saver.check(watched)
        self._is_watching = self._must_prepare = True

    def unwatch(self) -> None:
        """Stop saving."""
        self._is_watching = self._must_prepare = False

    def prepare(self) -> bool:
        """Allocate the memory for saving, once, after an optimizer step; return whether it did."""
        if not self._must_prepare:
            return False
        self._must_prepare = False
        self.saver.prepare()
        if not self._context.checkpoint.save_weights_only:
            self._registered.require_same_on_all_ranks()
        return True

    def mark_ranks_differ(self, num_steps: int, num_fewer: int) -> None:
        """Record that some ranks had fewer optimizer steps than others, so their optimizer states differ."""
        if self.saver.save_rank_zero_only():
            self._context.say(
                f"harness: of {num_steps} optimizer steps some ranks had {num_fewer} fewer: what was due in these "
                "steps is done after them; checkpoints hold rank zero's optimizer state from here on"
            )

    def mark_saved(self) -> None:
        """Record that a checkpoint holds the current position, from which the run resumed."""
        self._saved_at = self._position()

    def _position(self) -> tuple[int, ...]:
        state = self._state
        return (state.step, state.epoch, state.data.loaders_done, state.data.batches_done)

    # -------------------------------------------------------------------------- one save

    def defer(self, name: str) -> None:
        """Make a checkpoint pending under this name, unless one is pending already."""
        self._pending = self._pending or name

    def pop_pending(self) -> str | None:
        """Return the pending checkpoint's name and clear it."""
        pending, self._pending = self._pending, None
        return pending

    def save(self, name: str, *, must: bool = False) -> bool:
        """Start to save the current state; return False if it is saved already or nothing is watched.

        The current metrics must be collected. With `must`, wait for the previous save in place of skipping this one.
        """
        self.resolve()
        if not self._is_watching or self._saved_at == self._position() or name in self.existing:
            return False
        self._metrics.log_withheld()
        # JSON has no NaN.
        metrics = {
            key: value
            for key, value in self._metrics.latest.items()
            if not key.startswith("perf/") and math.isfinite(value)
        }
        state = self._state
        moment = Moment(
            name,
            state.epoch,
            state.step,
            state.data.batches_done,
            metrics,
            state.samples_per_batch,
            self._context.accelerator.gradient_accumulation_steps,
            self._registered.states(),
            state.data.loaders_done,
            state.is_stopped,
        )
        self._recorder.keep_points(name, metrics)
        self.saver.save(moment, must=must)
        self._saved_at, self._is_unresolved = self._position(), True
        self._latest, self._latest_step = name, state.step
        return True

    def save_and_wait(self) -> None:
        """Save the current state, and wait until it is on disk or has failed."""
        self.save(self._state.step_name, must=True)
        self.resolve()
        self.saver.wait()

    def resolve(self) -> bool:
        """Return whether every rank takes part in the last save; each has reported by the next step."""
        if not self._is_unresolved:
            return self._saved_at is not None
        self._is_unresolved = False
        if self.saver.resolve():
            return True
        self._saved_at = None
        num_skipped = self.saver.num_skipped
        self._metrics.publish({"checkpoint/num_skipped": float(num_skipped)}, self._latest_step)
        # Warn at 1, 2, 4, 8 and so on, as most saves are skipped once one is.
        if num_skipped & (num_skipped - 1) == 0:
            reason = self.saver.last_skip
            self._context.warn(f"{self._latest}: {reason} (checkpoint.when_busy; {num_skipped} so far)")
        return False

    def report(self, step: int) -> None:
        """Log the costs of the last save, and warn if it failed. Only rank zero reports."""
        costs, failure = self.saver.pop_report()
        if costs:
            self._recorder.log_save(costs, step)
        if failure is not None:
            self._context.warn(failure)

    # ---------------------------------------------------------------- hooks of the saver

    def capture_rank_state(self) -> RankState:
        """See `CheckpointHooks`."""
        # An evaluation is not saved in part: it is repeated from its start, with the same random numbers.
        now = self._state.rng_override or rng_state.capture(self._context.accelerator.device)
        return RankState(now, self._state.data.state, self._metrics.partial())

    def on_checkpoint_committing(self) -> None:
        """See `CheckpointHooks`."""
        self._recorder.sync()

    def on_checkpoint_committed(self, name: str, manifest: Manifest) -> None:
        """See `CheckpointHooks`."""
        self._recorder.publish(name, manifest)
        remove_downloads(self._downloads_dir)
        # After its publication, so that MLflow has the replacement before it removes a checkpoint.
        self._retention.apply(name)

    def on_checkpoint_retired(self, name: str, key: str) -> None:
        """See `CheckpointHooks`."""
        self._recorder.retire(name, key)
