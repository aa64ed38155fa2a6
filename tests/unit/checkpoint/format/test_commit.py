from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import xxhash

from harness.checkpoint.format.commit import (
    FORMAT,
    MANIFEST,
    VERSION,
    FileRecord,
    Manifest,
    commit,
    discard,
    list_checkpoints,
    manifest_text,
    read_manifest,
    remove_leftovers,
    scan_checkpoints,
    sealed,
    temporary_of,
)
from harness.checkpoint.format.ranges import Range, Ranges
from harness.errors import CheckpointError


def manifest(step: int = 1, time_ms: int = 1) -> Manifest:
    return Manifest(
        key=f"key-{step}",
        epoch=3,
        step=step,
        time_ms=time_ms,
        metrics={"eval/loss": 0.25},
        files=(
            FileRecord(
                "model-00001-of-00002.safetensors",
                10,
                Ranges.of([Range(0, 4, 0, "aa" * 16), Range(4, 10, 1, "bb" * 16)]),
            ),
            FileRecord("model.safetensors.index.json", 5, Ranges.of([Range(0, 5, 0, "cc" * 16)])),
            FileRecord("optimizer.safetensors", 7, Ranges.of([Range(0, 7, 0, "dd" * 16)])),
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


def test_earlier_checkpoint_remains_when_the_name_exists(tmp_path: Path) -> None:
    final = tmp_path / "epoch-0001"
    save(final, manifest(step=1))
    temporary = temporary_of(final, "attempt-2")
    temporary.mkdir()
    with pytest.raises(CheckpointError, match=f"{final}: a checkpoint of this name already exists"):
        commit(temporary, final, manifest(step=2))
    assert read_manifest(final).step == 1


def test_temporary_directories_differ_when_attempts_differ(tmp_path: Path) -> None:
    directories = {temporary_of(tmp_path / name, attempt) for name in ("a", "b") for attempt in ("1", "2")}
    assert len(directories) == 4
    assert {path.parent for path in directories} == {tmp_path}


def test_checkpoint_is_unseen_when_it_is_not_committed_yet(tmp_path: Path) -> None:
    temporary = begin(tmp_path / "epoch-0001")
    assert not (tmp_path / "epoch-0001").exists()
    commit(temporary, tmp_path / "epoch-0001", manifest())
    assert not temporary.exists()


def test_only_leftovers_are_removed_when_cleaning_up(tmp_path: Path) -> None:
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


WHOLE = record_of(manifest())
del WHOLE["checksum"]
LAST = len(WHOLE["files"]) - 1


def changed(*path: Any, to: Any) -> str:
    """The manifest that another writer would write: with one value changed, and the right checksum."""
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


def packed(column: bytes) -> str:
    return base64.b64encode(zlib.compress(column)).decode()


def int64(*values: int) -> str:
    return packed(struct.pack(f"<{len(values)}q", *values))


def int32(*values: int) -> str:
    return packed(struct.pack(f"<{len(values)}i", *values))


def canonical(version: int, **more: Any) -> str:
    """A manifest as versions 1 and 2 wrote it: the checksum is that of its canonical JSON."""
    files = [{**file, "ranges": [[0, file["size_bytes"], 0, "aa" * 16]]} for file in WHOLE["files"]]
    record = {**WHOLE, "files": files, "version": version, **more}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return json.dumps({**record, "checksum": xxhash.xxh3_128_hexdigest(text.encode())}, indent=1)


TEXT = sealed(WHOLE)
MISMATCH = "is damaged: its checksum does not match its content"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is damaged: Expecting value"),
        (TEXT[:-20], "is damaged"),
        (TEXT + " ", MISMATCH),
        (" " + TEXT, MISMATCH),
        (TEXT.replace("0.25", "0.26"), MISMATCH),
        (TEXT.replace(", ", ",  ", 1), MISMATCH),
        (TEXT.replace("checksum", "checksun"), "is damaged: it has no 'checksum'"),
        (TEXT.replace('"checksum": "', '"checksum": "0'), MISMATCH),
        ("\ud800", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("1" * 5000, "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged: it has no 'checksum'"),
        (canonical(2).replace("0.25", "NaN"), "is damaged: Out of range float values"),
        (canonical(2).replace("0.25", "0.26"), MISMATCH),
        (canonical(VERSION), MISMATCH),
        (canonical(2, format="other"), f"is damaged: it is not the manifest of a {FORMAT}"),
        (changed("format", to="other"), f"is damaged: it is not the manifest of a {FORMAT}"),
        (changed("version", to=VERSION + 1), f"has format version {VERSION + 1}, this harness reads 2 to {VERSION}; u"),
        (canonical(1), f"has format version 1, this harness reads 2 to {VERSION}; use the harness that wrote it"),
        (changed("version", to=True), "is damaged: version is True"),
        (without("version"), "is damaged: it has no 'version'"),
        (without("step"), "is damaged: it has no 'step'"),
        (changed("key", to=3), "is damaged: key is 3"),
        (changed("step", to=-1), "is damaged: step is -1"),
        (changed("epoch", to=1.0), "is damaged: epoch is 1.0"),
        (changed("time_ms", to=False), "is damaged: time_ms is False"),
        (changed("metrics", to=[]), "is damaged: metrics is []"),
        (changed("files", to=3), "is damaged"),
        (changed("files", 0, to=3), "is damaged"),
        (without("files", 0, "ranges"), "is damaged: it has no 'ranges'"),
        *(
            (changed("files", 0, "name", to=name), "is not the name of a file in the directory")
            for name in ("", ".", "..", "../a", "a/b", "/a", "a\\b", "a\0", MANIFEST)
        ),
        (changed("files", 0, "name", to=1), "is damaged"),
        (changed("files", 0, "name", to="optimizer.safetensors"), "a file is listed twice"),
        (changed("files", LAST, "size_bytes", to=8), "optimizer.safetensors: its ranges end at byte 7, not 8"),
        (changed("files", LAST, "size_bytes", to=-7), "its ranges end at byte 7, not -7"),
        (changed("files", LAST, "size_bytes", to=7.0), "its ranges end at byte 7, not 7.0"),
        (changed("files", LAST, "ranges", to={}), "is damaged: it has no 'digests'"),
        (changed("files", LAST, "ranges", to=[]), "is damaged"),
        (changed("files", 0, "ranges", "sizes", to=int64(4)), "1 sizes, 2 ranks and 32 bytes of digests do not match"),
        (
            changed("files", 0, "ranges", "ranks", to=int32(0, 1, 2)),
            "2 sizes, 3 ranks and 32 bytes of digests do not m",
        ),
        (changed("files", 0, "ranges", "digests", to="qg=="), "2 sizes, 2 ranks and 1 bytes of digests do not match"),
        (changed("files", 0, "ranges", "digests", to="x"), "is damaged"),
        (changed("files", 0, "ranges", "digests", to=1), "is damaged"),
        (changed("files", 0, "ranges", "ranks", to=int32(0, -1)), "a size or a rank is negative"),
        (changed("files", 0, "ranges", "sizes", to=int64(-1, 11)), "a size or a rank is negative"),
        (changed("files", 0, "ranges", "sizes", to=packed(b"1234567")), "is damaged: bytes length not a multiple"),
        (changed("files", 0, "ranges", "sizes", to="qg=="), "is damaged: Error -"),
        (changed("files", 0, "ranges", "sizes", to=[4, 6]), "is damaged"),
        (changed("files", 0, "ranges", "sizes", to=int64((1 << 63) - 1, 1)), "is damaged"),
    ],
)
def test_error_has_the_reason_when_the_manifest_is_unusable(tmp_path: Path, content: str, expected: str) -> None:
    final = tmp_path / "epoch-0001"
    save(final, manifest())
    (final / MANIFEST).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(final)
    assert str(caught.value).startswith(f"{final / MANIFEST}: ")
    assert expected in str(caught.value)


def test_manifest_is_read_when_version_2_is_indented_otherwise(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(dict(reversed(json.loads(canonical(2)).items())), indent=4))
    found = read_manifest(tmp_path)
    ranges = [Ranges.of([Range(0, file.size_bytes, 0, "aa" * 16)]) for file in manifest().files]
    assert [file.ranges for file in found.files] == ranges
    assert dataclasses.replace(found, files=manifest().files) == manifest()


def test_manifest_is_json_of_one_line_a_key_when_written() -> None:
    text = manifest_text(manifest())
    record = json.loads(text)
    assert len(text.splitlines()) == len(record) + 2
    assert list(record)[:2] == ["format", "version"] and list(record)[-2:] == ["files", "checksum"]
    assert {file["name"] for file in record["files"]} == {file.name for file in manifest().files}
    assert {key: type(value) for key, value in record["files"][0]["ranges"].items()} == dict.fromkeys(
        ("sizes", "ranks", "digests"), str
    )


def test_error_has_the_path_when_the_manifest_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / MANIFEST).mkdir()
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / MANIFEST)  # to open it would wait for a writer
    for name in "ab":
        with pytest.raises(CheckpointError, match=f"{tmp_path / name / MANIFEST}: is damaged: is not a file"):
            read_manifest(tmp_path / name)


