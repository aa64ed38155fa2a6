from __future__ import annotations

import random
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.digest import LEAF_BYTES, digest_of
from harness.checkpoint.format.partial_digests import LeafRange, Span, are_complete, combine, require_digest
from harness.checkpoint.format.ranges import Range, Ranges
from harness.checkpoint.format.tensor_shard import DTYPES
from harness.checkpoint.restore.read import CHUNK_BYTES, ReadRequest, ReadResult, digest_leaves, read, unique_bytes
from harness.errors import CheckpointError, DamagedError


def record_of(name: str, content: bytes, cuts: list[int]) -> FileRecord:
    bounds = sorted({0, *cuts, len(content)})
    ranges = [
        Range(start, end, number, digest_of(content[start:end])) for number, (start, end) in enumerate(pairwise(bounds))
    ]
    return FileRecord(name, len(content), Ranges.of(ranges))


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
        wants.append(ReadRequest(start, stored, target))
        expected.append(values[:count].to(target.dtype))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(content)
        found = read(path, record, wants)
        for want, values in zip(wants, expected, strict=True):
            assert torch.equal(want.target, values)
        wanted = {byte for want in wants for byte in range(want.start, want.end)}
        assert unique_bytes(wants) == len(wanted) <= found.read_bytes
        if (
            len({want.dtype for want in wants})
            == len({want.start % DTYPES[want.dtype].itemsize for want in wants})
            == 1
        ):
            assert found.read_bytes == len(wanted)  # once, whoever wants it
        for number, part in enumerate(record.ranges):
            # What is wanted whole, and by one want, is known.
            is_one = any(want.start <= part.start and part.end <= want.end for want in wants)
            assert (number in found.spans) >= is_one
            assert wanted.issuperset(range(part.start, part.end)) >= (number in found.spans)
        finish(path, record, [found.spans])


def finish(path: Path, record: FileRecord, known: list[dict[int, list[Span]]]) -> int:
    """Check all digests, with what several ranks have read; the number of bytes that it takes more."""
    # What a rank has read whole it has checked by itself.
    each_whole = [are_complete(record, spans) for spans in known]
    unsure = [number for number in range(len(record.ranges)) if not any(whole[number] for whole in each_whole)]
    digests, lacking = combine(record, unsure, known)
    assert digests.keys() == set(unsure)
    read_bytes, rest = digest_leaves(path, record, lacking)
    for leaves, digest in zip(lacking, rest, strict=True):
        digests[leaves.range] ^= digest
    for number, digest in digests.items():
        require_digest(path, record.ranges[number], digest)
    return read_bytes


CONTENT = random.Random(1).randbytes(20 * LEAF_BYTES + 777)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_digests_are_put_together_when_each_rank_wants_a_part(data: st.DataObject) -> None:
    borders = st.one_of(
        st.integers(0, len(CONTENT)),
        st.integers(0, 20).map(lambda leaf: leaf * LEAF_BYTES),
        st.integers(1, 20).map(lambda leaf: leaf * LEAF_BYTES - 1),
    )
    record = record_of("file", CONTENT, data.draw(st.lists(borders, max_size=2)))
    cuts = sorted({0, *data.draw(st.lists(borders, max_size=4)), len(CONTENT)})
    pieces = list(pairwise(cuts))
    # Some pieces are wanted by nobody, some twice, some by several ranks, some overlap.
    ranks = [data.draw(st.lists(st.sampled_from(pieces), max_size=4)) for _ in range(data.draw(st.integers(1, 3)))]
    if data.draw(st.booleans()):
        first, last = sorted((data.draw(borders), data.draw(borders)))
        ranks[0].append((first, last))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(CONTENT)
        known = []
        for wanted in ranks:
            wants = [ReadRequest(first, "U8", torch.empty(last - first, dtype=torch.uint8)) for first, last in wanted]
            known.append(read(path, record, wants).spans)
        more_bytes = finish(path, record, known)
        if len(ranks) == 1 and sorted(set(ranks[0])) == pieces:
            assert more_bytes == 0
        # A byte that was flipped is found, whoever has read it.
        flipped = bytearray(CONTENT)
        byte = data.draw(st.integers(0, len(CONTENT) - 1))
        flipped[byte] ^= 1
        path.write_bytes(flipped)
        (hit,) = [part for part in record.ranges if part.start <= byte < part.end]
        with pytest.raises(DamagedError, match=f"bytes {hit.start} to {hit.end}, written by rank {hit.rank}"):
            finish(path, record, [])
        with pytest.raises(DamagedError, match=f"bytes {hit.start} to {hit.end}, written by rank {hit.rank}"):
            known = []
            for wanted in ranks:
                wants = [
                    ReadRequest(first, "U8", torch.empty(last - first, dtype=torch.uint8)) for first, last in wanted
                ]
                known.append(read(path, record, wants).spans)
            finish(path, record, known)


