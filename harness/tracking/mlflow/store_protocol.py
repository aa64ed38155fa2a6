"""Define the interface between the publisher and a tracking store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.tracking.journal.writer import DEFAULT_MAX_BYTES
from harness.tracking.mlflow.registry import Registration

Item = TypeVar("Item")


@dataclass(frozen=True)
class WantedRun:
    """The run to open in a store.

    Args:
        key: identifies the run while its id is unknown; stored as a tag.
        name: display name of a new run.
        run_id: the store's id of the run, once it is known.
        created_ms: start time of a new run, in milliseconds since the epoch; None for now.
        parent: name or id of the parent run.
        experiment_id: experiment of a new run; overrides `experiment_name`.
        given_run_id: id of the user's run that replaces a new one.
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
    """One run in a tracking store; `MlflowStore` implements it. Each method is idempotent."""

    run_id: str
    experiment_id: str
    # None for the requested experiment.
    experiment_name: str | None

    def open_run(self, wanted: WantedRun) -> None:
        """Find the run by its id or its key, or create it, and set it RUNNING."""

    def tags(self) -> Mapping[str, str]:
        """Return the run's tags."""
        ...

    def reopen(self) -> None:
        """Set the run RUNNING again."""

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log (key, value, time in ms, step) points."""

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters."""

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        """Log a data set as an input of the run."""

    def log_text(self, name: str, content: str) -> None:
        """Upload a text file to the run's artifacts."""

    def log_checkpoint(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        model_spec: Mapping[str, Any] | None,
    ) -> str:
        """Publish a checkpoint as a model and return the model's id."""
        ...

    def drop_resume_state(self, key: str) -> Sequence[str]:
        """Delete the resume files of all older checkpoints; return a line for each one that keeps them."""
        ...

    def retire_checkpoint(self, key: str, registration: Registration | None) -> bool:
        """Delete the model of a pruned checkpoint; False if it is kept because it is in use."""
        ...

    def set_terminated(self, status: str | None, end_time_ms: int, *, is_user_run: bool = False) -> None:
        """Set the final status; None if the user's process is alive and ends its own run."""

    def is_permanent(self, error: Exception) -> bool:
        """Whether a retry is useless, because the store has refused the request permanently."""
        ...

    def handle_transient_error(self, error: Exception) -> None:
        """Adjust time limits after an error, before the request is retried."""


@dataclass(frozen=True)
class PublisherSettings:
    """The publisher's settings, from the trainer or from ``settings.json``.

    Args:
        attempt: number of the trainer's attempt, from 1.
        leaves_open: whether the run is still being trained, so that it is not marked FAILED without an end entry.
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
    """An entry that can never be delivered, for example because its checkpoint is gone."""


def send_in_halves(
    items: Sequence[Item], send: Callable[[Sequence[Item]], None], is_permanent: Callable[[Exception], bool]
) -> Iterator[tuple[Item, Exception]]:
    """Send items in one request; after a permanent error, bisect and yield each refused item with its error.

    One refused item among n takes about 2 log2(n) requests. The caller repeats everything after a transient error, so
    `send` must be idempotent.

    Raises:
        Exception: an error of `send` that is not permanent.
    """
    try:
        send(items)
    except Exception as error:
        if not is_permanent(error):
            raise
        if len(items) <= 1:
            yield from ((item, error) for item in items)
            return
        middle = len(items) // 2
        yield from send_in_halves(items[:middle], send, is_permanent)
        yield from send_in_halves(items[middle:], send, is_permanent)
