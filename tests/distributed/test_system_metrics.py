"""Nodes tell rank zero what they are busy with, by a store and no collective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.sampling_ranks import sample
from tests.distributed.test_saver import ranks


def sampled(directory: Path, nodes: list[int], alive_s: list[float]) -> list[dict[str, Any]]:
    with ranks(len(nodes), sample, directory, nodes, alive_s) as processes:
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0] * len(nodes)
    return [json.loads((directory / f"sampled-{rank}.json").read_text()) for rank in range(len(nodes))]


def test_rank_zero_logs_each_nodes_figures_and_the_jobs(tmp_path: Path) -> None:
    zero, one, two = sampled(tmp_path, [0, 0, 1], [6.0, 6.0, 6.0])
    assert [zero["samples"], one["samples"], two["samples"]] == [True, False, True]
    assert one["logged"] == two["logged"] == two["warnings"] == zero["warnings"] == []
    together = [each for each in zero["logged"] if any(name.startswith("system/node_1/") for name in each)]
    assert len(together) >= 3
    memory = "system_memory_usage_megabytes"
    for each in together[1:]:
        # One machine plays both: each has all of its memory, and the job twice.
        assert each[f"system/node_1/{memory}"] > 1
        assert "system/cpu_utilization_percentage" in each
        assert "system/gpu_utilization_percentage" not in each
    assert any(each.get(f"system/{memory}", 0) > 1.5 * each[f"system/node_1/{memory}"] for each in together)


def test_node_that_ends_early_holds_up_nobody(tmp_path: Path) -> None:
    zero, _ = sampled(tmp_path, [0, 1], [7.0, 1.0])
    logged = zero["logged"]
    assert any(name.startswith("system/node_0/") for name in logged[-1])
    assert not any(name.startswith("system/node_1/") for name in logged[-1])
    assert len(logged) >= 5
