from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from harness.errors import TrackingError
from harness.tracking.mlflow.given_run import absolute_sqlite
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
def test_nothing_changes_and_nobody_is_asked_when_the_run_is_new_or_at_the_same_address(record: dict[str, str]) -> None:
    asked: list[tuple[str, str]] = []
    assert locate_run(SETTINGS, record, places(asked, False)) == (SETTINGS, [])
    assert asked == []


def test_run_stays_where_it_began_and_says_so_when_another_address_is_configured() -> None:
    record = {**RECORD, "tracking_uri": "http://old:5000"}
    asked: list[tuple[str, str]] = []
    settings, (note,) = locate_run(SETTINGS, record, places(asked, False))
    assert settings.tracking_uri == "http://old:5000"
    assert asked == [("http://me:secret@a:5000", "r1")]
    assert "r1 continues at http://old:5000, where it began, not at http://me:***@a:5000" in note


def test_run_goes_on_at_the_address_configured_when_it_is_found_there() -> None:
    record = {**RECORD, "tracking_uri": "http://old:5000"}
    assert locate_run(SETTINGS, record, places([], True)) == (SETTINGS, [])


def test_error_asks_for_the_address_when_only_its_password_is_missing() -> None:
    record = {**RECORD, "tracking_uri": "http://me:***@old:5000"}
    with pytest.raises(TrackingError, match=r"it is at http://me:\*\*\*@old:5000 and not at .*with the password"):
        locate_run(SETTINGS, record, places([], False))


def test_run_stays_in_its_experiment_and_says_so_when_another_is_configured() -> None:
    settings, (note,) = locate_run(SETTINGS, {**RECORD, "experiment_name": "first"}, places([], False))
    assert settings.experiment_name == "first"
    assert "stays in experiment 'first', not 'exp'" in note


@pytest.mark.parametrize("uri", ["sqlite:////a/b.db", "sqlite:///:memory:", "http://host:5000", "postgresql://u@h/db"])
def test_uri_is_unchanged_when_it_is_absolute(uri: str) -> None:
    assert absolute_sqlite(uri) == uri


def test_uri_holds_from_any_directory_when_sqlite_is_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_sqlite("sqlite:///sub/mlflow.db") == f"sqlite:///{tmp_path}/sub/mlflow.db"


@pytest.mark.parametrize("name", ["what?", "a#b", "a%20b", "100%", "a b", "a%3Fb", "x&y=1;z"])
def test_database_is_in_the_working_directory_when_its_name_has_characters_of_uris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    uri = absolute_sqlite("sqlite:///mlflow.db?timeout=5")
    monkeypatch.chdir("/")
    engine = create_engine(uri)
    with engine.connect() as connection:
        connection.execute(text("create table found (x int)"))
        connection.commit()
    engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["mlflow.db"]
    assert absolute_sqlite(uri) == uri