def test_nothing_is_committed_when_a_metric_is_not_finite(tmp_path: Path) -> None:
    temporary = begin(tmp_path / "epoch-0001")
    with pytest.raises(CheckpointError, match="its manifest cannot be written"):
        commit(temporary, tmp_path / "epoch-0001", dataclasses.replace(manifest(), metrics={"loss": math.nan}))
    assert list_checkpoints(tmp_path) == []


def test_good_and_bad_are_listed_when_some_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / f"epoch-{step:04d}", manifest(step))
    (tmp_path / "epoch-0002" / MANIFEST).write_text(TEXT[:100])
    (tmp_path / "epoch-0003" / MANIFEST).write_text(changed("version", to=VERSION + 1))
    (tmp_path / "epoch-0000").mkdir()  # without a manifest it is no checkpoint, and no bad one
    found = scan_checkpoints(tmp_path)
    assert [name for name, _ in found.good] == ["epoch-0001", "epoch-0004"]
    assert found.good == list_checkpoints(tmp_path)
    (truncated, first), (newer, second) = found.bad
    assert (truncated, newer) == ("epoch-0002", "epoch-0003")
    assert str(tmp_path / "epoch-0002" / MANIFEST) in first
    assert f"has format version {VERSION + 1}" in second


def test_error_has_the_path_when_the_directory_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'checkpoints'}: cannot be read: Not a directory"):
        scan_checkpoints(tmp_path / "checkpoints")
