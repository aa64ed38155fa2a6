"""The lane of files: what it reads of the journal to find those few entries that are its own."""

from __future__ import annotations

from pathlib import Path

from harness.tracking.journal.delivery_state import DeliveryState, read_delivered
from harness.tracking.journal.entries import read_entries
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.publisher.artifact_worker import ArtifactWorker
from harness.tracking.publisher.progress import Heartbeat
from harness.tracking.publisher.retries import Clock, RetryPolicy
from tests.unit.tracking.test_publisher import SETTINGS, FakeTrainer, FaultyStore

NUM_BATCHES = 20
NUM_ROWS_PER_BATCH = 500


def num_bytes_read() -> int:
    """Bytes that this process has read until now, by the kernel's count."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_backlog_is_read_once_when_it_is_passed_in_batches(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path / "outbox")
    for step in range(NUM_BATCHES * NUM_ROWS_PER_BATCH):
        outbox.append("metrics", {"step": step, "values": {"train/loss": step / 7}})
    outbox.append("text", {"name": "last.txt", "content": "words"})
    ends = [entry.end_offset for entry in read_entries(tmp_path / "outbox")]
    state = DeliveryState(tmp_path / "outbox")
    store = FaultyStore()
    retries = RetryPolicy(store, FakeTrainer(), Heartbeat(tmp_path / "outbox"), Clock())
    worker = ArtifactWorker(tmp_path, SETTINGS, store, state, retries)

    before = num_bytes_read()
    worker.start()
    for end in (*ends[NUM_ROWS_PER_BATCH - 1 :: NUM_ROWS_PER_BATCH], ends[-1]):
        state.update(offset=end)
        # Deliver the next batch after the worker has passed this one, as with a slow server.
        assert state.wait_for(lambda now, end=end: now.models_offset >= end, timeout_s=60)
    num_read = num_bytes_read() - before

    worker.close()
    assert store.calls == [("text", ("last.txt", "words"))]
    assert num_read < 2 * outbox.end_offset, f"{num_read} bytes for a journal of {outbox.end_offset}"


def test_points_are_passed_at_once_where_no_file_is_before_them(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path / "outbox")
    outbox.append("metrics", {"step": 1, "values": {"train/loss": 0.5}})
    first = outbox.end_offset
    outbox.append("text", {"name": "a.txt", "content": "words"})
    second = outbox.end_offset
    outbox.append("metrics", {"step": 2, "values": {"train/loss": 0.5}})
    state = DeliveryState(tmp_path / "outbox")
    state.update(is_points=True, offset=first)
    assert state.current.models_offset == first
    state.update(offset=second)
    state.update(is_points=True, offset=outbox.end_offset)
    assert state.current.models_offset == first  # the text is still to be delivered
    state.close()
    assert read_delivered(tmp_path / "outbox") == state.current
