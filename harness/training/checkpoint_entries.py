"""What the journal is told of checkpoints: that one is committed, with the points of its metrics, or is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.checkpoint.format.commit import Manifest, list_checkpoints
from harness.config.schema import TrackingConfig
from harness.tracking.journal.logged_points import Point
from harness.tracking.tracker import Tracker


class CheckpointEntries:
    """Writes them; knows which point of a metric was the latest when a checkpoint was taken.

    Effects: not collective: rank zero's. Main thread, but for `publish` and `retire` (the writer thread). They block
    as the tracker's entries do, and leave what those leave.

    Args:
        tracker: of the run.
        config: what goes to MLflow.
        monitor: the metric that ranks checkpoints; None: none does.

    Attributes:
        latest: name of a metric in MLflow -> its latest point.
    """

    def __init__(self, tracker: Tracker, config: TrackingConfig, monitor: str | None) -> None:
        self._tracker = tracker
        self._config = config
        self._monitor = monitor
        self._points_of: dict[str, list[list[Any]]] = {}
        self.latest: dict[str, Point] = {}

    def keep_points(self, checkpoint: str, metrics: Mapping[str, float]) -> None:
        """Remember the points that a checkpoint's metrics are, as they are now.

        By the time that it is committed, training has logged others under the same names.
        """
        names = [self._tracker.metric_name(key) for key in metrics]
        self._points_of[checkpoint] = [[name, *self.latest[name]] for name in names if name in self.latest]

    def publish(self, checkpoint: str, manifest: Manifest) -> None:
        """A checkpoint is committed."""
        resume_files = self._resume_files(manifest)
        self._tracker.log_checkpoint(
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
        """Names of what only resuming needs, where MLflow is to have it."""
        if self._config.log_resume_state == "none" or not manifest.can_be_resumed:
            return []
        return [file.name for file in manifest.files if file.name not in manifest.weight_files]

    def publish_forgotten(self, checkpoints_dir: Path) -> None:
        """Publish what an attempt was killed over, between a checkpoint's commit and its entry in the journal."""
        for name, manifest in list_checkpoints(checkpoints_dir):
            if self._config.log_models and not self._tracker.has_checkpoint(manifest.key):
                points = self._tracker.points_at(manifest.metrics, manifest.step)
                self._points_of[name] = [[key, *point] for key, point in points.items()]
                self.publish(name, manifest)

    def retire(self, checkpoint: str, key: str) -> None:
        """A checkpoint is about to be removed."""
        self._tracker.retire_checkpoint({"name": checkpoint, "key": key})
