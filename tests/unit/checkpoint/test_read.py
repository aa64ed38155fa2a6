from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.commit import FileRecord, Range
from harness.checkpoint.read import CHUNK_BYTES, Reading, Want, check_ranges, read
from harness.checkpoint.shards.source import DTYPES
from harness.errors import CheckpointError


def record_of(name: str, content: bytes, cuts: list[int]) -> FileRecord:
    bounds = sorted({0, *cuts, len(content)})
    ranges = [
        Range(start, end, number, xxhash.xxh3_128_hexdigest(content[start:end]))
        for number, (start, end) in enumerate(pairwise(bounds))
    ]
    return FileRecord(name, len(content), tuple(ranges))


@settings(deadline=None)
@given(st.data())
def test_targets_are_what_is_stored_when_read(data: st.DataObject) -> None:
    content = data.draw(st.binary(min_size=1, max_size=400))
    places = st.integers(0, len(content))
    record = record_of("file", content, data.draw(st.lists(places, max_size=5)))
    wants, expected = [], []
    for _ in range(data.draw(st.integers(0, 5))):
        stored = data.draw(st.sampled_from(["U8", "I16", "I32"]))
        item = DTYPES[stored].itemsize
        start = data.draw(places)
        count = data.draw(st.integers(0, (len(content) - start) // item))
        values = torch.frombuffer(bytearray(content[start : start + count * item] + b"\0" * item), dtype=DTYPES[stored])
        target = torch.full((count,), -1, dtype=data.draw(st.sampled_from([DTYPES[stored], torch.float64])))
        wants.append(Want(start, stored, target))
        expected.append(values[:count].to(target.dtype))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(content)
        found = read(path, record, wants)
        for want, values in zip(wants, expected, strict=True):
            assert torch.equal(want.target, values)
        assert found.read_bytes == sum(want.end - want.start for want in wants)
        wanted = {byte for want in wants for byte in range(want.start, want.end)}
        for number, part in enumerate(record.ranges):
            # What is wanted in part only is not checked; what is wanted whole and once is.
            if not wanted.issuperset(range(part.start, part.end)):
                assert number in found.unchecked
        left = check_ranges(path, record, found.unchecked)
        assert left == sum(record.ranges[number].end - record.ranges[number].start for number in found.unchecked)


def test_all_digests_are_checked_when_everything_is_wanted_in_parts(tmp_path: Path) -> None:
    content = bytes(range(256)) * 200
    record = record_of("file", content, [1, 700, 701, 30_000])
    (tmp_path / "file").write_bytes(content)
    bounds = [0, 5, 699, 20_000, 20_001, len(content)]
    wants = [Want(start, "U8", torch.empty(end - start, dtype=torch.uint8)) for start, end in pairwise(bounds)]
    assert read(tmp_path / "file", record, wants[::-1]) == Reading(len(content), [])


@pytest.mark.parametrize("byte", [0, 500, 999])
def test_error_has_the_range_when_a_byte_of_it_is_another(tmp_path: Path, byte: int) -> None:
    content = bytearray(1000)
    record = record_of("file", bytes(content), [100, 900])
    content[byte] ^= 1
    (tmp_path / "file").write_bytes(content)
    (hit,) = [part for part in record.ranges if part.start <= byte < part.end]
    said = f"file: bytes {hit.start} to {hit.end}, written by rank {hit.rank}, are not what was written"
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "file", record, [Want(0, "U8", torch.empty(1000, dtype=torch.uint8))])
    with pytest.raises(CheckpointError, match=said):
        check_ranges(tmp_path / "file", record, [0, 1, 2])
    # A part of a range tells nothing of the range.
    part = Want(hit.start, "U8", torch.empty(hit.end - hit.start - 1, dtype=torch.uint8))
    assert read(tmp_path / "file", record, [part]).unchecked == [0, 1, 2]


def test_memory_is_bounded_when_types_differ_and_a_tensor_is_large(tmp_path: Path) -> None:
    values = torch.arange(CHUNK_BYTES // 2 + 77, dtype=torch.float32)
    content = values.numpy().tobytes()
    (tmp_path / "file").write_bytes(content)
    target = torch.empty(len(values), dtype=torch.float64)
    found = read(tmp_path / "file", record_of("file", content, [12_345]), [Want(0, "F32", target)])
    assert torch.equal(target, values.double())
    assert found == Reading(len(content), [])


def test_error_has_the_byte_when_the_file_is_cut_off(tmp_path: Path) -> None:
    record = record_of("file", bytes(100), [])
    (tmp_path / "file").write_bytes(bytes(60))
    want = Want(0, "U8", torch.empty(100, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="file: ends at byte 60; use another checkpoint"):
        read(tmp_path / "file", record, [want])
    with pytest.raises(CheckpointError, match="missing: No such file or directory"):
        read(tmp_path / "missing", record, [want])
