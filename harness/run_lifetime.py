"""One run from its directory to its end: the outbox, the other ranks, signals, and how it ended.

What only rank zero does about a run is in here; the other ranks hold the same object and it does
nothing there but watch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from harness.agreement import Agreement
from harness.checkpoint.commit import Manifest
from harness.config import TrackingConfig
from harness.errors import HarnessError, PeerFailure, Stopped
from harness.peers import Peers
from harness.progress import Progress
from harness.run_directory import make_run_directory
from harness.runtime import Topology
from harness.signals import StopSignals
from harness.tracking import provenance
from harness.tracking.outbox import read_delivered
from harness.tracking.tracker import RunStatus, Tracker, refused_line

# After a failure, how long a checkpoint that is being written and the outbox are waited for.
FAILURE_WAIT_S = 20.0


class RunLifetime:
    """Opens a run, records what happens in it, and ends it as it really ended.

    Effects: `open` is collective; nothing else is. Main thread, but for `publish` and `retire` (rank
    zero's writer thread). Leaves the run's directory without its checkpoints.

    Args:
        topology: where this rank runs.
        config: what goes to MLflow.
        progress: where lines for the user go.
    """

    def __init__(self, topology: Topology, config: TrackingConfig, progress: Progress) -> None:
        self._topology = topology
        self._config = config
        self._progress = progress
        self._tracker: Tracker | None = None
        self._point_times_ms: dict[str, tuple[int, int]] = {}
        self._points_of: dict[str, list[list[Any]]] = {}
        self._known_datasets: set[str] = set()
        self._signals = StopSignals()
        self._peers = Peers(topology.rank, topology.world_size, self._last_words)

    def open(
        self, agreement: Agreement, runs_dir: Path, run_name: str | None, params: Any, *, resume: bool
    ) -> tuple[str, Path]:
        """Make the directory and the MLflow run, on rank zero; its name and path, on all ranks.

        Collective; blocks until the MLflow run's id is on disk.

        Raises:
            HarnessError: on all ranks, if the directory or the store cannot be used.
        """

        def make() -> tuple[str, Path]:
            name, path = make_run_directory(runs_dir, run_name, self._config.experiment_name, resume)
            self._tracker = Tracker(path, self._config)
            self._tracker.start(name)
            self._tracker.tags(provenance.tags(self._topology.run_facts, self._config.tags))
            self._progress.say(f"run {name} in {path}")
            if params is not None:
                self._tracker.params(provenance.flatten_params(params))
            return name, path

        return agreement.from_rank_zero("make the run directory", make)

    def check(self) -> None:
        """Raise if another rank has failed. Costs one attribute.

        Raises:
            PeerFailure: if another rank has failed.
        """
        self._peers.check()

    @property
    def stop_signal(self) -> int:
        """Number of the signal that asked this rank to stop; 0: none has."""
        return self._signals.received

    def resumed(self, step: int, checkpoint: str) -> None:
        """The run goes on from a checkpoint."""

    def take_save_request(self) -> bool:
        """Whether this rank was asked by a signal to save since the last call."""
        return self._signals.take_save_request()

    # ---------------------------------------------------------------------- what happens

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Reduced metrics at a step."""
        if self._tracker is not None:
            time_ms = self._tracker.metrics(values, step)
            self._point_times_ms.update(dict.fromkeys(values, (time_ms, step)))

    def describe_model(self, model: nn.Module) -> None:
        """The summary of the user's own model, among the run's artifacts."""
        if self._tracker is not None:
            self._tracker.text("model_summary.txt", provenance.model_summary(model))

    def describe_dataset(self, loader: Any, context: str) -> None:
        """The data set of a loader as an input of the run, once for ``train`` and ``eval``."""
        dataset = getattr(loader, "dataset", None)
        if self._tracker is None or dataset is None or context in self._known_datasets:
            return
        self._known_datasets.add(context)
        if self._config.log_datasets:
            self._tracker.dataset(provenance.dataset_record(dataset, context))

    def keep_points(self, checkpoint: str, metrics: Mapping[str, float]) -> None:
        """Remember the points that a checkpoint's metrics are, as they are now.

        By the time that it is committed, training has logged others under the same names.
        """
        if self._tracker is not None:
            known = {key: value for key, value in metrics.items() if key in self._point_times_ms}
            self._points_of[checkpoint] = [[key, value, *self._point_times_ms[key]] for key, value in known.items()]

    def publish(self, checkpoint: str, manifest: Manifest) -> None:
        """Rank zero's writer thread: a checkpoint is committed."""
        tracker = self._tracker
        if tracker is not None:
            tracker.checkpoint(
                {
                    "name": checkpoint,
                    "key": manifest.key,
                    "epoch": manifest.epoch,
                    "step": manifest.step,
                    "files": [*self._published(manifest), "manifest.json"],
                    "metrics": self._points_of.pop(checkpoint, []),
                }
            )

    def _published(self, manifest: Manifest) -> Sequence[str]:
        if self._config.log_training_state:
            return [file.name for file in manifest.files]
        return manifest.weight_files

    def retire(self, checkpoint: str, key: str) -> None:
        """Rank zero's writer thread: a checkpoint is about to be removed."""
        if self._tracker is not None:
            self._tracker.retire({"name": checkpoint, "key": key})

    # ---------------------------------------------------------------------- how it ends

    def finish(self) -> None:
        """All is trained and written: the run is FINISHED. Rank zero waits for the delivery."""
        self._peers.close()
        # A signal now ends the wait for MLflow, and nothing else.
        limit_s = self._config.drain_timeout_s
        self._end("FINISHED", "training is complete", limit_s, may_wait=lambda: not self._signals.is_set)
        self._signals.restore()

    def fail(self, error: BaseException, before_end: Callable[[], None]) -> BaseException:
        """End the run because of an error, telling the other ranks.

        Args:
            error: what this rank ran into.
            before_end: called before the run's end is recorded.

        Returns:
            What really ended the run: another rank's failure, where this error is only its echo.
        """
        cause = self._peers.cause(error)
        self._peers.report(cause)
        cause.is_told_to_peers = True  # type: ignore[attr-defined]
        before_end()
        if self._tracker is not None:
            self._end(_status_of(cause), _reason_of(cause), FAILURE_WAIT_S)
        # Not before: a launcher sends SIGTERM to the ranks that are left, and this one has work to finish.
        self._signals.restore()
        return cause

    def _last_words(self, failure: PeerFailure) -> None:
        """The watcher's thread, just before it ends a process that is stuck."""
        if self._topology.rank == 0:
            self._progress.say(f"harness: error: {failure}")
            self._end(_status_of(failure), _reason_of(failure), FAILURE_WAIT_S)

    def _end(
        self, status: RunStatus, reason: str, timeout_s: float, may_wait: Callable[[], bool] = lambda: True
    ) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return

        def waiting(share: float) -> bool:
            self._progress.delivering(share)
            return may_wait()

        try:
            done = tracker.end(status, reason, timeout_s, waiting)
        except HarnessError as error:
            # The disk is full, say: the publisher sees the trainer go, and marks the run by itself.
            tracker.abandon()
            self._progress.say(f"harness: warning: {error}")
            return
        if not done and tracker.run_id is not None:
            self._progress.say(
                f"harness: warning: MLflow has not had everything yet; deliver it with `harness sync {tracker.run_dir}`"
            )
        if refused := read_delivered(tracker.run_dir / "outbox").refused:
            self._progress.say(f"harness: warning: {refused_line(tracker.run_dir, refused)}")


def _status_of(error: BaseException) -> RunStatus:
    """What MLflow shows: KILLED where somebody wanted it to stop, else FAILED."""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        return "KILLED"
    return "KILLED" if isinstance(error, PeerFailure) and error.signal_name else "FAILED"


def _reason_of(error: BaseException) -> str:
    return str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
