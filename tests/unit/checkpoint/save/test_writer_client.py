from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness.checkpoint.format.all_ranges import AllRanges, pack_ranges
from harness.checkpoint.format.commit import Manifest, commit
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.checkpoint.format.verify import verify
from harness.checkpoint.save.plan import MAX_RANGE_BYTES, Plan, plan_of
from harness.checkpoint.save.snapshot import StagingMemory
from harness.checkpoint.save.writer import OutputFile, RangeWriter, make_files
from harness.checkpoint.save.writer_client import WriterProcess, output_files, write_json
from harness.checkpoint.sharding.shard_catalog import ShardCatalog
from harness.errors import CheckpointError


def plan_for(sizes: dict[str, int], limit: int | None = None) -> Plan:
    specs = [TensorSpec("model", name, "U8", (size,)) for name, size in sizes.items()]
    return plan_of(
        specs,
        {},
        [ShardCatalog.of(0, [(ElementRange(0, 0, size),) if size else () for size in sizes.values()])],
        0,
        limit,
    )


@pytest.fixture
def staging() -> Iterator[Callable[[Plan], StagingMemory]]:
    made: list[StagingMemory] = []

    def make(plan: Plan) -> StagingMemory:
        memory = StagingMemory(plan.staging_bytes, pinned=False)
        memory.bytes.random_(256, generator=torch.Generator().manual_seed(0))
        made.append(memory)
        return memory

    yield make
    for memory in made:
        memory.close()


@pytest.fixture
def start(staging: Callable[[Plan], StagingMemory]) -> Iterator[Callable[[Plan], tuple[WriterProcess, StagingMemory]]]:
    started: list[WriterProcess] = []

    def make(plan: Plan) -> tuple[WriterProcess, StagingMemory]:
        memory = staging(plan)
        started.append(WriterProcess(memory, plan.layout, plan.ranges, makes_files=True))
        started[-1].start()
        return started[-1], memory

    yield make
    for writer in started:
        writer.close()


Start = Callable[[Plan], tuple[WriterProcess, StagingMemory]]


def expected_digests(plan: Plan, memory: StagingMemory) -> bytes:
    data = memory.bytes.numpy().tobytes()
    return b"".join(bytes.fromhex(digest_of(data[p.staging : p.staging + p.size])) for p in plan.ranges)


def expected_data(plan: Plan, memory: StagingMemory, file: int) -> bytes:
    data = memory.bytes.numpy().tobytes()
    content = bytearray(plan.layout.files[file].header.ljust(plan.layout.files[file].size_bytes, b"\0"))
    for part in plan.ranges:
        if part.file == file:
            content[part.offset : part.offset + part.size] = data[part.staging : part.staging + part.size]
    return bytes(content)


