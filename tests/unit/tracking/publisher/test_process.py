from __future__ import annotations

from typing import Any

import pytest

from harness.errors import TrackingError
from harness.tracking.mlflow.store_protocol import PublisherSettings
from harness.tracking.publisher.process import locate_run

SETTINGS = PublisherSettings("it", "http://me:secret@a:5000", "exp", None, start_timeout_s=10.0)
RECORD = {
    "run_name": "it",
    "run_key": "k",
    "run_id": "r1",
    "experiment_name": "exp",
    "tracking_uri": "http://me:***@a:5000",
}


def places(asked: list[tuple[str, str]], answer: bool) -> Any:
    def has_run(uri: str, run_id: str) -> bool:
        asked.append((uri, run_id))
        return answer

    return has_run


@pytest.mark.parametrize("record", [{"run_name": "it", "run_key": "k"}, RECORD])
def test_settings_are_unchanged_when_the_run_is_new_or_not_moved(record: dict[str, str]) -> None:
    asked: list[tuple[str, str]] = []
    assert locate_run(SETTINGS, record, places(asked, False)) == (SETTINGS, [])
    assert asked == []


def test_run_stays_at_its_address_when_another_is_configured() -> None:
    record = {**RECORD, "tracking_uri": "http://old:5000"}
    asked: list[tuple[str, str]] = []
    settings, (note,) = locate_run(SETTINGS, record, places(asked, False))
    assert settings.tracking_uri == "http://old:5000"
    assert asked == [("http://me:secret@a:5000", "r1")]
    assert "r1 continues at http://old:5000, where it began, not at http://me:***@a:5000" in note


def test_configured_address_is_used_when_it_has_the_run() -> None:
    record = {**RECORD, "tracking_uri": "http://old:5000"}
    assert locate_run(SETTINGS, record, places([], True)) == (SETTINGS, [])


def test_error_asks_for_the_address_when_its_password_is_unknown() -> None:
    record = {**RECORD, "tracking_uri": "http://me:***@old:5000"}
    with pytest.raises(TrackingError, match=r"it is at http://me:\*\*\*@old:5000 and not at .*with the password"):
        locate_run(SETTINGS, record, places([], False))


def test_run_stays_in_its_experiment_when_another_is_configured() -> None:
    settings, (note,) = locate_run(SETTINGS, {**RECORD, "experiment_name": "first"}, places([], False))
    assert settings.experiment_name == "first"
    assert "stays in experiment 'first', not 'exp'" in note
