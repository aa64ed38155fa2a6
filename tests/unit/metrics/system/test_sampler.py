"""What the nodes are busy with: who is where, what is read, how it is reduced, and who tells whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore  # type: ignore[attr-defined]

from harness.distributed.collectives import Collectives
from harness.errors import ConfigError
from harness.metrics.system import sampler as sampler_module
from harness.metrics.system.nodes import Node, NodePlace, find_place, nodes_of
from harness.metrics.system.reading import FigureSource, Reader, node_sources
from harness.metrics.system.reduction import RULES, metrics_of, reduce
from harness.metrics.system.sampler import Collector, Sampler, interval_s, start_sampler

CPU = torch.device("cpu")


# ------------------------------------------------------------------------- who is where


def test_nodes_are_counted_in_the_order_of_their_lowest_ranks() -> None:
    places = [
        NodePlace("b", "1", "g0"),
        NodePlace("a", "0", "g0"),
        NodePlace("b", "1", "g1"),
        NodePlace("a", "0", None),
    ]
    assert nodes_of(places) == [Node(0, "b", (0, 2), ("g0", "g1")), Node(1, "a", (1, 3), ("g0",))]


def test_gpu_that_ranks_share_is_there_once() -> None:
    (node,) = nodes_of([NodePlace("a", "", "g"), NodePlace("a", "", "g")])
    assert node.gpus == ("g",)


def test_nodes_are_told_apart_by_the_launchers_number_when_they_have_one_name() -> None:
    assert [
        node.ranks for node in nodes_of([NodePlace("localhost", "0", None), NodePlace("localhost", "1", None)])
    ] == [
        (0,),
        (1,),
    ]


def test_place_has_the_launchers_number() -> None:
    assert find_place(CPU, {"SLURM_NODEID": "3"}).group == "3"
    assert find_place(CPU, {"GROUP_RANK": "2", "SLURM_NODEID": "3"}).group == "2"
    assert find_place(CPU, {}) == NodePlace(find_place(CPU).host, "", None)


# -------------------------------------------------------------------------- what is read


class Nvml(SimpleNamespace):
    """NVML as `pynvml` gives it, for two GPUs of ours and one of somebody else's; the second knows no power."""

    class NVMLError(Exception):
        """What it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.add(uuid)
        if uuid not in ("GPU-one", "MIG-two", "GPU-theirs"):
            raise self.NVMLError(f"no {uuid}")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=2_000_000_000, total=8_000_000_000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if handle != "GPU-one":
            raise self.NVMLError("Not Supported")
        return 100_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 400_000


def test_figures_are_of_the_jobs_gpus_alone_and_what_one_does_not_know_stops_no_other() -> None:
    nvml = Nvml()
    reader = Reader(node_sources(["one", "two"], nvml))
    reader.read()
    figures = reader.pop()
    assert nvml.asked == {"GPU-one", "GPU-two", "MIG-two"}
    assert {name: value for name, value in figures.items() if name.startswith("gpu_")} == {
        "gpu_0_memory_usage_megabytes": 2000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 50.0,
        "gpu_0_power_usage_watts": 100.0,
        "gpu_0_power_usage_percentage": 25.0,
        "gpu_1_memory_usage_megabytes": 2000.0,
        "gpu_1_memory_usage_percentage": 25.0,
        "gpu_1_utilization_percentage": 50.0,
    }
    assert set(reader.failures) == {"gpu_1 power", "gpu_1 power share"}


def test_every_figure_that_a_node_gives_has_a_rule() -> None:
    reader = Reader(node_sources(["one"], Nvml()))
    reader.read()
    figures = reader.pop()
    assert {name.replace("gpu_0_", "gpu_") for name in figures} == RULES.keys() - {"sampler_cpu_milliseconds"}
    assert 0 <= figures["cpu_utilization_percentage"] <= 100
    assert figures["system_memory_usage_megabytes"] > 1


def test_figure_is_the_mean_since_the_last_time_and_of_a_total_the_last() -> None:
    values = iter([1.0, 2.0, 6.0])
    both = FigureSource(
        "x", lambda: {"cpu_utilization_percentage": (v := next(values)), "network_receive_megabytes": 10 * v}
    )
    reader = Reader([both])
    for _ in range(3):
        reader.read()
    assert reader.pop() == {"cpu_utilization_percentage": 3.0, "network_receive_megabytes": 60.0}
    assert reader.pop() == {}


# -------------------------------------------------------------------------- reduction


def test_job_has_one_figure_of_each_by_its_rule() -> None:
    nodes = {
        0: {"cpu_utilization_percentage": 10.0, "disk_available_megabytes": 5.0, "gpu_0_power_usage_watts": 100.0},
        1: {"cpu_utilization_percentage": 30.0, "disk_available_megabytes": 3.0, "gpu_0_power_usage_watts": 300.0},
    }
    assert metrics_of(nodes, nodes, 2, 2) == {
        "system/node_0/cpu_utilization_percentage": 10.0,
        "system/node_0/disk_available_megabytes": 5.0,
        "system/node_0/gpu_0_power_usage_watts": 100.0,
        "system/node_1/cpu_utilization_percentage": 30.0,
        "system/node_1/disk_available_megabytes": 3.0,
        "system/node_1/gpu_0_power_usage_watts": 300.0,
        "system/cpu_utilization_percentage": 20.0,
        "system/disk_available_megabytes": 3.0,
        "system/gpu_power_usage_watts": 400.0,
    }


@given(
    st.dictionaries(
        st.integers(0, 7), st.dictionaries(st.sampled_from(sorted(RULES)), st.floats(0, 1e9), max_size=5), max_size=8
    )
)
def test_reduced_figure_is_in_range_or_a_whole_sum(figures: dict[int, dict[str, float]]) -> None:
    reduced = reduce(figures, 8, 8)
    for name, value in reduced.items():
        found = [each[name] for each in figures.values() if name in each]
        if RULES[name].is_total:
            assert len(found) == 8
            assert value == pytest.approx(sum(found))
        else:
            assert min(found) * (1 - 1e-9) <= value <= max(found) * (1 + 1e-9)


# ------------------------------------------------------------------- who tells whom, and when

NODES = [Node(0, "a", (0, 1), ()), Node(1, "b", (2, 3), ())]


class Sink:
    """Keeps what a collector logs and warns of."""

    def __init__(self) -> None:
        self.logged: list[Mapping[str, float]] = []
        self.warnings: list[str] = []

    def log_system_metrics(self, values: Mapping[str, float]) -> None:
        self.logged.append(values)

    def warn(self, line: str) -> None:
        self.warnings.append(line)


class FakeSampler(Sampler):
    """A sampler with a store and sources of the test's."""

    store: HashStore | None = None
    sources: Callable[[], Sequence[FigureSource]]

    def connect_store(self) -> HashStore | None:
        return self.store

    def make_sources(self) -> Sequence[FigureSource]:
        return self.sources()


