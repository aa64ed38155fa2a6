"""Two nodes' agents on one machine."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.saving_ranks import free_port
from tests.launching import BIN, started


def test_ranks_restart_when_nodes_count_restarts_differently(tmp_path: Path) -> None:
    words = [
        BIN / "torchrun",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--max_restarts",
        "2",
    ]
    words += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "-m", "tests.distributed.restarting_ranks", tmp_path]
    nodes = [tmp_path / "stays", tmp_path / "dies"]
    for node in nodes:
        node.mkdir()
    with started(words, nodes[0], {"DIES": "no"}) as stays, started(words, nodes[1], {"DIES": "yes"}) as dies:
        codes = [stays.wait(100), dies.wait(30)]
    assert codes == [0, 0], "\n".join((node / "output.txt").read_text() for node in nodes)
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [each["total"] for each in told] == [2.0, 2.0]
    assert {each["count"] for each in told} == {"0", "1"}
    assert told[0]["name"] == told[1]["name"]