def test_only_leaves_at_borders_are_read_again_when_three_ranks_read_what_two_have_written(tmp_path: Path) -> None:
    size = len(CONTENT)
    record = record_of("file", CONTENT, [size // 2])
    (tmp_path / "file").write_bytes(CONTENT)
    known = []
    for rank in range(3):
        first, last = size * rank // 3, size * (rank + 1) // 3
        request = ReadRequest(first, "U8", torch.empty(last - first, dtype=torch.uint8))
        found = read(tmp_path / "file", record, [request])
        assert found.read_bytes == last - first
        known.append(found.spans)
    _, lacking = combine(record, range(2), known)
    first_leaf = size // 3 // LEAF_BYTES
    assert lacking[0] == LeafRange(0, first_leaf, first_leaf + 1)
    assert [leaves.end - leaves.first for leaves in lacking] == [1, 1]
    assert finish(tmp_path / "file", record, known) <= 2 * LEAF_BYTES


def test_all_digests_are_checked_when_everything_is_wanted_in_parts(tmp_path: Path) -> None:
    content = bytes(range(256)) * 200
    record = record_of("file", content, [1, 700, 701, 30_000])
    (tmp_path / "file").write_bytes(content)
    bounds = [0, 5, 699, 20_000, 20_001, len(content)]
    wants = [ReadRequest(start, "U8", torch.empty(end - start, dtype=torch.uint8)) for start, end in pairwise(bounds)]
    found = read(tmp_path / "file", record, wants[::-1])
    assert found.read_bytes == len(content)
    assert all(are_complete(record, found.spans))


@pytest.mark.parametrize("byte", [0, 500, 999])
def test_error_has_the_range_when_a_byte_of_it_is_another(tmp_path: Path, byte: int) -> None:
    content = bytearray(1000)
    record = record_of("file", bytes(content), [100, 900])
    content[byte] ^= 1
    (tmp_path / "file").write_bytes(content)
    (hit,) = [part for part in record.ranges if part.start <= byte < part.end]
    said = f"file: bytes {hit.start} to {hit.end}, written by rank {hit.rank}, are not what was written"
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "file", record, [ReadRequest(0, "U8", torch.empty(1000, dtype=torch.uint8))])
    with pytest.raises(CheckpointError, match=said):
        finish(tmp_path / "file", record, [])
    # A part of a leaf tells nothing of it.
    part = ReadRequest(hit.start, "U8", torch.empty(hit.end - hit.start - 1, dtype=torch.uint8))
    assert read(tmp_path / "file", record, [part]) == ReadResult(hit.end - hit.start - 1, {})


def test_memory_is_bounded_when_types_differ_and_a_tensor_is_large(tmp_path: Path) -> None:
    values = torch.arange(CHUNK_BYTES // 2 + 77, dtype=torch.float32)
    content = values.numpy().tobytes()
    (tmp_path / "file").write_bytes(content)
    target = torch.empty(len(values), dtype=torch.float64)
    record = record_of("file", content, [12_345])
    found = read(tmp_path / "file", record, [ReadRequest(0, "F32", target)])
    assert torch.equal(target, values.double())
    assert found.read_bytes == len(content)
    assert all(are_complete(record, found.spans))


def test_error_has_the_byte_when_the_file_is_cut_off(tmp_path: Path) -> None:
    record = record_of("file", bytes(100), [])
    (tmp_path / "file").write_bytes(bytes(60))
    want = ReadRequest(0, "U8", torch.empty(100, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="file: ends at byte 60; use another checkpoint"):
        read(tmp_path / "file", record, [want])
    with pytest.raises(CheckpointError, match="missing: No such file or directory"):
        read(tmp_path / "missing", record, [want])
