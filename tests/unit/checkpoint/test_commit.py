from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.commit import (
    FORMAT,
    MANIFEST,
    FileRecord,
    Manifest,
    Range,
    commit,
    discard,
    list_checkpoints,
    read_manifest,
    remove_leftovers,
    temporary_of,
)
from harness.errors import CheckpointError


def manifest(step: int = 1, time_ms: int = 1) -> Manifest:
    return Manifest(
        key=f"key-{step}",
        epoch=3,
        step=step,
        time_ms=time_ms,
        metrics={"eval/loss": 0.25},
        files=(
            FileRecord("model-00001-of-00002.safetensors", 10, (Range(0, 4, 0, "aa"), Range(4, 10, 1, "bb"))),
            FileRecord("model.safetensors.index.json", 5, (Range(0, 5, 0, "cc"),)),
            FileRecord("optimizer.safetensors", 7, (Range(0, 7, 0, "dd"),)),
        ),
        topology={"strategy": "single"},
        versions={"torch": "2"},
        save={"transport": "direct", "copy_s": 0.25},
    )


def begin(final: Path) -> Path:
    temporary = temporary_of(final, "attempt-1")
    temporary.mkdir(parents=True)
    return temporary


def save(final: Path, record: Manifest) -> None:
    temporary = begin(final)
    (temporary / "model.safetensors").write_bytes(b"weights")
    commit(temporary, final, record)


def test_manifest_reads_back_the_same_when_committed(tmp_path: Path) -> None:
    save(tmp_path / "epoch-0001", manifest())
    assert read_manifest(tmp_path / "epoch-0001") == manifest()
    assert (tmp_path / "epoch-0001" / "model.safetensors").read_bytes() == b"weights"
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0001"]


def test_sizes_and_weight_files_are_the_manifests_when_asked() -> None:
    assert manifest().size_bytes == 22
    assert manifest().weight_files == ("model-00001-of-00002.safetensors", "model.safetensors.index.json")


def test_nothing_is_listed_when_there_is_no_manifest(tmp_path: Path) -> None:
    unfinished = begin(tmp_path / "epoch-0001")
    (unfinished / "model.safetensors").write_bytes(b"half")
    (unfinished / MANIFEST).write_text("{}")  # even so: the rename has not happened
    (tmp_path / "epoch-0002").mkdir()
    (tmp_path / "epoch-0002" / "model.safetensors").write_bytes(b"whole")
    (tmp_path / "a file").write_text("")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "missing") == []


def test_order_is_by_step_then_time_when_listed(tmp_path: Path) -> None:
    save(tmp_path / "c", manifest(step=10, time_ms=5))
    save(tmp_path / "a", manifest(step=10, time_ms=7))
    save(tmp_path / "b", manifest(step=9, time_ms=9))
    assert [name for name, _ in list_checkpoints(tmp_path)] == ["b", "c", "a"]


def test_earlier_checkpoint_stays_when_the_name_is_taken(tmp_path: Path) -> None:
    final = tmp_path / "epoch-0001"
    save(final, manifest(step=1))
    temporary = temporary_of(final, "attempt-2")
    temporary.mkdir()
    with pytest.raises(CheckpointError, match=f"{final}: there is a checkpoint of that name already"):
        commit(temporary, final, manifest(step=2))
    assert read_manifest(final).step == 1


def test_temporary_directories_differ_when_attempts_or_checkpoints_do(tmp_path: Path) -> None:
    directories = {temporary_of(tmp_path / name, attempt) for name in ("a", "b") for attempt in ("1", "2")}
    assert len(directories) == 4
    assert {path.parent for path in directories} == {tmp_path}


def test_checkpoint_is_unseen_when_it_is_not_committed_yet(tmp_path: Path) -> None:
    temporary = begin(tmp_path / "epoch-0001")
    assert not (tmp_path / "epoch-0001").exists()
    commit(temporary, tmp_path / "epoch-0001", manifest())
    assert not temporary.exists()


def test_leftovers_alone_are_removed_when_cleaning_up(tmp_path: Path) -> None:
    save(tmp_path / "epoch-0001", manifest())
    begin(tmp_path / "epoch-0002")
    third = begin(tmp_path / "epoch-0003")
    discard(third)
    assert not third.exists()
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0001"]


def test_manifest_is_read_when_it_does_not_say_how_it_was_saved(tmp_path: Path) -> None:
    record = {key: value for key, value in WHOLE.items() if key != "save"}
    (tmp_path / MANIFEST).write_text(json.dumps(record))
    assert read_manifest(tmp_path) == dataclasses.replace(manifest(), save={})


def test_error_has_the_path_when_there_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: has no manifest.json, so it is not a whole checkpoint"):
        read_manifest(tmp_path)


WHOLE: dict[str, Any] = {"format": FORMAT, "version": 1, **dataclasses.asdict(manifest())}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "cannot be read"),
        (json.dumps(WHOLE)[:-20], "cannot be read"),
        ("\ud800", "cannot be read"),
        ("[]", f"is not the manifest of a {FORMAT}"),
        ("{}", f"is not the manifest of a {FORMAT}"),
        (json.dumps({**WHOLE, "format": "other"}), f"is not the manifest of a {FORMAT}"),
        (json.dumps({**WHOLE, "version": 2}), "has version 2, this harness reads 1"),
        (json.dumps({key: value for key, value in WHOLE.items() if key != "step"}), "is damaged: KeyError('step')"),
        (json.dumps({**WHOLE, "files": 3}), "is damaged"),
        (json.dumps({**WHOLE, "files": [{"name": "x"}]}), "is damaged"),
        (json.dumps({**WHOLE, "files": [{"name": "x", "size_bytes": 1, "ranges": [[0]]}]}), "is damaged"),
        (json.dumps({**WHOLE, "files": [{"name": "x", "size_bytes": 1, "ranges": [[0, 1, "aa"]]}]}), "is damaged"),
    ],
)
def test_error_has_the_path_when_the_manifest_is_damaged_or_newer(tmp_path: Path, content: str, expected: str) -> None:
    final = tmp_path / "epoch-0001"
    save(final, manifest())
    (final / MANIFEST).write_bytes(content.encode("utf-8", "surrogatepass"))
    for read in (lambda: read_manifest(final), lambda: list_checkpoints(tmp_path)):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert str(caught.value).startswith(f"{final / MANIFEST}: ")
        assert expected in str(caught.value)
