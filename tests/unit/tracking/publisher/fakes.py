"""A faulty store, a clock and a trainer for tests of the publisher."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.tracking.journal.entries import JOURNAL
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store_protocol import PublisherSettings, WantedRun
from harness.tracking.publisher.publisher import Publisher
from harness.tracking.publisher.retries import Clock


class Refusal(Exception):
    """A permanent refusal by the store."""


class Killed(BaseException):
    """The publisher is killed."""


class FaultyStore:
    """Records its calls, and fails as scripted.

    Args:
        failures: for each call in turn: None (success), an error (nothing is stored), or a pair of "stored" and an
            error (the value is stored, and the response is lost).
    """

    def __init__(self, *failures: BaseException | tuple[str, BaseException] | None) -> None:
        self.run_id = ""
        self.experiment_id = ""
        self.experiment_name: str | None = None
        self.calls: list[tuple[str, Any]] = []
        self.num_tries = 0
        self.in_use: set[str] = set()
        self.model_specs: list[Mapping[str, Any] | None] = []
        self._failures = list(failures)

    def _call(self, name: str, value: Any) -> None:
        self.num_tries += 1
        failure = self._failures.pop(0) if self._failures else None
        if isinstance(failure, BaseException):
            raise failure
        self.calls.append((name, value))
        if failure is not None:
            raise failure[1]

    def open_run(self, wanted: WantedRun) -> None:
        self._call("open_run", wanted)
        self.run_id, self.experiment_id = "run-1", "exp-1"

    def tags(self) -> Mapping[str, str]:
        return {key: value for name, tags in self.calls if name == "tags" for key, value in tags.items()}

    def reopen(self) -> None:
        self._call("reopen", None)

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        self._call("metrics", list(points))

    def log_params(self, values: Mapping[str, str]) -> None:
        self._call("params", dict(values))

    def set_tags(self, values: Mapping[str, str]) -> None:
        self._call("tags", dict(values))

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        self._call("dataset", dict(record))

    def log_text(self, name: str, content: str) -> None:
        self._call("text", (name, content))

    def log_checkpoint(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        model_spec: Mapping[str, Any] | None,
    ) -> str:
        self._call("checkpoint", (record["name"], directory, registration))
        self.model_specs.append(model_spec)
        return f"m-{record['name']}"

    def drop_resume_state(self, key: str) -> Sequence[str]:
        self._call("drop", key)
        return [f"all but {key} keep it"]

    def is_permanent(self, error: Exception) -> bool:
        return isinstance(error, Refusal)

    def handle_transient_error(self, error: Exception) -> None:
        """There is no timeout to extend."""

    def retire_checkpoint(self, key: str, registration: Registration | None) -> bool:
        self._call("retire", (key, registration))
        return key not in self.in_use

    def set_terminated(self, status: str | None, end_time_ms: int, *, is_user_run: bool = False) -> None:
        self._call("end", (status, end_time_ms))

    @property
    def kinds(self) -> list[str]:
        return [name for name, _ in self.calls]


class FakeClock(Clock):
    """A clock that advances only while the publisher sleeps.

    Args:
        wake: called after each pause.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.time_s = 0.0
        self.pauses_s: list[float] = []
        self._wake = wake

    def now_s(self) -> float:
        return self.time_s

    def sleep(self, pause_s: float) -> None:
        self.time_s += pause_s
        self.pauses_s.append(pause_s)
        assert len(self.pauses_s) < 1000, "the publisher waits forever"
        time.sleep(0.001)  # lets the artifact worker run
        self._wake()


class FakeTrainer:
    """A trainer that exits when `exited` returns True."""

    def __init__(self, exited: Callable[[], bool] = lambda: False) -> None:
        self._exited = exited

    def has_exited(self) -> bool:
        return self._exited()


SETTINGS = PublisherSettings(
    "run", "http://me:hunter2@host:5000", "exp", Registration("registered"), start_timeout_s=10.0
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"run_name": "run", "run_key": "key-1"}))
    return tmp_path


@pytest.fixture
def outbox(run_dir: Path) -> JournalWriter:
    return JournalWriter(run_dir / "outbox")


def publisher(
    run_dir: Path,
    store: FaultyStore,
    clock: FakeClock | None = None,
    exited: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Publisher:
    replaced = dataclasses.replace(SETTINGS, **settings)
    return Publisher(run_dir, replaced, store, FakeTrainer(exited), clock=clock or FakeClock())


def end(outbox: JournalWriter, status: str = "FINISHED") -> None:
    outbox.append("end", {"status": status, "reason": "done"}, 99)


def journal_bytes(run_dir: Path) -> int:
    return (run_dir / "outbox" / JOURNAL).stat().st_size