def children() -> set[int]:
    """Processes that this one has started and that are not yet gone."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def test_files_are_the_memory_and_digests_are_theirs_when_written(tmp_path: Path, start: Start) -> None:
    plan = plan_for({"a": 70_000, "b": 3, "empty": 0, "c": 5_000_000}, limit=100_000)
    writer, memory = start(plan)
    for name in ("first", "second"):  # the same process for each save
        memory.bytes[:100] += 1
        writer.request(tmp_path / name)
        digests, seconds = writer.await_digests()
        assert digests == expected_digests(plan, memory)
        assert set(seconds) == {"write_s", "sync_s"}
        for index, file in enumerate(plan.layout.files):
            assert (tmp_path / name / file.name).read_bytes() == expected_data(plan, memory, index)


def test_nothing_is_written_when_digests_alone_are_asked_for(tmp_path: Path, start: Start) -> None:
    plan = plan_for({"a": 100})
    writer, memory = start(plan)
    writer.request(None)
    assert writer.await_digests()[0] == expected_digests(plan, memory)
    assert list(tmp_path.iterdir()) == []


def test_records_stand_up_to_verification_when_made_of_the_answers(tmp_path: Path, start: Start) -> None:
    plan = plan_for({"a": 1000, "b": 7}, limit=500)
    writer, _ = start(plan)
    writer.request(tmp_path)
    written = AllRanges(plan.layout, [pack_ranges(plan.staging_bytes, plan.ranges)])
    records = [*written.records([writer.await_digests()[0]]), write_json(tmp_path / "x.json", {"a": [1]})]
    commit(tmp_path, tmp_path.with_name("final"), Manifest("", 0, 0, 0, {}, tuple(records), {}, {}))
    assert verify(tmp_path.with_name("final")).problems == ()


def test_error_has_the_file_when_the_disk_is_full(tmp_path: Path, start: Start) -> None:
    plan = plan_for({"a": 1000})
    writer, memory = start(plan)
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    writer.request(tmp_path)
    with pytest.raises(CheckpointError, match="No space left on device; free space there or use another run_dir"):
        writer.await_digests()
    (tmp_path / "model.safetensors").unlink()
    writer.request(tmp_path)  # the process serves on
    assert writer.await_digests()[0] == expected_digests(plan, memory)


def test_error_is_told_when_a_file_may_not_grow(tmp_path: Path, staging: Callable[[Plan], StagingMemory]) -> None:
    plan = plan_for({"a": 100_000})
    memory = staging(plan)
    writer = WriterProcess(memory, plan.layout, plan.ranges, makes_files=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        writer.start()  # it inherits the limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.request(tmp_path)
    with pytest.raises(CheckpointError, match="File too large"):
        writer.await_digests()
    writer.close()


def test_error_has_the_directory_when_it_cannot_be_made(tmp_path: Path, start: Start) -> None:
    (tmp_path / "file").touch()
    writer, _ = start(plan_for({"a": 10}))
    writer.request(tmp_path / "file" / "missing")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file/missing: Not a directory"):
        writer.await_digests()


def test_ranges_are_written_as_the_copy_goes_on_when_it_takes_long(tmp_path: Path, start: Start) -> None:
    plan = plan_for({"a": 3 * MAX_RANGE_BYTES})
    writer, memory = start(plan)
    expected = expected_digests(plan, memory)
    begin = len(plan.layout.files[0].header)
    whole = memory.bytes.clone()
    rest = memory.bytes[MAX_RANGE_BYTES:]
    rest.zero_()
    writer.request(tmp_path, 0)
    writer.report_ready(MAX_RANGE_BYTES)
    # What is ready is written before the rest is there.
    while first_bytes(tmp_path / "model.safetensors", MAX_RANGE_BYTES)[begin:] != bytes(
        whole[begin:MAX_RANGE_BYTES].numpy()
    ):
        time.sleep(0.01)
    memory.bytes.copy_(whole)
    writer.report_ready(memory.size_bytes)
    assert writer.await_digests(60)[0] == expected
    assert (tmp_path / "model.safetensors").read_bytes() == expected_data(plan, memory, 0)


def first_bytes(path: Path, count: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as stream:
        return stream.read(count)


def test_next_request_is_answered_when_the_copy_of_the_one_before_has_failed(tmp_path: Path, start: Start) -> None:
    plan = plan_for({"a": 1000})
    writer, memory = start(plan)
    writer.request(tmp_path / "first", 0)
    writer.report_ready(None)
    with pytest.raises(CheckpointError, match="the copy into host memory has failed"):
        writer.await_digests(60)
    writer.request(tmp_path / "third")
    assert writer.await_digests(60)[0] == expected_digests(plan, memory)
    writer.report_ready(None)  # too late to matter
    writer.request(tmp_path / "fourth")
    assert writer.await_digests(60)[0] == expected_digests(plan, memory)


def test_copy_does_not_wait_for_the_writer_when_it_is_far_behind(tmp_path: Path, start: Start) -> None:
    before = children()
    plan = plan_for({"a": 100_000})
    writer, memory = start(plan)
    writer.request(None)
    writer.await_digests(60)
    (pid,) = children() - before
    os.kill(pid, signal.SIGSTOP)
    writer.request(tmp_path, 0)
    for num_bytes in range(1, memory.size_bytes + 1):  # more lines than a pipe holds
        writer.report_ready(num_bytes)
    os.kill(pid, signal.SIGCONT)
    assert writer.await_digests(60)[0] == expected_digests(plan, memory)


def test_process_is_started_again_when_it_was_killed(tmp_path: Path, start: Start) -> None:
    before = children()
    plan = plan_for({"a": 100})
    writer, memory = start(plan)
    (pid,) = children() - before
    writer.request(None)
    assert writer.await_digests()[0] == expected_digests(plan, memory)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="the writer process ended with code -9"):
        writer.await_digests()
    writer.request(None)
    assert writer.await_digests()[0] == expected_digests(plan, memory)
    assert children() - before - {pid}


def test_error_is_told_when_the_process_is_killed_in_the_middle_of_a_save(tmp_path: Path, start: Start) -> None:
    before = children()
    writer, memory = start(plan := plan_for({"a": 1000}))
    (pid,) = children() - before
    os.mkfifo(tmp_path / "model.safetensors")  # to open it waits for a reader: there the process is
    writer.request(tmp_path)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="the writer process ended with code -9 in the middle of a save"):
        writer.await_digests()
    (tmp_path / "model.safetensors").unlink()
    writer.request(tmp_path)
    assert writer.await_digests()[0] == expected_digests(plan, memory)


def test_answer_is_of_the_last_request_when_the_one_before_was_not_awaited(tmp_path: Path, start: Start) -> None:
    # As after a save that failed between the two: a rank that did not send its part, say.
    plan = plan_for({"a": 1000})
    writer, memory = start(plan)
    writer.request(tmp_path / "missing", 0)
    writer.cancel()
    writer.cancel()  # no request is in flight
    writer.request(tmp_path)
    assert writer.await_digests()[0] == expected_digests(plan, memory)
    assert (tmp_path / "model.safetensors").read_bytes() == expected_data(plan, memory, 0)


def test_process_is_gone_when_closed(start: Start) -> None:
    before = children()
    writer, _ = start(plan_for({"a": 10}))
    assert children() - before
    writer.close()
    assert children() - before == set()
    writer.close()


def test_closing_is_quiet_when_the_process_took_no_more_requests(
    tmp_path: Path, staging: Callable[[Plan], StagingMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when it dies between two saves, just when it is asked: its end of the pipe is closed.
    reached, leave, deaf = (tmp_path / name for name in ("reached", "leave", "deaf"))
    os.mkfifo(reached)
    os.mkfifo(leave)
    deaf.write_text(f"#!/bin/sh\nread plan\nexec 0<&-\n: > {reached}\n: < {leave}\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(deaf))
    plan = plan_for({"a": 10})
    writer = WriterProcess(staging(plan), plan.layout, plan.ranges, makes_files=True)
    writer.start()
    reached.read_bytes()
    with pytest.raises(CheckpointError, match="the writer process has died"):
        writer.request(tmp_path)
    leave.write_bytes(b"")
    writer.close()


def test_process_runs_at_low_priority_when_started(start: Start) -> None:
    before = children()
    writer, _ = start(plan_for({"a": 10}))
    writer.request(None)
    writer.await_digests()
    (pid,) = children() - before
    assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)


def test_ranges_are_written_alike_when_there_is_no_process(tmp_path: Path) -> None:
    memory = bytes(range(256)) * 400_000  # more than is flushed at once
    ranges = [(0, 3, 0, 50_000_000), (0, 50_000_003, 50_000_000, 100), (1, 0, 60_000_000, 7)]
    files = [OutputFile("a", 50_000_103, None), OutputFile("b", 7, None)]
    answer = RangeWriter(memoryview(memory), files, ranges).write(tmp_path, iter([50_000_000, 60_000_007]))
    assert (tmp_path / "a").read_bytes() == b"\0\0\0" + memory[:50_000_100]
    assert (tmp_path / "b").read_bytes() == memory[60_000_000:60_000_007]
    assert answer["digests"] == "".join(digest_of(memory[s : s + n]) for _, _, s, n in ranges)


def test_files_have_headers_and_their_length_when_made(tmp_path: Path) -> None:
    plan = plan_for({"a": 100, "b": 50}, limit=100)
    make_files(tmp_path, output_files(plan.layout, with_headers=True))
    for file in plan.layout.files:
        assert (tmp_path / file.name).read_bytes() == file.header.ljust(file.size_bytes, b"\0")


def test_error_is_of_the_system_when_files_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_files(tmp_path / "file" / "missing", output_files(plan_for({"a": 1}).layout, with_headers=True))