class Job(Sink):
    """Two nodes' samplers over one store, turned by hand: time passes where the test says."""

    def __init__(self, reads: Mapping[int, Callable[[], dict[str, float]]] | None = None) -> None:
        super().__init__()
        store = HashStore()
        collector = Collector(NODES, 10.0, self)
        self.zero, self.one = (
            FakeSampler(node, NODES, "run", 10.0, collector if node.index == 0 else None) for node in NODES
        )
        for sampler, node in ((self.zero, 0), (self.one, 1)):
            source = FigureSource("cpu", (reads or {}).get(node, lambda: {"cpu_utilization_percentage": 8.0}))
            sampler.store, sampler.sources = store, lambda source=source: [source]  # type: ignore[misc]


def test_figures_of_all_nodes_are_logged_together_once_in_an_interval() -> None:
    job = Job()
    for second in range(0, 31, 2):
        job.one.turn(float(second))
        job.zero.turn(float(second))
    assert len(job.logged) == 3
    for logged in job.logged:
        assert logged["system/cpu_utilization_percentage"] == 8.0
        assert {"system/node_0/cpu_utilization_percentage", "system/node_1/cpu_utilization_percentage"} <= logged.keys()
    assert job.warnings == []


def test_node_that_is_gone_holds_up_nobody_and_is_no_longer_counted() -> None:
    job = Job({1: lambda: {"cpu_utilization_percentage": 100.0}})
    for second in range(0, 91, 2):
        if second < 15:
            job.one.turn(float(second))
        job.zero.turn(float(second))
    means = [logged["system/cpu_utilization_percentage"] for logged in job.logged]
    assert means[0] == 54.0
    assert means[-1] == 8.0
    assert len(means) >= 7


def test_reason_is_said_once_when_something_cannot_be_read() -> None:
    def fails() -> dict[str, float]:
        raise OSError("no such file")

    job = Job({1: fails})
    for second in range(0, 61, 2):
        job.one.turn(float(second))
        job.zero.turn(float(second))
    assert job.warnings == ["system metrics: cpu on b: no such file"]


def test_reading_begins_later_when_the_sources_cannot_be_made_at_first() -> None:
    tries: list[int] = []
    sink = Sink()

    def make() -> list[FigureSource]:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("no counters")
        return [FigureSource("cpu", lambda: {"cpu_utilization_percentage": 8.0})]

    nodes = [Node(0, "a", (0,), ())]
    sampler = FakeSampler(nodes[0], nodes, "run", 10.0, Collector(nodes, 10.0, sink))
    sampler.sources = make
    for second in range(0, 31, 2):
        sampler.turn(float(second))
    assert sink.warnings == ["system metrics: finding out what to read on a: no counters"]
    assert sink.logged


def test_thread_logs_what_there_is_at_its_end_and_nothing_after(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Sink()
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "100")
    sampler = start_sampler(Collectives(0, 1), CPU, sink)
    assert sampler is not None
    time.sleep(0.2)  # shorter than a reading's pause: what there is, is of the end
    begun_s = time.monotonic()
    sampler.stop()
    assert time.monotonic() - begun_s < 2
    assert not sink.warnings
    (values,) = sink.logged
    assert values["system/system_memory_usage_megabytes"] > 1
    assert values["system/sampler_cpu_milliseconds"] < 1000
    assert not sampler._thread.is_alive()


def test_thread_takes_a_small_share_of_a_processor() -> None:
    slow = [FigureSource("slow", lambda: {"cpu_utilization_percentage": float(sum(range(200_000)) > 0)})]
    pauses: list[float] = []
    sampler = FakeSampler(NODES[0], NODES[:1], "run", 0.05, Collector(NODES[:1], 0.05, Sink()))
    sampler.sources = lambda: slow
    waits = sampler._stopping.wait

    def wait(pause_s: float) -> bool:
        pauses.append(pause_s)
        return len(pauses) > 3 or waits(0)

    sampler._stopping.wait = wait  # type: ignore[method-assign, assignment]
    sampler.start()
    sampler._thread.join(10)
    assert max(pauses[1:]) > 0.05  # a reading costs some milliseconds, a hundredth of the pause behind it


@pytest.mark.parametrize("text", ["0", "-1", "ten", "inf", "nan"])
def test_interval_is_refused_when_it_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=sampler_module.INTERVAL_VARIABLE):
        interval_s(text)


def test_interval_is_mlflows_own_when_it_is_set() -> None:
    assert (interval_s(None), interval_s(""), interval_s("2.5")) == (10.0, 10.0, 2.5)
