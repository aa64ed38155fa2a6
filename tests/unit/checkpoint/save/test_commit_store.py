from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from harness.checkpoint.save.commit_store import CommitStore
from harness.errors import CheckpointError


@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def boards(store: TCPStore, world_size: int, run: str = "run") -> list[CommitStore]:
    """Each with a connection of its own, as ranks have them."""
    return [
        CommitStore(rank, world_size, TCPStore("127.0.0.1", store.port, is_master=False), run)
        for rank in range(world_size)
    ]


def test_records_are_in_the_order_of_ranks_when_all_have_put_theirs(store: TCPStore) -> None:
    ranks = boards(store, 3)
    for rank in (2, 0, 1):
        ranks[rank].publish_record(1, f"record {rank}".encode() + bytes(range(256)))
    assert ranks[0].collect_records(1, 10.0) == [f"record {rank}".encode() + bytes(range(256)) for rank in range(3)]


def test_record_arrives_when_it_is_put_while_rank_zero_waits(store: TCPStore) -> None:
    ranks = boards(store, 2)
    ranks[0].publish_record(1, b"zero")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(ranks[0].collect_records, 1, 60.0)
        ranks[1].publish_record(1, b"one")
        assert waiting.result(timeout=30) == [b"zero", b"one"]


def test_saves_and_runs_are_kept_apart_when_one_store_serves_them(store: TCPStore) -> None:
    first, second = boards(store, 2, "first"), boards(store, 2, "second")
    for ranks, run in ((first, "first"), (second, "second")):
        for save in (2, 1):
            for rank in range(2):
                ranks[rank].publish_record(save, f"{run} {save} {rank}".encode())
    for save in (1, 2):
        assert first[0].collect_records(save, 10.0) == [f"first {save} {rank}".encode() for rank in range(2)]
        assert second[0].collect_records(save, 10.0) == [f"second {save} {rank}".encode() for rank in range(2)]


def test_store_keeps_nothing_when_the_records_are_collected(store: TCPStore) -> None:
    ranks = boards(store, 3)
    before = store.num_keys()
    for save in range(5):
        for board in ranks:
            board.publish_record(save, b"x" * 100)
        ranks[0].collect_records(save, 10.0)
    assert store.num_keys() == before


def test_own_record_is_enough_when_there_is_one_process() -> None:
    board = CommitStore(0, 1, None, "run")
    board.publish_record(1, b"mine")
    assert board.collect_records(1, 0.0) == [b"mine"]


@pytest.mark.parametrize(
    ("world_size", "present", "expected"),
    [
        (2, [0], "rank 1 had not written their part after 0 s"),
        (5, [0, 1, 3], "ranks 2, 4 had not written"),
        (12, [0], "ranks 1, 2, 3, 4, 5, 6, 7, 8 and more had not written"),
    ],
)
def test_error_names_the_missing_ranks_when_the_time_is_up(
    store: TCPStore, world_size: int, present: list[int], expected: str
) -> None:
    ranks = [CommitStore(rank, world_size, store, "run") for rank in range(world_size)]
    for rank in present:
        ranks[rank].publish_record(1, b"")
    with pytest.raises(CheckpointError) as caught:
        ranks[0].collect_records(1, 0.05)
    assert expected in str(caught.value)


def test_next_save_is_collected_when_the_one_before_was_given_up(store: TCPStore) -> None:
    ranks = boards(store, 2)
    ranks[0].publish_record(1, b"")
    with pytest.raises(CheckpointError):
        ranks[0].collect_records(1, 0.05)
    ranks[1].publish_record(1, b"too late")
    for board in ranks:
        board.publish_record(2, b"in time")
    assert ranks[0].collect_records(2, 10.0) == [b"in time", b"in time"]


def test_wait_ends_when_it_is_stopped(store: TCPStore) -> None:
    ranks = boards(store, 2)
    ranks[0].publish_record(1, b"")
    failures: list[BaseException] = []

    def collect() -> None:
        try:
            ranks[0].collect_records(1, 600.0)
        except CheckpointError as error:
            failures.append(error)

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    ranks[0].stop()
    thread.join(30)
    assert not thread.is_alive()
    assert [str(error) for error in failures] == ["rank 1 had not written their part when the run ended"]


def test_records_are_collected_when_they_were_there_before_the_stop(store: TCPStore) -> None:
    ranks = boards(store, 2)
    for board in ranks:
        board.publish_record(1, b"in time")
    ranks[0].stop()
    assert ranks[0].collect_records(1, 10.0) == [b"in time", b"in time"]
