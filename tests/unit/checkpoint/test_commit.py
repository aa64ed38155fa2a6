from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.format.commit import (
    FORMAT,
    MANIFEST,
    VERSION,
    FileRecord,
    Manifest,
    Range,
    commit,
    discard,
    list_checkpoints,
    manifest_text,
    read_manifest,
    remove_leftovers,
    scan_checkpoints,
    temporary_of,
)
from harness.checkpoint.format.strict_json import checksum
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


def test_error_has_the_path_when_there_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: has no manifest.json, so it is not a whole checkpoint"):
        read_manifest(tmp_path)


def record_of(record: Manifest) -> dict[str, Any]:
    return dict(json.loads(manifest_text(record)))


def sealed(record: dict[str, Any]) -> str:
    """As another writer would have it: with the checksum of what it holds."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return json.dumps({**rest, "checksum": checksum(rest)})


WHOLE = record_of(manifest())
LAST = len(WHOLE["files"]) - 1


def changed(*path: Any, to: Any) -> str:
    """The manifest with one value in it changed, and the checksum of that."""
    record = copy.deepcopy(WHOLE)
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return sealed(record)


def without(*path: Any) -> str:
    record = copy.deepcopy(WHOLE)
    place = record
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return sealed(record)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is damaged: Expecting value"),
        (json.dumps(WHOLE)[:-20], "is damaged"),
        ("\ud800", "is damaged: 'utf-8' codec"),
        ("[" * 100_000, "is damaged: is nested too deeply"),
        (sealed(WHOLE)[:-1] + ', "step": 1}', "has the key 'step' twice"),
        (sealed(WHOLE).replace("0.25", "NaN"), "has NaN, which is no number in JSON"),
        (sealed(WHOLE).replace("0.25", "1e999"), "has 1e999, which no number of 64 bits is"),
        (sealed(WHOLE).replace("single", "\\ud800"), "surrogates not allowed"),
        (sealed(WHOLE).replace("0.25", "1" * 5000), "is damaged"),
        ("[]", f"is not the manifest of a {FORMAT}"),
        ("{}", f"is not the manifest of a {FORMAT}"),
        (changed("format", to="other"), f"is not the manifest of a {FORMAT}"),
        (changed("version", to=VERSION + 1), f"has version {VERSION + 1}, this harness reads {VERSION}; update it"),
        (changed("version", to=1), f"has version 1, this harness reads {VERSION}; use the harness that has written it"),
        (changed("version", to=True), "has version True"),
        (without("version"), "has version None"),
        (without("step"), "it has no step"),
        (json.dumps({key: value for key, value in WHOLE.items() if key != "checksum"}), "it has no checksum"),
        (json.dumps({**WHOLE, "step": 2}), "its checksum is not that of what it holds"),
        (json.dumps({**WHOLE, "checksum": None}), "its checksum is not that of what it holds"),
        (changed("key", to=3), "key is no text"),
        (changed("step", to=-1), "step is no whole number"),
        (changed("epoch", to=1.0), "epoch is no whole number"),
        (changed("time_ms", to=False), "time_ms is no whole number"),
        (changed("metrics", to=[]), "metrics is no object"),
        (changed("metrics", "eval/loss", to="0.5"), "metrics hold what is no number"),
        (changed("metrics", "eval/loss", to=True), "metrics hold what is no number"),
        (changed("versions", "torch", to=2), "versions hold what is no text"),
        (changed("files", to=3), "files is no list"),
        (changed("files", 0, to=3), "a file has no name, size_bytes or ranges"),
        (without("files", 0, "ranges"), "a file has no name, size_bytes or ranges"),
        *(
            (changed("files", 0, "name", to=name), "is no name of a file in it")
            for name in ("", ".", "..", "../a", "a/b")
        ),
        *(
            (changed("files", 0, "name", to=name), "is no name of a file in it")
            for name in ("/a", "a\\b", "a\0", MANIFEST, 1)
        ),
        (changed("files", 0, "name", to="optimizer.safetensors"), "it names a file twice"),
        (changed("files", LAST, "size_bytes", to=8), "optimizer.safetensors: its ranges end at 7, the file at 8"),
        (changed("files", LAST, "size_bytes", to=-7), "size_bytes is no whole number"),
        (changed("files", LAST, "ranges", to={}), "ranges is no list"),
        (changed("files", LAST, "ranges", to=[]), "its ranges end at 0, the file at 7"),
        (changed("files", 0, "ranges", 1, to=[4, 10, 1]), "is not the start, end, rank and digest of a range"),
        (changed("files", 0, "ranges", 1, 2, to=-1), "is not the start, end, rank and digest of a range"),
        (changed("files", 0, "ranges", 1, 0, to="4"), "is not the start, end, rank and digest of a range"),
        (changed("files", 0, "ranges", 1, 0, to=3), "a range from 3 to 10 follows one that ends at 4"),
        (changed("files", 0, "ranges", 1, 0, to=5), "a range from 5 to 10 follows one that ends at 4"),
        (changed("files", 0, "ranges", 1, 1, to=3), "a range from 4 to 3 follows one that ends at 4"),
        (changed("files", 0, "ranges", 0, 0, to=-1), "a range from -1 to 4 follows one that ends at 0"),
    ],
)
def test_error_has_the_path_when_the_manifest_is_damaged_or_newer(tmp_path: Path, content: str, expected: str) -> None:
    final = tmp_path / "epoch-0001"
    save(final, manifest())
    (final / MANIFEST).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(final)
    assert str(caught.value).startswith(f"{final / MANIFEST}: ")
    assert expected in str(caught.value)


def test_manifest_is_read_when_it_is_indented_and_ordered_otherwise(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(dict(reversed(WHOLE.items())), indent=4))
    assert read_manifest(tmp_path) == manifest()


def test_error_has_the_path_when_the_manifest_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / MANIFEST).mkdir()
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / MANIFEST)  # to open it would wait for a writer
    for name in "ab":
        with pytest.raises(CheckpointError, match=f"{tmp_path / name / MANIFEST}: is damaged: is not a file"):
            read_manifest(tmp_path / name)


def test_nothing_is_committed_when_a_metric_is_no_number_of_json(tmp_path: Path) -> None:
    temporary = begin(tmp_path / "epoch-0001")
    with pytest.raises(CheckpointError, match="its manifest cannot be written"):
        commit(temporary, tmp_path / "epoch-0001", dataclasses.replace(manifest(), metrics={"loss": math.nan}))
    assert list_checkpoints(tmp_path) == []


def test_good_ones_are_found_and_the_bad_ones_told_when_some_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / f"epoch-{step:04d}", manifest(step))
    (tmp_path / "epoch-0002" / MANIFEST).write_text(sealed(WHOLE)[:100])
    (tmp_path / "epoch-0003" / MANIFEST).write_text(changed("version", to=VERSION + 1))
    (tmp_path / "epoch-0000").mkdir()  # without a manifest it is no checkpoint, and no bad one
    found = scan_checkpoints(tmp_path)
    assert [name for name, _ in found.good] == ["epoch-0001", "epoch-0004"]
    assert found.good == list_checkpoints(tmp_path)
    (truncated, first), (newer, second) = found.bad
    assert (truncated, newer) == ("epoch-0002", "epoch-0003")
    assert str(tmp_path / "epoch-0002" / MANIFEST) in first
    assert f"has version {VERSION + 1}" in second


def test_error_has_the_path_when_the_directory_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'checkpoints'}: cannot be read: Not a directory"):
        scan_checkpoints(tmp_path / "checkpoints")
