"""The ranks of one start agree on a name in a store that keeps the keys of earlier starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from harness.distributed.launch_identity import Rendezvous
from harness.distributed.rendezvous import join
from tests.distributed.saving_ranks import free_port

LIMIT = timedelta(seconds=20)


@pytest.fixture
def port() -> Iterator[int]:
    """Port of a store that outlives the ranks, as an agent's does."""
    found = free_port()
    store = TCPStore("127.0.0.1", found, is_master=True, wait_for_workers=False)
    yield found
    del store


def join_as(port: int, rank: int, world_size: int, *, delay_s: float = 0.0, limit: timedelta = LIMIT) -> Rendezvous:
    time.sleep(delay_s)
    return join(TCPStore("127.0.0.1", port, is_master=False, timeout=LIMIT), rank, world_size, limit)


def start(port: int, delays_s: list[float]) -> list[Rendezvous]:
    """All ranks of one start, each after its delay."""
    with ThreadPoolExecutor(len(delays_s)) as ranks:
        joined = [ranks.submit(join_as, port, i, len(delays_s), delay_s=delay_s) for i, delay_s in enumerate(delays_s)]
        return [each.result(timeout=30) for each in joined]


@pytest.mark.parametrize("delays_s", [[0.0, 0.0, 0.0], [0.4, 0.0, 0.2], [0.0, 0.4, 0.2]])
def test_each_start_has_its_own_name_whichever_rank_is_first(port: int, delays_s: list[float]) -> None:
    names = set()
    for number in range(3):
        found = start(port, delays_s)
        assert len(set(found)) == 1
        assert found[0].is_restart == (number > 0)
        names.add(found[0].name)
    assert len(names) == 3


def test_ranks_join_when_the_previous_start_was_cut_off(port: int) -> None:
    # Rank 0 and rank 1 start, rank 2 does not; their tokens stay in the store.
    short = timedelta(seconds=0.5)
    with ThreadPoolExecutor(2) as ranks:
        cut = [ranks.submit(join_as, port, rank, 3, limit=short) for rank in range(2)]
        with pytest.raises(TimeoutError, match=r"waited for ranks \[2\] to start"):
            cut[0].result(timeout=30)
        with pytest.raises(TimeoutError, match="rank 0, or all other ranks"):
            cut[1].result(timeout=30)
    assert len(set(start(port, [0.3, 0.0, 0.0]))) == 1


def test_fewer_ranks_join_when_the_previous_start_had_more(port: int) -> None:
    assert len(set(start(port, [0.0, 0.0, 0.0]))) == 1
    assert len(set(start(port, [0.0, 0.0]))) == 1
