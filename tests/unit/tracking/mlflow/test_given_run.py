from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from harness.tracking.mlflow.given_run import absolute_sqlite


@pytest.mark.parametrize("uri", ["sqlite:////a/b.db", "sqlite:///:memory:", "http://host:5000", "postgresql://u@h/db"])
def test_uri_is_unchanged_when_it_is_absolute(uri: str) -> None:
    assert absolute_sqlite(uri) == uri


def test_uri_becomes_absolute_when_sqlite_is_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_sqlite("sqlite:///sub/mlflow.db") == f"sqlite:///{tmp_path}/sub/mlflow.db"


@pytest.mark.parametrize("name", ["what?", "a#b", "a%20b", "100%", "a b", "a%3Fb", "x&y=1;z"])
def test_directory_is_escaped_when_its_name_has_uri_characters(
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
