"""Manage a run from its directory to its end: journal, signals, failures of other ranks, and final status.

Rank zero alone writes the directory and the journal. On the other ranks the same objects only observe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from harness.config.schema import Mode, TrackingConfig
from harness.distributed.collectives import Collectives
from harness.distributed.failure_monitor import FailureMonitor
from harness.distributed.topology import Topology
from harness.errors import HarnessError, PeerFailure, Stopped, reason_of
from harness.io.progress import Progress
from harness.io.redact import redact_message
from harness.metrics.system.sampler import Sampler, start_sampler
from harness.run.directory import RunDirectory, make_run_directory, note_stop
from harness.run.lock import RunLock
from harness.run.signals import STOP_REQUEST, StopSignals
from harness.run.stop_request import StopLead, StopRequests
from harness.tracking import provenance
from harness.tracking.journal.delivery_state import read_delivered
from harness.tracking.mlflow.given_run import GivenRun, given_run
from harness.tracking.publisher.progress import Remaining
from harness.tracking.publisher.sync import damaged_line, refused_line, undelivered_line
from harness.tracking.tracker import RunStatus, Tracker
from harness.training.run_recorder import RunRecorder

# Longest wait, after a failure, for the checkpoint in flight and for the outbox.
FAILURE_WAIT_S = 20.0


class RunSession:
    """Open a run, observe signals and failures of other ranks, and end the run with its true status.

    Effects: `open` is collective, the rest is not. Main thread. Leaves the run's directory without its checkpoints.

    Args:
        monitor: metric that ranks checkpoints; None without one.
        mode: whether a smaller or a larger value is better.

    Attributes:
        run_path: the run's directory, once it is open.
        recorder: writes the run's journal.
    """

    def __init__(
        self,
        topology: Topology,
        config: TrackingConfig,
        progress: Progress,
        monitor: str | None = None,
        mode: Mode = "min",
    ) -> None:
        self.topology = topology
        self._config = config
        self._progress = progress
        self._monitor, self._mode = monitor, mode
        self._lock: RunLock | None = None
        self._sampler: Sampler | None = None
        self._signals = StopSignals()
        self._requests: StopRequests | None = None
        self._is_request_shown = False
        self._lead = StopLead()
        self.run_path: Path | None = None
        self.recorder = RunRecorder(config, progress, monitor, self._lead)
        self._failures = FailureMonitor(topology.rank, topology.world_size, self)

    def open(
        self,
        collectives: Collectives,
        device: torch.device,
        runs_dir: Path,
        run_name: str | None,
        params: Any,
        *,
        resume: str = "auto",
        run_name_prefix: str | None = None,
        given: GivenRun | None = None,
        uses_given_run: bool = False,
    ) -> RunDirectory:
        """Create or reopen the directory and the MLflow run on rank zero; return the directory on all ranks.

        Without `run_name` a name is generated from `run_name_prefix` or the experiment's name. `resume` ``never``
        refuses an existing run; any other value continues it. A new run uses the MLflow run `given` or, with
        `uses_given_run`, the one that the user named, if any.

        Effects: collective; blocks until the MLflow run's id is on disk.

        Raises:
            HarnessError: on all ranks, if the directory or the store cannot be used.
            Stopped: on all ranks, if this launch stopped cleanly and its launcher has restarted it.
        """

        def make() -> RunDirectory:
            prefix = run_name_prefix or self._config.experiment_name
            directory, self._lock = make_run_directory(runs_dir, run_name, prefix, resume)
            if directory.stopped_by is not None:
                return directory
            tracker = Tracker(directory.path, self._config, directory.attempt, self._monitor, self._mode)
            # Before `start`, so that its failure is recorded too.
            self.recorder.open(tracker)
            tracker.given_run = given
            if given is None and uses_given_run:
                tracker.given_run = given_run(self._config.tracking_uri)
            tracker.start(directory.name, provenance.attempt_facts(self.topology.run_facts))
            tracker.set_tags(provenance.tags(self.topology.run_facts, self._config.tags))
            self._requests = StopRequests(directory.path, directory.attempt)
            self._show(directory, tracker, self._lock)
            if params is not None:
                self.recorder.log_params(params)
            if directory.continues:
                self.recorder.publish_forgotten(directory.path / "checkpoints")
            return directory

        directory = collectives.broadcast_from_rank_zero("make the run directory", make)
        if directory.stopped_by is not None:
            raise Stopped(directory.stopped_by)
        self.run_path = directory.path
        if self._config.enabled and self._config.log_system_metrics:
            self._sampler = start_sampler(collectives, device, self.recorder)
        return directory

    def _show(self, directory: RunDirectory, tracker: Tracker, lock: RunLock) -> None:
        which = f", attempt {directory.attempt}" if directory.continues else ""
        self._progress.say(f"run {directory.name} in {directory.path}{which}")
        for note in tracker.notes:
            self.recorder.say(note)
        self.recorder.show_warnings(tracker)
        if not lock.works:
            self._progress.say(
                f"harness: warning: {directory.path}: this file system has no locks; make sure that no other job uses "
                "the run at the same time"
            )

    @property
    def mlflow_run_id(self) -> str | None:
        """Id of the MLflow run on rank zero; None on other ranks and without an MLflow run."""
        return None if self.recorder.tracker is None else self.recorder.tracker.run_id

    # ------------------------------------------------------------- requests and failures

    @property
    def has_request(self) -> bool:
        """Whether this rank got a signal or learned of another rank's failure. Cheap: reads three attributes."""
        signals = self._signals
        return bool(signals.received) or signals.is_save_requested or self._failures.failure is not None

    def check(self) -> None:
        """Raise if another rank has failed. Cheap: reads one attribute.

        Raises:
            PeerFailure: if another rank has failed.
        """
        self._failures.check()

    @property
    def stop_signal(self) -> int:
        """Number of the signal that asked this rank to stop, or `STOP_REQUEST`; 0 without one."""
        self._signals.chain()
        if not self._signals.received and self._requests is not None and (reason := self._requests.look()) is not None:
            if not self._is_request_shown:
                self._is_request_shown = True
                self._progress.say(f"harness stop: {reason}")
            return STOP_REQUEST
        return self._signals.received

    def pop_save_request(self) -> bool:
        """Return whether a signal asked this rank to save since the last call."""
        return self._signals.pop_save_request()

    # ---------------------------------------------------------------------------- the end

    def finish(self) -> None:
        """End the run as FINISHED. Rank zero waits for the delivery."""
        self._failures.close()
        self._stop_sampler()
        # From here on a signal only ends the wait for MLflow.
        self._end("FINISHED", "training is complete", self._config.drain_timeout_s, ends_on_signal=True)
        self._release()
        self._signals.restore()

    def report_failure(self, error: BaseException) -> BaseException:
        """Report this rank's error to the other ranks; call `end_failed` afterwards.

        Returns the cause: another rank's failure, if this error is its consequence.
        """
        cause = self._failures.root_cause(error)
        self._failures.report(cause)
        cause.is_reported_to_ranks = True  # type: ignore[attr-defined]
        return cause

    def end_failed(self, cause: BaseException) -> None:
        """End the run because of `cause`, as `report_failure` returned it."""
        self._stop_sampler()
        if (tracker := self.recorder.tracker) is not None:
            if isinstance(cause, Stopped):
                self._note_stop(tracker.run_dir, cause)
            # `harness stop` is requested well ahead of the time limit, so more time remains than after a signal.
            limit_s = max(FAILURE_WAIT_S, self._lead.delivery_s if self._is_request_shown else 0.0)
            self._end(_status_of(cause), _reason_of(cause), limit_s)
        self._release()
        # Last: a launcher sends SIGTERM to the remaining ranks, which must not interrupt the work above.
        self._signals.restore()

    def _note_stop(self, run_dir: Path, stopped: Stopped) -> None:
        try:
            note_stop(run_dir, stopped.signal_name)
        except (OSError, HarnessError) as error:
            self._progress.say(f"harness: warning: a launcher's restart would train on: {error}")

    def _stop_sampler(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def before_abort(self, failure: PeerFailure) -> None:
        """Record the failure. Called by the monitor's thread before it terminates a stuck process."""
        if self.topology.rank == 0:
            self._progress.say(redact_message(f"harness: error: {failure}"))
            self._stop_sampler()
            self._end(_status_of(failure), _reason_of(failure), FAILURE_WAIT_S)

    def _end(self, status: RunStatus, reason: str, timeout_s: float, *, ends_on_signal: bool = False) -> None:
        if (tracker := self.recorder.close()) is None:
            return

        def show_and_decide(left: Remaining) -> bool:
            self._progress.delivering(left.share, str(left))
            return not (ends_on_signal and self._signals.is_set)

        recorder = self.recorder
        try:
            try:
                done = tracker.finish(status, reason, timeout_s, show_and_decide)
            finally:
                self._progress.stop()
                recorder.show_warnings(tracker)
        except HarnessError as error:
            # For example a full disk: the publisher detects the trainer's exit and sets the run's status itself.
            tracker.detach()
            recorder.warn(str(error))
            return
        if not done and self._config.offline:
            recorder.say(f"offline: deliver it with `harness sync {tracker.run_dir}`")
        delivered = read_delivered(tracker.run_dir / "outbox")
        if not done and not self._config.offline and tracker.run_id is not None:
            recorder.warn(undelivered_line(tracker.run_dir, delivered))
        if delivered.num_damaged:
            recorder.warn(damaged_line(tracker.run_dir, delivered))
        if delivered.refused:
            recorder.warn(refused_line(tracker.run_dir, delivered))


def _status_of(error: BaseException) -> RunStatus:
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        return "KILLED"
    return "KILLED" if isinstance(error, PeerFailure) and error.signal_name else "FAILED"


def _reason_of(error: BaseException) -> str:
    # The task's error may contain a database address with its password.
    return redact_message(reason_of(error))
