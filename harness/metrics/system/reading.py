"""Read one node's figures by the names of MLflow's own monitors. A failing source does not affect the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from harness.metrics.system.reduction import latest_only

Figures = dict[str, float]


@dataclass(frozen=True)
class FigureSource:
    """A named source. `read` returns its current figures, or raises."""

    name: str
    read: Callable[[], Figures]


class Reader:
    """Read all sources, and average their figures between two calls of `pop`.

    Effects: not collective; one thread; blocks as long as the sources do; nothing on disk.

    Attributes:
        failures: name of a source -> its latest error.
    """

    def __init__(self, sources: Sequence[FigureSource]) -> None:
        self._sources = sources
        self._values: dict[str, list[float]] = {}
        self.failures: dict[str, str] = {}

    def read(self) -> None:
        """Read each source once."""
        for source in self._sources:
            try:
                figures = source.read()
            except Exception as error:
                # Any error: the next reading may succeed, and the other sources are still read.
                self.failures[source.name] = str(error) or type(error).__name__
                continue
            for name, value in figures.items():
                self._values.setdefault(name, []).append(value)

    def pop(self) -> Figures:
        """Return each figure's mean since the last call, or the last value of a growing total."""
        values, self._values = self._values, {}
        return {
            name: round(each[-1] if latest_only(name) else sum(each) / len(each), 3) for name, each in values.items()
        }


def node_sources(gpus: Sequence[str], nvml: Any = None) -> list[FigureSource]:
    """Return the sources of this node: processor, memory, disk, network, and the GPUs of these UUIDs.

    Effects: not collective; any thread; with GPUs, blocks while NVML starts (up to a second).

    Args:
        gpus: UUIDs.
        nvml: the module `pynvml` or an equivalent; None: it is imported if there are GPUs.
    """
    sources = [
        FigureSource("cpu", _cpu),
        FigureSource("memory", _memory),
        FigureSource("disk", _disk),
        FigureSource("network", _network()),
    ]
    psutil.cpu_percent()  # returns the share since its last call, and nothing the first time
    if gpus:
        try:
            sources += _gpu_sources(gpus, nvml or _start_nvml())
        except Exception as error:
            reason = error

            def fail() -> Figures:
                raise reason

            sources.append(FigureSource("gpu", fail))
    return sources


def _cpu() -> Figures:
    return {"cpu_utilization_percentage": psutil.cpu_percent()}


def _memory() -> Figures:
    memory = psutil.virtual_memory()
    return {
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
    }


def _disk() -> Figures:
    usage = psutil.disk_usage(os.sep)
    return {
        "disk_usage_percentage": usage.percent,
        "disk_usage_megabytes": usage.used / 1e6,
        "disk_available_megabytes": usage.free / 1e6,
    }


def _network() -> Callable[[], Figures]:
    """Return a reader of the traffic since this call, as the system counts since boot."""
    begun = psutil.net_io_counters()

    def read() -> Figures:
        now = psutil.net_io_counters()
        return {
            "network_receive_megabytes": (now.bytes_recv - begun.bytes_recv) / 1e6,
            "network_transmit_megabytes": (now.bytes_sent - begun.bytes_sent) / 1e6,
        }

    return read


def _start_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise ImportError("nvidia-ml-py is not installed; pip install 'harness[gpu]'") from None
    pynvml.nvmlInit()
    return pynvml


def _gpu_sources(gpus: Sequence[str], nvml: Any) -> list[FigureSource]:
    return [
        FigureSource(f"gpu_{index} {what}", _Gpu(nvml, index, uuid, read))
        for index, uuid in enumerate(gpus)
        for what, read in _GPU_READINGS.items()
    ]


@dataclass
class _Gpu:
    """One reading of one GPU. Looks up the handle at the first reading, and retries until that succeeds."""

    nvml: Any
    index: int
    uuid: str
    reading: Callable[[Any, Any], Mapping[str, float]]
    handle: Any = None

    def __call__(self) -> Figures:
        if self.handle is None:
            self.handle = _handle(self.nvml, self.uuid)
        return {f"gpu_{self.index}_{name}": value for name, value in self.reading(self.nvml, self.handle).items()}


def _handle(nvml: Any, uuid: str) -> Any:
    uuid = uuid.removeprefix("GPU-").removeprefix("MIG-")  # torch's UUID has no prefix
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _gpu_memory(nvml: Any, handle: Any) -> Mapping[str, float]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "memory_usage_megabytes": memory.used / 1e6,
        "memory_usage_percentage": memory.used / memory.total * 100,
    }


def _gpu_utilization(nvml: Any, handle: Any) -> Mapping[str, float]:
    return {"utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(handle).gpu}


def _gpu_power(nvml: Any, handle: Any) -> Mapping[str, float]:
    return {"power_usage_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000}


def _gpu_power_share(nvml: Any, handle: Any) -> Mapping[str, float]:
    usage, limit = nvml.nvmlDeviceGetPowerUsage(handle), nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
    return {"power_usage_percentage": usage / limit * 100}


# Separate sources: some GPUs, and all MIG devices, lack some of them.
_GPU_READINGS = {
    "memory": _gpu_memory,
    "utilization": _gpu_utilization,
    "power": _gpu_power,
    "power share": _gpu_power_share,
}
