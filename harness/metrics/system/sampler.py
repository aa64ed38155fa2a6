"""The thread that reads a node's figures, and how the nodes tell rank zero: a key-value store, and no collective.

    each node's lowest rank   reads every few seconds; puts what it read, each interval, under a key of its own
    rank zero                 looks at the keys; logs once all nodes have told, or when its own next interval is over

A node that is late, or gone, holds up nobody: its figures are missing.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from harness.distributed.collectives import Collectives
from harness.distributed.failure_monitor import connect_to_store
from harness.errors import ConfigError
from harness.metrics.system.nodes import Node, find_place, nodes_of
from harness.metrics.system.reading import FigureSource, Reader, node_sources
from harness.metrics.system.reduction import OWN_COST, metrics_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

INTERVAL_VARIABLE = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
DEFAULT_EVERY_S = 10.0
# Some figures are of the moment, a GPU's use above all: one reading in ten seconds would say little.
READINGS_PER_INTERVAL = 5
# The thread's share of one processor: where reading is slow, it reads less often.
_MAX_SHARE = 0.01
# A node that was not heard of for so many intervals is no longer reduced with the others.
_STALE_INTERVALS = 3
_MAX_WARNINGS = 8
_STOP_TIMEOUT_S = 2.0

Log = Callable[[Mapping[str, float]], None]
Say = Callable[[str], None]
Record = Mapping[str, Any]


class Collector:
    """Rank zero's: what the nodes have told, logged together.

    Effects: not collective; one thread; blocks in `log`; nothing on disk but what `log` leaves.

    Args:
        nodes: of the job.
        every_s: how often each tells, in seconds.
        log: takes metrics by their names in MLflow.
        say: takes a line for the user, the first time that something cannot be read.
    """

    def __init__(self, nodes: Sequence[Node], every_s: float, log: Log, say: Say) -> None:
        self._nodes = nodes
        self._num_gpus = sum(len(node.gpus) for node in nodes)
        self._stale_s = _STALE_INTERVALS * every_s
        self._log = log
        self._say = say
        self._rounds: dict[int, int] = {}
        self._told: dict[int, Mapping[str, float]] = {}
        self._known: dict[int, tuple[float, Mapping[str, float]]] = {}
        self._said: set[tuple[int, str]] = set()

    def take(self, node: int, record: Record, now_s: float) -> None:
        """A node's newest record, which may be one that is known."""
        if self._rounds.get(node) == record["round"]:
            return
        self._rounds[node] = record["round"]
        self._told[node] = record["figures"]
        self._known[node] = (now_s, record["figures"])
        for what, reason in record["failures"].items():
            self.warn(node, what, reason)

    def warn(self, node: int, what: str, reason: str) -> None:
        """Say that something of a node cannot be read: once each, and not without end."""
        if (node, what) in self._said or len(self._said) >= _MAX_WARNINGS:
            return
        self._said.add((node, what))
        self._say(f"harness: warning: system metrics: {what} on {self._nodes[node].host}: {reason}")

    def has_told(self, node: int) -> bool:
        """Whether a node has told since the last `flush`."""
        return node in self._told

    @property
    def is_complete(self) -> bool:
        """Whether all nodes have told since the last `flush`."""
        return len(self._told) == len(self._nodes)

    def flush(self, now_s: float) -> None:
        """Log what was told since the last time, if anything was."""
        if not self._told:
            return
        told, self._told = self._told, {}
        known = {node: figures for node, (at_s, figures) in self._known.items() if now_s - at_s <= self._stale_s}
        self._log(metrics_of(told, known, len(self._nodes), self._num_gpus))


