"""One run from its directory to its end: the outbox, the other ranks, signals, and how it ended.

What only rank zero does about a run is in here; the other ranks hold the same object and it does
nothing there but watch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.checkpoint.format.commit import Manifest
from harness.config.schema import ClassSpec, Mode, TrackingConfig
from harness.distributed.collectives import Collectives
from harness.distributed.failure_monitor import FailureMonitor
from harness.distributed.strategies import Topology
from harness.errors import HarnessError, PeerFailure, Stopped, reason_of
from harness.io.progress import Progress
from harness.io.redact import redact_message
from harness.metrics.system.sampler import Sampler, start_sampler
from harness.models.model_spec import ExampleSource, infer_signature, make_recipe
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
from harness.training.checkpoint_entries import CheckpointEntries

# After a failure, how long a checkpoint that is being written and the outbox are waited for.
FAILURE_WAIT_S = 20.0


class RunSession:
    """Opens a run, records what happens in it, and ends it as it really ended.

    Effects: `open` is collective; nothing else is. Main thread, but for `publish` and `retire` (rank
    zero's writer thread). Leaves the run's directory without its checkpoints.

    Args:
        topology: where this rank runs.
        config: what goes to MLflow.
        progress: where lines for the user go.
        monitor: the metric that ranks checkpoints; None: none does.
        mode: whether less of it is better, or more.
    """

    def __init__(
        self,
        topology: Topology,
        config: TrackingConfig,
        progress: Progress,
        monitor: str | None = None,
        mode: Mode = "min",
    ) -> None:
        self._topology = topology
        self._config = config
        self._progress = progress
        self._monitor, self._mode = monitor, mode
        self._tracker: Tracker | None = None
        self._lock: RunLock | None = None
        self._checkpoints: CheckpointEntries | None = None
        self._known_datasets: set[str] = set()
        self._sampler: Sampler | None = None
        self._signals = StopSignals()
        self._requests: StopRequests | None = None
        self._is_request_told = False
        self._lead = StopLead()
        self._peers = FailureMonitor(topology.rank, topology.world_size, self)

    def open(
        self,
        collectives: Collectives,
        device: torch.device,
        runs_dir: Path,
        run_name: str | None,
        params: Any,
        *,
        resume: str = "auto",
        stem: str | None = None,
        given: GivenRun | None = None,
        uses_given_run: bool = False,
    ) -> RunDirectory:
        """Make or find the directory and the MLflow run, on rank zero; what it is, on all ranks.

        Collective; blocks until the MLflow run's id is on disk.

        Args:
            collectives: of all ranks.
            device: this rank's.
            runs_dir: where runs are.
            run_name: its name; None: made up, see `make_run_directory`.
            params: parameters to log, nested; None: none.
            resume: ``never``: a run that is there is refused; anything else: it goes on.
            stem: what a made-up name begins with; None: the experiment's name.
            given: the MLflow run that a new run is to be; None: see `uses_given_run`.
            uses_given_run: whether that is the run that the user has named, where there is one; else one is made.

        Raises:
            HarnessError: on all ranks, if the directory or the store cannot be used.
            Stopped: on all ranks, if this launch was stopped in good order, and its launcher has started it again.
        """

        def make() -> RunDirectory:
            stem_or_experiment = stem or self._config.experiment_name
            directory, self._lock = make_run_directory(runs_dir, run_name, stem_or_experiment, resume)
            if directory.stopped_by is not None:
                return directory
            self._tracker = Tracker(directory.path, self._config, directory.attempt, self._monitor, self._mode)
            self._tracker.given_run = given
            if given is None and uses_given_run:
                self._tracker.given_run = given_run(self._config.tracking_uri)
            self._checkpoints = CheckpointEntries(self._tracker, self._config, self._monitor)
            self._tracker.start(directory.name, provenance.attempt_facts(self._topology.run_facts))
            self._tracker.set_tags(provenance.tags(self._topology.run_facts, self._config.tags))
            self._requests = StopRequests(directory.path, directory.attempt)
            self._say_where(directory)
            if params is not None:
                self.log_params(params)
            if directory.continues:
                self._checkpoints.publish_forgotten(directory.path / "checkpoints")
            return directory

        directory = collectives.broadcast_from_rank_zero("make the run directory", make)
        if directory.stopped_by is not None:
            raise Stopped(directory.stopped_by)
        if self._config.enabled and self._config.log_system_metrics:
            self._sampler = start_sampler(collectives, device, self._log_system_metrics, self._say)
        return directory

    def _log_system_metrics(self, values: Mapping[str, float]) -> None:
        if (tracker := self._tracker) is not None:
            tracker.log_system_metrics(values)

    def _stop_sampler(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()

    def _say_where(self, directory: RunDirectory) -> None:
        assert self._tracker is not None and self._lock is not None
        which = f", attempt {directory.attempt}" if directory.continues else ""
        self._progress.say(f"run {directory.name} in {directory.path}{which}")
        for note in self._tracker.notes:
            self._say(note)
        self._say_warnings(self._tracker)
        if not self._lock.works:
            self._progress.say(
                f"harness: warning: {directory.path}: this file system has no locks; see to it that no other job uses "
                "the run at the same time"
            )

    def resumed(self, step: int, checkpoint: str | None) -> None:
        """The run goes on from a step: points that MLflow has from there on are not sent again. Rank zero's.

        Main thread; before any metric is logged; reads the journal. Where it is not called, a run that goes on
        begins at step 0.

        Args:
            step: optimizer steps that are complete.
            checkpoint: name of what was put back; None: the run begins again.
        """
        if self._tracker is not None and self._checkpoints is not None:
            self._checkpoints.latest = dict(self._tracker.resume_from(step, checkpoint).latest)

    @property
    def is_asked(self) -> bool:
        """Whether anything is asked of this rank: by a signal, or by another rank's failure. Costs some attributes."""
        signals = self._signals
        return bool(signals.received) or signals.save_is_asked or self._peers.failure is not None

    def check(self) -> None:
        """Raise if another rank has failed. Costs one attribute.

        Raises:
            PeerFailure: if another rank has failed.
        """
        self._peers.check()

    @property
    def stop_signal(self) -> int:
        """Number of the signal that asked this rank to stop, or `STOP_REQUEST`; 0: nobody has."""
        self._signals.chain()
        if not self._signals.received and self._requests is not None and (reason := self._requests.look()) is not None:
            if not self._is_request_told:
                self._is_request_told = True
                self._progress.say(f"harness stop: {reason}")
            return STOP_REQUEST
        return self._signals.received

    def take_save_request(self) -> bool:
        """Whether this rank was asked by a signal to save since the last call."""
        return self._signals.take_save_request()

    # ---------------------------------------------------------------------- what happens

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Reduced metrics at a step."""
        if self._tracker is not None and self._checkpoints is not None:
            self._checkpoints.latest.update(self._tracker.log_metrics(values, step))
            self._say_warnings(self._tracker)

    def log_recorded(self, values: Mapping[str, float], step: int) -> None:
        """Metrics at a step of a loop's own counting."""
        if self._tracker is not None and self._checkpoints is not None:
            self._checkpoints.latest.update(self._tracker.log_metrics(values, step, is_own_step=True))
            self._say_warnings(self._tracker)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Further parameters, nested; those that have changed since the run began are told as such."""
        if self._tracker is None:
            return
        if (drift := self._tracker.log_params(provenance.flatten_params(values))).changed:
            self._say(f"parameters have changed since the run began: {drift.as_line()}")
        self._say_warnings(self._tracker)

    @property
    def mlflow_run_id(self) -> str | None:
        """Of the MLflow run; rank zero's, None elsewhere and where there is none."""
        return None if self._tracker is None else self._tracker.run_id

    def log_save(self, costs: Mapping[str, float], step: int) -> None:
        """What a checkpoint has cost; a line where that is too much for how late the job is asked to stop."""
        self.log_metrics(costs, step)
        if (line := self._lead.check(costs.get("checkpoint/durable_s", 0.0))) is not None:
            self._progress.say(f"harness: warning: {line}")

    def describe_model(self, model: nn.Module, wrapped: nn.Module) -> None:
        """The summary of the user's own model, which is trained wrapped, among the run's artifacts."""
        if self._tracker is None:
            return
        self._tracker.log_text("model_summary.txt", provenance.model_summary(model, wrapped))
        if not self._tracker.has_model_spec:
            self.describe_recipe(None, model, None, None)
            if self._publishes:
                made = "model"
                if isinstance(model, nn.ModuleDict):
                    made = f"nn.ModuleDict({{{', '.join(f'{name!r}: ...' for name in model)}}})"
                self._say(
                    "no class is named for the models in MLflow, so mlflow.pyfunc cannot build them: load one with "
                    f'harness.load_model("models:/...", model={made}), which fills a model that is made as here'
                )

    @property
    def _publishes(self) -> bool:
        return self._config.enabled and self._config.log_models

    def describe_recipe(
        self,
        spec: ClassSpec | None,
        model: nn.Module,
        example: ExampleSource,
        dynamic_axes: Mapping[str, Sequence[int]] | None,
        packages: Sequence[str] = (),
        files: Mapping[str, str] | None = None,
    ) -> None:
        """How the run's models are built again, and what they take and give; see `harness.models.model_spec`.

        Rank zero alone runs the model. Where that fails, the models have no signature, and a line says why.
        """
        if self._tracker is None:
            return
        values = make_recipe(spec, model, packages)
        if files:
            values["files"] = dict(files)
        if example is not None and self._publishes:
            try:
                values |= infer_signature(model, example, dynamic_axes)
            except Exception as error:
                self._say(
                    f"harness: warning: the models in MLflow have no signature: input_example: {_reason_of(error)}"
                )
        self._tracker.log_model_spec(values)

    def digest_of(self, batch: Any, context: str) -> provenance.BatchDigest | None:
        """What `describe_dataset` needs of a batch that may be gone by then; None: it needs nothing.

        Waits once for the device, where the batch is on one.
        """
        if self._tracker is None or not self._config.log_datasets or context in self._known_datasets:
            return None
        return provenance.batch_digest(batch)

    def describe_dataset(self, loader: Any, context: str, batch: Any = None) -> None:
        """Record the data set of a loader as an input of the run, once for ``train`` and ``eval``.

        Args:
            loader: whose data set it is, which is not read.
            context: ``train`` or ``eval``.
            batch: the first batch that this rank has had of it, or its `BatchDigest`; None: there is none.
        """
        dataset = getattr(loader, "dataset", None)
        if self._tracker is None or dataset is None or context in self._known_datasets:
            return
        digest = self.digest_of(batch, context) if not isinstance(batch, provenance.BatchDigest | None) else batch
        self._known_datasets.add(context)
        if self._config.log_datasets:
            record = provenance.dataset_record(dataset, context, digest)
            self._tracker.log_dataset(record, is_exact=provenance.own_digest(dataset) is not None)

    def keep_points(self, checkpoint: str, metrics: Mapping[str, float]) -> None:
        """Remember the points that a checkpoint's metrics are, as they are now."""
        if self._checkpoints is not None:
            self._checkpoints.keep_points(checkpoint, metrics)

    def sync(self) -> None:
        """Rank zero's writer thread: all that happened is on disk before a checkpoint is that goes on from there."""
        if (tracker := self._tracker) is not None:
            tracker.sync()

    def publish(self, checkpoint: str, manifest: Manifest) -> None:
        """Rank zero's writer thread: a checkpoint is committed."""
        if (checkpoints := self._checkpoints) is not None:
            checkpoints.publish(checkpoint, manifest)

    def retire(self, checkpoint: str, key: str) -> None:
        """Rank zero's writer thread: a checkpoint is about to be removed."""
        if (checkpoints := self._checkpoints) is not None:
            checkpoints.retire(checkpoint, key)

    # ---------------------------------------------------------------------- how it ends

    def finish(self) -> None:
        """All is trained and written: the run is FINISHED. Rank zero waits for the delivery."""
        self._peers.close()
        self._stop_sampler()
        # A signal now ends the wait for MLflow, and nothing else.
        limit_s = self._config.drain_timeout_s
        self._end("FINISHED", "training is complete", limit_s, may_wait=lambda: not self._signals.is_set)
        self._release()
        self._signals.restore()

    def fail(self, error: BaseException, before_end: Callable[[], None]) -> BaseException:
        """End the run because of an error, telling the other ranks.

        Args:
            error: what this rank ran into.
            before_end: called before the run's end is recorded.

        Returns:
            What really ended the run: another rank's failure, where this error is only its echo.
        """
        cause = self._peers.root_cause(error)
        self._peers.report(cause)
        cause.is_reported_to_ranks = True  # type: ignore[attr-defined]
        before_end()
        self._stop_sampler()
        if self._tracker is not None:
            if isinstance(cause, Stopped):
                self._note_stop(self._tracker.run_dir, cause)
            # A job that is asked ahead of its time limit has more time than one that was hit.
            limit_s = max(FAILURE_WAIT_S, self._lead.delivery_s if self._is_request_told else 0.0)
            self._end(_status_of(cause), _reason_of(cause), limit_s)
        self._release()
        # Not before: a launcher sends SIGTERM to the ranks that are left, and this one has work to finish.
        self._signals.restore()
        return cause

    def _say_warnings(self, tracker: Tracker) -> None:
        for warning in tracker.pop_warnings():
            self._say(f"harness: warning: {warning}")

    def _say(self, line: str) -> None:
        """A line about tracking."""
        if not self._config.silent:
            self._progress.say(line)

    def _note_stop(self, run_dir: Path, stopped: Stopped) -> None:
        try:
            note_stop(run_dir, stopped.signal_name)
        except (OSError, HarnessError) as error:
            self._progress.say(f"harness: warning: a launcher's restart would train on: {error}")

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def before_abort(self, failure: PeerFailure) -> None:
        """The watcher's thread, just before it ends a process that is stuck."""
        if self._topology.rank == 0:
            self._progress.say(redact_message(f"harness: error: {failure}"))
            self._stop_sampler()
            self._end(_status_of(failure), _reason_of(failure), FAILURE_WAIT_S)

    def _end(
        self, status: RunStatus, reason: str, timeout_s: float, may_wait: Callable[[], bool] = lambda: True
    ) -> None:
        tracker, self._tracker, self._checkpoints = self._tracker, None, None
        if tracker is None:
            return

        def waiting(left: Remaining) -> bool:
            self._progress.delivering(left.share, str(left))
            return may_wait()

        try:
            try:
                done = tracker.finish(status, reason, timeout_s, waiting)
            finally:
                self._progress.stop()
                self._say_warnings(tracker)
        except HarnessError as error:
            # The disk is full, say: the publisher sees the trainer go, and marks the run by itself.
            tracker.detach()
            self._say(f"harness: warning: {error}")
            return
        if not done and self._config.offline:
            self._say(f"offline: deliver it with `harness sync {tracker.run_dir}`")
        delivered = read_delivered(tracker.run_dir / "outbox")
        if not done and not self._config.offline and tracker.run_id is not None:
            self._say(f"harness: warning: {undelivered_line(tracker.run_dir, delivered)}")
        if delivered.num_damaged:
            self._say(f"harness: warning: {damaged_line(tracker.run_dir, delivered)}")
        if delivered.refused:
            self._say(f"harness: warning: {refused_line(tracker.run_dir, delivered)}")


def _status_of(error: BaseException) -> RunStatus:
    """What MLflow shows: KILLED where somebody wanted it to stop, else FAILED."""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        return "KILLED"
    return "KILLED" if isinstance(error, PeerFailure) and error.signal_name else "FAILED"


def _reason_of(error: BaseException) -> str:
    # An error of a database that the task reads names its address, say.
    return redact_message(reason_of(error))
