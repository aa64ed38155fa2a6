from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.format.all_ranges import MANY, AllRanges, packed
from harness.checkpoint.format.commit import MANIFEST, FileRecord, Manifest, commit, manifest_text, read_manifest
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.ranges import Range, Ranges, number_at
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.checkpoint.format.verify import verify
from harness.checkpoint.restore.read import Want, read
from harness.checkpoint.save.plan import plan_of
from harness.checkpoint.sharding.shard_catalog import ShardCatalog
from harness.errors import DamagedError


def ranges_of(sizes: list[int], seed: int = 0) -> Ranges:
    random = np.random.default_rng(seed)
    bounds = np.cumsum([0, *sizes])
    ranks = random.integers(0, 9, len(sizes), dtype=np.int32)
    return Ranges(bounds, ranks, random.integers(0, 256, (len(sizes), 16), dtype=np.uint8))


@given(st.lists(st.integers(0, 1 << 40), max_size=20))
def test_ranges_are_the_same_when_packed_and_unpacked(sizes: list[int]) -> None:
    ranges = ranges_of(sizes)
    record = json.loads(json.dumps(ranges.packed()))
    found = Ranges.unpacked(record, sum(sizes))
    listed = tuple(ranges)
    assert found == ranges == listed and tuple(found) == listed == tuple(found[number] for number in range(len(found)))
    assert [part.end - part.start for part in found] == sizes
    for byte in range(0, sum(sizes), max(1, sum(sizes) // 7)):
        assert number_at(ranges, byte) == number_at(listed, byte)
        assert listed[number_at(ranges, byte)].start <= byte


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num", -1, "no whole number"),
        ("num", True, "no whole number"),
        ("num", 4, "48 bytes of digests for 4 ranges"),
        ("digests", text(b"x"), "1 bytes of digests"),
        ("digests", 3, "are no text"),
        ("digests", "~", "base64|padding|Incorrect"),
        ("sizes", text(b"xyz"), "cannot be unpacked"),
        ("sizes", text(zlib.compress(bytes(24))), "its ranges end at 0, the file at 60"),
        ("sizes", text(zlib.compress(bytes(1 << 20))), "sizes of its ranges are not 24 bytes"),
        ("sizes", text(zlib.compress(np.array([-1, 31, 30], "<i8").tobytes())), "is negative"),
        ("sizes", text(zlib.compress(np.array([1 << 62, 1 << 62, -60], "<i8").tobytes())), "is negative"),
        ("ranks", text(zlib.compress(np.array([0, 1, -1], "<i4").tobytes())), "its rank is negative"),
        ("ranks", text(zlib.compress(bytes(12))[:-4]), "ranks of its ranges are not 12 bytes"),
        ("more", 1, "ranges is no list, and not num"),
    ],
)
def test_error_has_the_reason_when_packed_ranges_are_damaged(key: str, value: Any, said: str) -> None:
    record = {**ranges_of([10, 20, 30]).packed(), key: value}
    with pytest.raises(ValueError, match=said):
        Ranges.unpacked(record, 60)


def test_checkpoint_is_read_and_verified_when_a_file_has_very_many_ranges(tmp_path: Path) -> None:
    """Two ranks hold every other element; what a thousand would write."""
    num = MANY + 3
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
    told = [packed(plan.staging_bytes, plan.ranges) for plan in plans]
    (record,) = AllRanges.of(plans[0].layout, told).records(digests)
    assert isinstance(record.ranges, Ranges) and len(record.ranges) == num + 1
    temporary, final = tmp_path / "temporary", tmp_path / "final"
    temporary.mkdir()
    (temporary / record.name).write_bytes(content)
    commit(temporary, final, Manifest("key", 0, 0, 0, {}, (record,), {}, {}))

    assert json.loads((final / MANIFEST).read_text())["files"][0]["ranges"]["num"] == num + 1
    manifest = read_manifest(final)
    assert manifest.files == (record,)
    assert verify(final).problems == ()
    target = torch.empty(1000)
    begin = len(plans[0].layout.files[0].header)
    found = read(final / record.name, manifest.files[0], [Want(begin + 400, "F32", target)])
    assert torch.equal(target, values[100:1100]) and list(found.spans) == list(range(101, 1101))

    damaged = bytearray(content)
    damaged[begin + 4 * 700] ^= 1
    (final / record.name).write_bytes(damaged)
    with pytest.raises(DamagedError, match="written by rank 0, are not what was written"):
        read(final / record.name, manifest.files[0], [Want(begin + 400, "F32", target)])
    assert len(verify(final).problems) == 1


def test_ranges_are_a_list_for_people_when_there_are_few() -> None:
    few = FileRecord("model.safetensors", 4, (Range(0, 4, 0, "dd"),))
    record = json.loads(manifest_text(Manifest("key", 0, 0, 0, {}, (few,), {}, {})))
    assert record["files"][0]["ranges"] == [[0, 4, 0, "dd"]]
