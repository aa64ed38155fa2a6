from __future__ import annotations

from pathlib import Path

import pytest

from harness.durable import replace_file


def test_new_text_is_there_when_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    replace_file(path, "old, and longer")
    replace_file(path, "neu: ä")
    assert path.read_text(encoding="utf-8") == "neu: ä"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_old_text_stays_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    replace_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "half of it, then a lone surrogate \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_error_is_the_systems_when_the_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "missing" / "x", "text")


def test_no_temporary_is_left_when_the_rename_fails(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        replace_file(tmp_path / "taken", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
