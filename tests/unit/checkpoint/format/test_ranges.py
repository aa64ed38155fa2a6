from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.format.all_ranges import AllRanges, pack_ranges
from harness.checkpoint.format.commit import Manifest, commit, read_manifest
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.ranges import Ranges
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.checkpoint.format.verify import verify
from harness.checkpoint.restore.read import ReadRequest, read
from harness.checkpoint.save.plan import plan_of
from harness.checkpoint.sharding.shard_catalog import ShardCatalog
from harness.errors import DamagedError


def ranges_of(sizes: list[int]) -> Ranges:
    random = np.random.default_rng(0)
    return Ranges(sizes, random.integers(0, 9, len(sizes)).tolist(), random.bytes(16 * len(sizes)))


@given(st.lists(st.integers(0, 1 << 40), max_size=20))
def test_ranges_are_the_same_when_written_and_read_in_any_form(sizes: list[int]) -> None:
    ranges = ranges_of(sizes)
    listed = tuple(ranges)
    assert listed == tuple(ranges[index] for index in range(len(ranges))) == ranges[:]
    assert [part.end - part.start for part in listed] == sizes and ranges.size_bytes == sum(sizes)
    assert [part.start for part in listed[1:]] == [part.end for part in listed[:-1]]
    assert ranges == Ranges.of(listed) == Ranges.from_json(json.loads(json.dumps(ranges.to_json())))
    assert ranges == Ranges.from_version_2([list(part) for part in listed])
    assert ranges == Ranges.from_version_2({"num": len(ranges), **ranges.to_json()})
    for byte in range(0, sum(sizes), max(1, sum(sizes) // 7)):
        index = ranges.index_at(byte)
        assert listed[index].start <= byte and not any(part.start <= byte for part in listed[index + 1 :])


def test_columns_are_little_endian_when_written() -> None:
    """Version 2 wrote the same columns where there were many ranges, so version 3 reads these too."""
    written = Ranges([4, 6], [0, 1], b"a" * 16 + b"b" * 16).to_json()
    assert zlib.decompress(base64.b64decode(written["sizes"])) == struct.pack("<2q", 4, 6)
    assert zlib.decompress(base64.b64decode(written["ranks"])) == struct.pack("<2i", 0, 1)
    assert base64.b64decode(written["digests"]) == b"a" * 16 + b"b" * 16


def test_ranges_differ_when_any_column_does() -> None:
    ranges = Ranges([1, 2], [0, 1], bytes(32))
    others = Ranges([2, 1], [0, 1], bytes(32)), Ranges([1, 2], [0, 0], bytes(32)), Ranges([1, 2], [0, 1], b"1" * 32)
    assert ranges not in others and hash(ranges) == hash(Ranges([1, 2], [0, 1], bytes(32)))
    assert (ranges[-1], list(Ranges())) == (ranges[1], [])
    with pytest.raises(IndexError):
        ranges[2]


@pytest.mark.parametrize(
    ("sizes", "ranks", "digests", "message"),
    [
        ([1], [0, 1], 32, "1 sizes, 2 ranks and 32 bytes of digests do not match"),
        ([1, 2], [0, 1], 31, "2 sizes, 2 ranks and 31 bytes of digests do not match"),
        ([-1, 2], [0, 1], 32, "a size or a rank is negative"),
        ([1, 2], [0, -1], 32, "a size or a rank is negative"),
    ],
)
def test_error_has_the_reason_when_columns_do_not_fit(
    sizes: list[int], ranks: list[int], digests: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Ranges(sizes, ranks, bytes(digests))


def test_error_is_raised_when_sizes_exceed_64_bits() -> None:
    with pytest.raises(OverflowError):
        Ranges([1 << 62, 1 << 62], [0, 0], bytes(32))


def test_checkpoint_is_verified_when_a_file_has_4100_ranges(tmp_path: Path) -> None:
    """Two ranks hold every other element, so there are as many ranges as a thousand ranks write."""
    num = 4099
    specs = [TensorSpec("model", "w", "F32", (num,))]
    held = [tuple(ElementRange(at, at // 2, 1) for at in range(rank, num, 2)) for rank in range(2)]
    holdings = [ShardCatalog.of(0, [runs]) for runs in held]
    plans = [plan_of(specs, {}, holdings, rank, None) for rank in range(2)]
    values = torch.arange(num, dtype=torch.float32)
    content = plans[0].layout.files[0].header + values.numpy().tobytes()
    digests = [
        b"".join(bytes.fromhex(digest_of(content[part.offset : part.offset + part.size])) for part in plan.ranges)
        for plan in plans
    ]
    told = [pack_ranges(plan.staging_bytes, plan.ranges) for plan in plans]
    (record,) = AllRanges(plans[0].layout, told).records(digests)
    assert len(record.ranges) == num + 1
    temporary, final = tmp_path / "temporary", tmp_path / "final"
    temporary.mkdir()
    (temporary / record.name).write_bytes(content)
    commit(temporary, final, Manifest("key", 0, 0, 0, {}, (record,), {}, {}))

    manifest = read_manifest(final)
    assert manifest.files == (record,)
    assert verify(final).problems == ()
    target = torch.empty(1000)
    begin = len(plans[0].layout.files[0].header)
    found = read(final / record.name, manifest.files[0], [ReadRequest(begin + 400, "F32", target)])
    assert torch.equal(target, values[100:1100]) and list(found.spans) == list(range(101, 1101))

    damaged = bytearray(content)
    damaged[begin + 4 * 700] ^= 1
    (final / record.name).write_bytes(damaged)
    with pytest.raises(DamagedError, match="written by rank 0, are not what was written"):
        read(final / record.name, manifest.files[0], [ReadRequest(begin + 400, "F32", target)])
    assert len(verify(final).problems) == 1