class Sampler:
    """One node's thread.

    Effects: not collective; a daemon thread, which alone reads, connects and logs; `start` does not block, `stop` at
    most two seconds; nothing on disk but what the collector leaves.

    Args:
        node: this node.
        nodes: all of them.
        run: unique name of this attempt of the job.
        every_s: how often the node tells, in seconds.
        collector: on rank zero; None: elsewhere.
        connect: makes a connection of the thread's own to the store that the nodes share, or gives None; not called
            where there is one node.
        sources: makes what to read.
    """

    def __init__(
        self,
        node: Node,
        nodes: Sequence[Node],
        run: str,
        every_s: float,
        collector: Collector | None,
        connect: Callable[[], Store | None],
        sources: Callable[[], Sequence[FigureSource]],
    ) -> None:
        self._node = node
        self._run = run
        self._others = [other.index for other in nodes if other.index != node.index]
        self._all_have_told = False
        self._every_s = every_s
        self._collector = collector
        self._connect = connect
        self._make_sources = sources
        self._reader: Reader | None = None
        self._store: Store | None = None
        self._round = 0
        self._told_s = 0.0
        self._told_cost_s = 0.0
        self._problems: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="harness-system-metrics", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, with what was read since it last told. A thread that does not end in time is left to itself."""
        self._stopping.set()
        self._thread.join(_STOP_TIMEOUT_S)

    def _work(self) -> None:
        pause_s = 0.0
        is_last = False
        while not is_last:
            # What is left at the end is told too: a short run has only that.
            is_last = self._stopping.wait(pause_s)
            begun_s = time.thread_time()
            self.turn(time.monotonic(), is_last=is_last)
            pause_s = max(self._every_s / READINGS_PER_INTERVAL, (time.thread_time() - begun_s) / _MAX_SHARE)

    def turn(self, now_s: float, *, is_last: bool = False) -> None:
        """Read; tell, if the interval is over; and on rank zero look at what the others told. Never raises.

        Args:
            now_s: the time, in seconds of a clock that never goes back.
            is_last: tell all the same.
        """
        if self._reader is None:
            self._try("finding out what to read", self._begin)
            self._told_s = now_s
            if not is_last:
                return
        if (reader := self._reader) is None:
            return
        reader.read()
        self._try("reading the other nodes' figures", lambda: self._look(now_s))
        # A little early is on time: the pauses are not exact.
        if is_last or now_s - self._told_s >= self._every_s * (1 - 0.5 / READINGS_PER_INTERVAL):
            self._told_s = now_s
            self._try("telling this node's figures", lambda: self._tell(now_s))
        if (collector := self._collector) is not None and (collector.is_complete or is_last):
            self._try("logging", lambda: collector.flush(now_s))

    def _begin(self) -> None:
        self._reader = Reader(self._make_sources())

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            # The store is gone, the disk is full: that ends no thread, and the next turn tries again.
            self._store = None
            reason = str(error).partition("\n")[0] or type(error).__name__
            if self._collector is not None:
                self._collector.warn(self._node.index, what, reason)
            else:
                self._problems[what] = reason

    def _tell(self, now_s: float) -> None:
        assert self._reader is not None
        cost_s = time.thread_time()
        figures = self._reader.take() | {OWN_COST: round(1000 * (cost_s - self._told_cost_s), 3)}
        self._told_cost_s = cost_s
        self._round += 1
        record = {"round": self._round, "figures": figures, "failures": {**self._reader.failures, **self._problems}}
        if self._collector is not None:
            if self._collector.has_told(self._node.index):
                # Those who are late by a whole interval are not waited for any longer.
                self._collector.flush(now_s)
            self._collector.take(self._node.index, record, now_s)
        elif (store := self._connected()) is not None:
            store.set(self._key(self._node.index), json.dumps(record))

    def _look(self, now_s: float) -> None:
        if self._collector is None or not self._others or (store := self._connected()) is None:
            return
        keys = {node: self._key(node) for node in self._others}
        # A key that is there stays: from then on they are all read in one round trip.
        self._all_have_told = self._all_have_told or store.check(list(keys.values()))
        if not self._all_have_told:
            keys = {node: key for node, key in keys.items() if store.check([key])}
        if keys:
            for node, record in zip(keys, store.multi_get(list(keys.values())), strict=True):
                self._collector.take(node, json.loads(record), now_s)

    def _connected(self) -> Store | None:
        if self._store is None:
            self._store = self._connect()
        return self._store

    def _key(self, node: int) -> str:
        return f"harness/system/{self._run}/{node}"


def interval_s(text: str | None) -> float:
    """Seconds between two points, as MLflow's own variable has it.

    Raises:
        ConfigError: if it is no number of seconds.
    """
    try:
        value = DEFAULT_EVERY_S if not text else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(INTERVAL_VARIABLE, f"must be seconds, more than 0, got {text!r}; unset it for 10")
    return value


def start_sampler(collectives: Collectives, device: torch.device, log: Log, say: Say) -> Sampler | None:
    """Start this node's thread, on the node's lowest rank.

    Effects: collective, one small exchange; main thread; starts a daemon thread; nothing on disk.

    Args:
        collectives: of all ranks.
        device: this rank's.
        log: rank zero's thread calls it with metrics by their names in MLflow.
        say: rank zero's thread calls it with a line for the user.

    Returns:
        The sampler; None on the other ranks of a node.

    Raises:
        ConfigError: on all ranks, if the interval is none.
    """
    mine = (find_place(device), uuid.uuid4().hex[:12], os.environ.get(INTERVAL_VARIABLE))
    told = collectives.all_gather("where the ranks are", mine)
    _, run, every = told[0]
    every_s = interval_s(every)
    nodes = nodes_of([place for place, _, _ in told])
    node = next((node for node in nodes if node.ranks[0] == collectives.rank), None)
    if node is None:
        return None
    collector = Collector(nodes, every_s, log, say) if collectives.rank == 0 else None
    sampler = Sampler(node, nodes, run, every_s, collector, connect_to_store, lambda: node_sources(node.gpus))
    sampler.start()
    return sampler
