"""What the publisher needs of a tracking store, and what it is told about the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.tracking.journal.writer import DEFAULT_MAX_BYTES
from harness.tracking.mlflow.registry import Registration


@dataclass(frozen=True)
class WantedRun:
    """Which run of a store is meant.

    Args:
        key: what it is found by where its id is not known.
        name: what it is called where it is made.
        experiment_name: where it is made.
        run_id: the store's own name for it, once there is one.
        created_ms: when it began, in milliseconds since the epoch; None: now.
        parent: name or id of the run that it is nested under; None: it is not.
        experiment_id: where it is made; None: where `experiment_name` says.
        given_run_id: of a run that the user has made, in place of one that is made here; None: there is none.
    """

    key: str
    name: str
    experiment_name: str
    run_id: str | None = None
    created_ms: int | None = None
    parent: str | None = None
    experiment_id: str | None = None
    given_run_id: str | None = None


class Store(Protocol):
    """A tracking store; `MlflowStore` is one."""

    run_id: str
    experiment_id: str
    # None: it is the wanted one.
    experiment_name: str | None

    def open_run(self, wanted: WantedRun) -> None:
        """Find the run by its id, or find or make the one that carries its key; it is running then."""

    def tags(self) -> Mapping[str, str]:
        """The tags that the run has."""
        ...

    def reopen(self) -> None:
        """Let the run be running again, however it ended."""

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log (key, value, time in ms, step) points."""

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters."""

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        """Record an input."""

    def log_text(self, name: str, content: str) -> None:
        """Put a text file among the artifacts."""

    def log_checkpoint(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        recipe: Mapping[str, Any] | None,
    ) -> str:
        """Publish a checkpoint, with how its model is built again; returns the model's id."""
        ...

    def drop_resume_state(self, key: str) -> Sequence[str]:
        """Delete what resuming needs from all of the run's checkpoints but one; lines on what could not be deleted."""
        ...

    def retire_checkpoint(self, key: str, registration: Registration | None) -> bool:
        """Take back a checkpoint that was pruned; whether it is gone, as against kept because it is in use."""
        ...

    def end(self, status: str | None, end_time_ms: int, *, is_users: bool = False) -> None:
        """Set the final status; None: the user's process does, which is alive; `is_users`: unless that has done so."""

    def failed(self, error: Exception) -> None:
        """Take note of an error after which the same is tried again."""


@dataclass(frozen=True)
class PublisherSettings:
    """What the trainer tells the publisher. Times are in seconds; `attempt` is the trainer's own, from 1.

    `leaves_open`: a run whose end nobody has written is still trained, elsewhere, and does not end here.
    """

    run_name: str
    tracking_uri: str
    experiment_name: str
    registration: Registration | None
    start_timeout_s: float
    attempt: int = 1
    parent_run: str | None = None
    max_upload_bytes_per_s: float | None = None
    max_outbox_bytes: int = DEFAULT_MAX_BYTES
    leaves_open: bool = False
    experiment_id: str | None = None
    given_run_id: str | None = None


class RefusedError(Exception):
    """Something of ours that cannot be delivered, now or later."""
