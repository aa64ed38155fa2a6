from __future__ import annotations

from accelerate import Accelerator

from harness.distributed.topology import topology_of


def test_topology_is_single_when_there_is_one_process(accelerator: Accelerator) -> None:
    topology = topology_of(accelerator)
    assert (topology.strategy, topology.rank, topology.world_size, topology.num_nodes) == ("single", 0, 1, 1)
    assert topology.mixed_precision == "fp32"
    assert topology.run_facts["device"] == "cpu"
    assert "rank" not in topology.run_facts
