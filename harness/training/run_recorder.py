"""Write rank zero's metrics, parameters, model, data sets and checkpoints into a run's journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from harness.checkpoint.format.commit import Manifest, list_checkpoints
from harness.config.schema import ClassSpec, TrackingConfig
from harness.errors import reason_of
from harness.io.progress import Progress
from harness.io.redact import redact_message
from harness.models.model_spec import ExampleSource, infer_signature, make_model_spec
from harness.run.stop_request import StopLead
from harness.tracking import provenance
from harness.tracking.journal.logged_points import Point
from harness.tracking.tracker import Tracker


class RunRecorder:
    """Write the journal of a run through its tracker.

    Nothing is written without a tracker: on all ranks but zero, and after the run's end.

    Effects: not collective. Main thread, except `log_system_metrics` (the sampler's thread), `sync`, `publish` and
    `retire` (the checkpoint thread). Blocks and writes as the tracker does.

    Args:
        monitor: metric that ranks checkpoints; None without one.
        lead: time between a stop request and the job's end.
    """

    def __init__(self, config: TrackingConfig, progress: Progress, monitor: str | None, lead: StopLead) -> None:
        self._config = config
        self._progress = progress
        self._monitor = monitor
        self._lead = lead
        self._tracker: Tracker | None = None
        self._known_datasets: set[str] = set()
        # Name of a metric in MLflow -> its latest point.
        self._latest_points: dict[str, Point] = {}
        self._points_of: dict[str, list[list[Any]]] = {}

    def open(self, tracker: Tracker) -> None:
        """Write to this tracker from now on."""
        self._tracker = tracker

    def close(self) -> Tracker | None:
        """Stop writing; return the tracker, once."""
        tracker, self._tracker = self._tracker, None
        return tracker

    @property
    def tracker(self) -> Tracker | None:
        """The tracker; None on all ranks but zero and after the run's end."""
        return self._tracker

    def say(self, line: str) -> None:
        """Print a line about tracking, unless ``tracking.silent`` is set."""
        if not self._config.silent:
            self._progress.say(line)

    def warn(self, line: str) -> None:
        """Print a warning about tracking, unless ``tracking.silent`` is set."""
        self.say(f"harness: warning: {line}")

    def show_warnings(self, tracker: Tracker) -> None:
        """Print the tracker's pending warnings."""
        for warning in tracker.pop_warnings():
            self.warn(warning)

    # ------------------------------------------------------------------ metrics, parameters

    def set_start(self, step: int, checkpoint: str | None) -> None:
        """Set the step, and the checkpoint if any, that this attempt resumes from; reads the journal.

        Points that MLflow has from that step on are not sent again. Call it before any metric is logged; otherwise a
        continued run starts at step 0.
        """
        if self._tracker is not None:
            self._latest_points = dict(self._tracker.resume_from(step, checkpoint).latest)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write reduced metrics by optimizer step."""
        self._log(values, step, is_own_step=False)

    def log_recorded(self, values: Mapping[str, float], step: int) -> None:
        """Write metrics by a step that the script counts itself."""
        self._log(values, step, is_own_step=True)

    def _log(self, values: Mapping[str, float], step: int, *, is_own_step: bool) -> None:
        if self._tracker is not None:
            self._latest_points.update(self._tracker.log_metrics(values, step, is_own_step=is_own_step))
            self.show_warnings(self._tracker)

    def log_system_metrics(self, values: Mapping[str, float]) -> None:
        """Write the utilization of the nodes. Called by the sampler's thread."""
        if (tracker := self._tracker) is not None:
            tracker.log_system_metrics(values)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Write further nested parameters; print which of them have changed since the run began."""
        if self._tracker is None:
            return
        if (drift := self._tracker.log_params(provenance.flatten_params(values))).changed:
            self.say(f"parameters have changed since the run began: {drift.as_line()}")
        self.show_warnings(self._tracker)

    # ---------------------------------------------------------------------- model and data

    def describe_model(self, model: nn.Module, wrapped: nn.Module) -> None:
        """Write a summary of the user's model, which is trained as `wrapped`, as an artifact."""
        if self._tracker is None:
            return
        self._tracker.log_text("model_summary.txt", provenance.model_summary(model, wrapped))
        if not self._tracker.has_model_spec:
            self.describe_recipe(None, model, None, None)
            if self._publishes:
                made = "model"
                if isinstance(model, nn.ModuleDict):
                    made = f"nn.ModuleDict({{{', '.join(f'{name!r}: ...' for name in model)}}})"
                self.say(
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
        """Write how to rebuild the run's models, with their signature; see `harness.models.model_spec`.

        Rank zero alone runs the model. If that fails, the models have no signature, and a warning gives the reason.
        """
        if self._tracker is None:
            return
        values = make_model_spec(spec, model, packages)
        if files:
            values["files"] = dict(files)
        if example is not None and self._publishes:
            try:
                values |= infer_signature(model, example, dynamic_axes)
            except Exception as error:
                # The task's error may contain a database address with its password.
                reason = redact_message(reason_of(error))
                self.warn(f"the models in MLflow have no signature: input_example: {reason}")
        self._tracker.log_model_spec(values)

    def digest_of(self, batch: Any, context: str) -> provenance.BatchDigest | None:
        """Return a batch's digest for `describe_dataset`, or None if not needed; waits once for its device."""
        if self._tracker is None or not self._config.log_datasets or context in self._known_datasets:
            return None
        return provenance.batch_digest(batch)

    def describe_dataset(self, loader: Any, context: str, batch: Any = None) -> None:
        """Write the data set of a loader as an input of the run, once for each of ``train`` and ``eval``.

        The data set is described, not read. `batch` is the first batch of this rank, its `BatchDigest`, or None.
        """
        dataset = getattr(loader, "dataset", None)
        if self._tracker is None or dataset is None or context in self._known_datasets:
            return
        digest = self.digest_of(batch, context) if not isinstance(batch, provenance.BatchDigest | None) else batch
        self._known_datasets.add(context)
        if self._config.log_datasets:
            record = provenance.dataset_record(dataset, context, digest)
            self._tracker.log_dataset(record, is_exact=provenance.own_digest(dataset) is not None)

    # ------------------------------------------------------------------------- checkpoints

    def log_save(self, costs: Mapping[str, float], step: int) -> None:
        """Write the costs of a save; warn if a checkpoint takes too long for the job's stop lead."""
        self.log_metrics(costs, step)
        if (line := self._lead.check(costs.get("checkpoint/durable_s", 0.0))) is not None:
            self._progress.say(f"harness: warning: {line}")

    def keep_points(self, checkpoint: str, metrics: Mapping[str, float]) -> None:
        """Keep the current points of a checkpoint's metrics, as training logs newer ones before it is committed."""
        if (tracker := self._tracker) is not None:
            latest = self._latest_points
            names = [tracker.metric_name(key) for key in metrics]
            self._points_of[checkpoint] = [[name, *latest[name]] for name in names if name in latest]

    def sync(self) -> None:
        """Make all entries durable. Called by the checkpoint thread before it commits a checkpoint that needs them."""
        if (tracker := self._tracker) is not None:
            tracker.sync()

    def publish(self, checkpoint: str, manifest: Manifest) -> None:
        """Write the entry of a committed checkpoint. Called by the checkpoint thread."""
        if (tracker := self._tracker) is not None:
            self._publish(tracker, checkpoint, manifest)

    def _publish(self, tracker: Tracker, checkpoint: str, manifest: Manifest) -> None:
        resume_files = self._resume_files(manifest)
        tracker.log_checkpoint(
            {
                "name": checkpoint,
                "key": manifest.key,
                "epoch": manifest.epoch,
                "step": manifest.step,
                "files": [*manifest.weight_files, *resume_files, "manifest.json"],
                "resume_files": resume_files,
                "log_resume_state": self._config.log_resume_state,
                "metrics": self._points_of.pop(checkpoint, []),
                "monitored": None if self._monitor is None else manifest.metrics.get(self._monitor),
                "time_ms": manifest.time_ms,
                "size_bytes": sum(file.size_bytes for file in manifest.files if file.name in manifest.weight_files),
            }
        )

    def _resume_files(self, manifest: Manifest) -> Sequence[str]:
        if self._config.log_resume_state == "none" or not manifest.can_be_resumed:
            return []
        return [file.name for file in manifest.files if file.name not in manifest.weight_files]

    def publish_forgotten(self, checkpoints_dir: Path) -> None:
        """Publish checkpoints of an attempt that was killed between their commit and their journal entry."""
        tracker = self._tracker
        if tracker is None or not self._config.log_models:
            return
        for name, manifest in list_checkpoints(checkpoints_dir):
            if not tracker.has_checkpoint(manifest.key):
                points = tracker.points_at(manifest.metrics, manifest.step)
                self._points_of[name] = [[key, *point] for key, point in points.items()]
                self._publish(tracker, name, manifest)

    def retire(self, checkpoint: str, key: str) -> None:
        """Write that a checkpoint is about to be removed. Called by the checkpoint thread."""
        if (tracker := self._tracker) is not None:
            tracker.retire_checkpoint({"name": checkpoint, "key": key})
