"""Read a node's figures in a thread, and report them to rank zero through a key-value store, without collectives.

    each node's lowest rank   reads every few seconds, and writes the figures under its own key each interval
    rank zero                 reads the keys; logs when all nodes have reported, or when its own next interval is over

A node that is late or lost blocks no other; its figures are missing.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

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
# Some figures are instantaneous, such as a GPU's utilization: one reading in ten seconds is too few.
READINGS_PER_INTERVAL = 5
# Limit of the thread's share of one processor: if reading is slow, it reads less often.
_MAX_SHARE = 0.01
# A node without a report for this number of intervals is excluded from the reduction.
_STALE_INTERVALS = 3
_MAX_WARNINGS = 8
_STOP_TIMEOUT_S = 2.0

Record = Mapping[str, Any]


class SystemMetricSink(Protocol):
    """The run that system metrics are written to, from rank zero's thread; `RunRecorder` implements it."""

    def log_system_metrics(self, values: Mapping[str, float]) -> None:
        """Write metrics by their names in MLflow."""

    def warn(self, line: str) -> None:
        """Print a warning for the user."""


class Collector:
    """Collect the reports of all nodes on rank zero, and log them together.

    Effects: not collective; one thread; blocks in the sink; only the sink writes to disk.

    Args:
        every_s: interval of the reports, in seconds.
        sink: receives metrics, and a warning for the first failure of each source.
    """

    def __init__(self, nodes: Sequence[Node], every_s: float, sink: SystemMetricSink) -> None:
        self._nodes = nodes
        self._num_gpus = sum(len(node.gpus) for node in nodes)
        self._stale_s = _STALE_INTERVALS * every_s
        self._sink = sink
        self._rounds: dict[int, int] = {}
        self._reports: dict[int, Mapping[str, float]] = {}
        self._known: dict[int, tuple[float, Mapping[str, float]]] = {}
        self._warned: set[tuple[int, str]] = set()

    def add(self, node: int, record: Record, now_s: float) -> None:
        """Add a node's newest record; one that was added before is ignored."""
        if self._rounds.get(node) == record["round"]:
            return
        self._rounds[node] = record["round"]
        self._reports[node] = record["figures"]
        self._known[node] = (now_s, record["figures"])
        for what, reason in record["failures"].items():
            self.warn(node, what, reason)

    def warn(self, node: int, what: str, reason: str) -> None:
        """Warn of a failed reading on a node: once each, at most eight in all."""
        if (node, what) in self._warned or len(self._warned) >= _MAX_WARNINGS:
            return
        self._warned.add((node, what))
        self._sink.warn(f"system metrics: {what} on {self._nodes[node].host}: {reason}")

    def has_reported(self, node: int) -> bool:
        """Whether a node has reported since the last `flush`."""
        return node in self._reports

    @property
    def is_complete(self) -> bool:
        """Whether all nodes have reported since the last `flush`."""
        return len(self._reports) == len(self._nodes)

    def flush(self, now_s: float) -> None:
        """Log the reports since the last call, if any."""
        if not self._reports:
            return
        reports, self._reports = self._reports, {}
        known = {node: figures for node, (at_s, figures) in self._known.items() if now_s - at_s <= self._stale_s}
        self._sink.log_system_metrics(metrics_of(reports, known, len(self._nodes), self._num_gpus))


