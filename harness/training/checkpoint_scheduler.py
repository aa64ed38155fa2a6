"""Which moment of training a checkpoint is of, and that it is taken once.

A checkpoint may be owed: due at a moment that cannot be saved (gradients are being accumulated, the evaluation that
belongs to it is still to come), and taken at the next one that can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator

from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.trainer_state import Moment
from harness.data.resumable_loader import ResumableLoader
from harness.metrics.aggregator import MetricAggregator
from harness.metrics.history import MetricHistory
from harness.training.place import TrainingPosition


class CheckpointScheduler:
    """Has the saver take the moment that it is.

    Effects: `save`, `save_with_metrics` and `settle` are collective; main thread; they block as `Saver` says.

    Args:
        accelerator: of the loop.
        saver: that writes.
        place: where training stands.
        batches: where it stands in the data.
        windows: of metrics.
        history: of metrics.
        states: gives the states of what else goes on, by name.
        require_alike: collective; called once training has taken a step: refuses states that differ between ranks.
        keep_points: called with a checkpoint's name and metrics before it is taken.
        say: called with a line for the user.

    Attributes:
        owed: name of a checkpoint that is to be taken as soon as it can be; None: none is.
        is_ready: whether there is something to save, with memory to save it.
        kept: names of checkpoints that an earlier attempt has saved, and that are not saved again: as the points of
            its metrics, they stay.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        saver: Saver,
        place: TrainingPosition,
        batches: ResumableLoader,
        windows: MetricAggregator,
        history: MetricHistory,
        states: Callable[[], Mapping[str, Any]],
        require_alike: Callable[[], None],
        keep_points: Callable[[str, Mapping[str, float]], None],
        say: Callable[[str], None],
    ) -> None:
        self._accelerator = accelerator
        self._saver = saver
        self._place = place
        self._batches = batches
        self._windows = windows
        self._history = history
        self._states = states
        self._require_alike = require_alike
        self._keep_points = keep_points
        self._say = say
        self._is_watching = False
        # Memory for saving is made once the optimizer has a state: after its first step.
        self._must_prepare = False
        # Where the last checkpoint was taken; whether the ranks have said that it goes on.
        self._saved_at: tuple[int, ...] | None = None
        self._is_open = False
        self._latest, self._latest_step = "", 0
        self.owed: str | None = None
        self.kept: frozenset[str] = frozenset()

    @property
    def is_ready(self) -> bool:
        """Whether there is something to save, and the memory for it."""
        return self._is_watching and not self._must_prepare

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to do at the next step: a save to be settled or taken, memory to be made."""
        return self._is_open or self._must_prepare or self.owed is not None

    @property
    def status(self) -> str:
        """How the last save went, for a person."""
        return self._saver.status

    def watches(self) -> None:
        """There is something to save from now on."""
        self._is_watching = self._must_prepare = True

    def watches_no_longer(self) -> None:
        """There is nothing to save from now on."""
        self._is_watching = self._must_prepare = False

    def prepare(self) -> bool:
        """After an optimizer step: allocate what saving needs, once; whether that was now."""
        if not self._must_prepare:
            return False
        self._must_prepare = False
        self._saver.prepare()
        self._require_alike()
        return True

    def ranks_differ(self, num_steps: int, num_fewer: int) -> None:
        """Some ranks had fewer of the optimizer's steps than others, and so have another state of it from now on."""
        if self._saver.save_rank_zero_only():
            self._say(
                f"harness: of {num_steps} optimizer steps some ranks had {num_fewer} fewer: what is due in these comes "
                "at their end; checkpoints have rank zero's optimizer state from here on"
            )

    def is_saved(self) -> None:
        """This moment is in a checkpoint: the run goes on from it."""
        self._saved_at = self._position()

    def _position(self) -> tuple[int, ...]:
        return (self._place.step, self._place.epoch, self._batches.loaders_done, self._batches.batches_done)

    def save(self, name: str, *, must: bool = False) -> bool:
        """Begin to save this moment; whether there was something to save that is in no checkpoint.

        Args:
            name: of the checkpoint.
            must: wait for the one before, where that is not done.
        """
        self.settle()
        if not self._is_watching or self._saved_at == self._position() or name in self.kept:
            return False
        self._history.log_withheld()
        # JSON has no NaN.
        metrics = {
            key: value
            for key, value in self._history.latest.items()
            if not key.startswith("perf/") and math.isfinite(value)
        }
        moment = Moment(
            name,
            self._place.epoch,
            self._place.step,
            self._batches.batches_done,
            metrics,
            self._place.samples_per_batch,
            self._accelerator.gradient_accumulation_steps,
            self._states(),
            self._batches.loaders_done,
            self._place.is_stopped,
        )
        self._keep_points(name, metrics)
        self._saver.save(moment, must=must)
        self._saved_at, self._is_open = self._position(), True
        self._latest, self._latest_step = name, self._place.step
        return True

    def save_with_metrics(self, name: str) -> bool:
        """The same, with what was logged until now reduced and told before."""
        self._windows.collect()
        self._windows.flush(self._place.step, wait=True)
        return self.save(name)

    def save_owed(self) -> None:
        """Take what is owed."""
        assert self.owed is not None
        self.save_with_metrics(self.owed)
        self.owed = None

    def save_and_wait(self) -> None:
        """Save this moment, and wait until it is on disk or has failed."""
        self.save(self._place.step_name, must=True)
        self.settle()
        self._saver.wait()

    def finish_copy(self) -> None:
        """Block until the save in flight has copied everything; see `Saver.finish_copy`."""
        self._saver.finish_copy()

    def settle(self) -> bool:
        """Whether the last save goes on on every rank: by the next step the others have said so."""
        if not self._is_open:
            return self._saved_at is not None
        self._is_open = False
        if self._saver.resolve():
            return True
        self._saved_at = None
        num_skipped = self._saver.num_skipped
        self._history.add({"checkpoint/num_skipped": float(num_skipped)}, self._latest_step)
        # The first, and then ever fewer: where one is skipped, most are.
        if num_skipped & (num_skipped - 1) == 0:
            reason = self._saver.last_skip
            self._say(f"harness: warning: {self._latest}: {reason} (checkpoint.when_busy; {num_skipped} so far)")
        return False