class Sampler:
    """Read the figures of one node in a thread, and report them.

    Effects: not collective; a daemon thread, which alone reads, connects and logs; `start` does not block, `stop` at
    most two seconds; only the collector writes to disk.

    Args:
        run: unique name of this attempt.
        every_s: interval of the reports, in seconds.
        collector: on rank zero; None elsewhere.
    """

    def __init__(
        self,
        node: Node,
        nodes: Sequence[Node],
        run: str,
        every_s: float,
        collector: Collector | None,
    ) -> None:
        self._node = node
        self._run = run
        self._other_nodes = [other.index for other in nodes if other.index != node.index]
        self._all_have_reported = False
        self._every_s = every_s
        self._collector = collector
        self._reader: Reader | None = None
        self._store: Store | None = None
        self._round = 0
        self._reported_at_s = 0.0
        self._reported_cost_s = 0.0
        self._problems: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="harness-system-metrics", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Report the readings since the last report, and end. A thread that does not end in time is abandoned."""
        self._stopping.set()
        self._thread.join(_STOP_TIMEOUT_S)

    def _work(self) -> None:
        pause_s = 0.0
        is_last = False
        while not is_last:
            # The last turn reports the remaining readings, which are the only ones of a short run.
            is_last = self._stopping.wait(pause_s)
            begun_s = time.thread_time()
            self.turn(time.monotonic(), is_last=is_last)
            pause_s = max(self._every_s / READINGS_PER_INTERVAL, (time.thread_time() - begun_s) / _MAX_SHARE)

    def turn(self, now_s: float, *, is_last: bool = False) -> None:
        """Read all sources, report if the interval is over, and on rank zero read the other nodes' reports.

        Never raises. `now_s` is the time of a monotonic clock; `is_last` reports in any case.
        """
        if self._reader is None:
            self._try("finding out what to read", self._begin)
            self._reported_at_s = now_s
            if not is_last:
                return
        if (reader := self._reader) is None:
            return
        reader.read()
        self._try("reading the other nodes' figures", lambda: self._read_reports(now_s))
        # The pauses are not exact: allow half a reading's pause.
        if is_last or now_s - self._reported_at_s >= self._every_s * (1 - 0.5 / READINGS_PER_INTERVAL):
            self._reported_at_s = now_s
            self._try("reporting this node's figures", lambda: self._report(now_s))
        if (collector := self._collector) is not None and (collector.is_complete or is_last):
            self._try("logging", lambda: collector.flush(now_s))

    def _begin(self) -> None:
        self._reader = Reader(self.make_sources())

    def make_sources(self) -> Sequence[FigureSource]:
        """Return the sources to read. Called in the thread; tests override it."""
        return node_sources(self._node.gpus)

    def connect_store(self) -> Store | None:
        """Connect the thread to the store that the nodes share. Not called for a single node."""
        return connect_to_store()

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            # For example the store is closed or the disk is full. The next turn retries.
            self._store = None
            reason = str(error).partition("\n")[0] or type(error).__name__
            if self._collector is not None:
                self._collector.warn(self._node.index, what, reason)
            else:
                self._problems[what] = reason

    def _report(self, now_s: float) -> None:
        assert self._reader is not None
        cost_s = time.thread_time()
        figures = self._reader.pop() | {OWN_COST: round(1000 * (cost_s - self._reported_cost_s), 3)}
        self._reported_cost_s = cost_s
        self._round += 1
        record = {"round": self._round, "figures": figures, "failures": {**self._reader.failures, **self._problems}}
        if self._collector is not None:
            if self._collector.has_reported(self._node.index):
                # The other nodes are a whole interval late: log without them.
                self._collector.flush(now_s)
            self._collector.add(self._node.index, record, now_s)
        elif (store := self._connected()) is not None:
            store.set(self._key(self._node.index), json.dumps(record))

    def _read_reports(self, now_s: float) -> None:
        if self._collector is None or not self._other_nodes or (store := self._connected()) is None:
            return
        keys = {node: self._key(node) for node in self._other_nodes}
        # Keys are never removed: once all exist they are read in one round trip.
        self._all_have_reported = self._all_have_reported or store.check(list(keys.values()))
        if not self._all_have_reported:
            keys = {node: key for node, key in keys.items() if store.check([key])}
        if keys:
            for node, record in zip(keys, store.multi_get(list(keys.values())), strict=True):
                self._collector.add(node, json.loads(record), now_s)

    def _connected(self) -> Store | None:
        if self._store is None:
            self._store = self.connect_store()
        return self._store

    def _key(self, node: int) -> str:
        return f"harness/system/{self._run}/{node}"


def interval_s(text: str | None) -> float:
    """Parse MLflow's own interval variable, in seconds.

    Raises:
        ConfigError: if it is not a positive number.
    """
    try:
        value = DEFAULT_EVERY_S if not text else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(INTERVAL_VARIABLE, f"must be seconds, more than 0, got {text!r}; unset it for 10")
    return value


def start_sampler(collectives: Collectives, device: torch.device, sink: SystemMetricSink) -> Sampler | None:
    """Start a thread on each node's lowest rank, which returns its sampler; the other ranks return None.

    Effects: collective, one small exchange; main thread; starts a daemon thread, which uses `sink` on rank zero;
    nothing on disk.

    Raises:
        ConfigError: on all ranks, if the interval is invalid.
    """
    own = (find_place(device), uuid.uuid4().hex[:12], os.environ.get(INTERVAL_VARIABLE))
    places = collectives.all_gather("where the ranks are", own)
    _, run, every = places[0]
    every_s = interval_s(every)
    nodes = nodes_of([place for place, _, _ in places])
    node = next((node for node in nodes if node.ranks[0] == collectives.rank), None)
    if node is None:
        return None
    collector = Collector(nodes, every_s, sink) if collectives.rank == 0 else None
    sampler = Sampler(node, nodes, run, every_s, collector)
    sampler.start()
    return sampler
