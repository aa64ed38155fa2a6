"""Two nodes with a network of their own and no common disk: what they save, and what a fault between them does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from harness.checkpoint.format.commit import list_checkpoints, read_manifest
from harness.checkpoint.format.verify import verify
from tests.distributed.test_saver import check_all, ranks
from tests.nodes.network import Node, NoNamespaces, two_nodes
from tests.nodes.node_ranks import save_all_the_time, train_digits

pytestmark = pytest.mark.services

FILES = ("model.safetensors", "optimizer.safetensors", "trainer_state.json")


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    try:
        with two_nodes() as made:
            yield list(made)
    except NoNamespaces as error:
        pytest.skip(str(error))


def trained(nodes: list[Node], directories: list[Path], max_epochs: int, num_ranks: int = 4) -> None:
    with ranks(num_ranks, train_digits, nodes, directories, "fsdp2", max_epochs) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * num_ranks


def test_checkpoints_are_those_of_a_common_disk_when_the_nodes_share_none(tmp_path: Path, nodes: list[Node]) -> None:
    """Trained, stopped, gone on with: two ranks on each of two nodes."""
    shared, first, second = (tmp_path / name for name in ("shared", "first", "second"))
    for path in (shared, first, second):
        path.mkdir()
    for max_epochs in (1, 2):
        trained(nodes, [shared, shared], max_epochs)
        trained(nodes, [first, second], max_epochs)
    assert not (second / "runs/run").exists()
    for name in ("epoch-0001", "epoch-0002"):
        one, other = (path / "runs/run/checkpoints" / name for path in (shared, first))
        assert [read_manifest(path).save["transport"] for path in (one, other)] == ["direct", "gather"]
        for file in FILES:
            assert (one / file).read_bytes() == (other / file).read_bytes(), f"{name}/{file}"
        assert verify(other).problems == ()
    # As other ranks, too: one on each node, where four had been.
    trained(nodes, [first, second], 3, num_ranks=2)
    assert [name for name, _ in list_checkpoints(first / "runs/run/checkpoints")][-1] == "epoch-0003"


def wait_for(what: Path, pattern: str, processes: list[BaseProcess]) -> None:
    deadline_s = time.monotonic() + 60
    while not list(what.glob(pattern)):
        assert time.monotonic() < deadline_s, f"{pattern} did not come"
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("down_s", "timeout_s", "goes_on"), [(20.0, 120.0, True), (8.0, 4.0, False)], ids=["20s", "longer-than-a-save-may"]
)
def test_no_bad_checkpoint_when_the_cable_is_out_while_one_is_on_its_way(
    tmp_path: Path, nodes: list[Node], down_s: float, timeout_s: float, goes_on: bool
) -> None:
    num_saves = 4
    print("the cable is slow by", {node.slow_down(80) for node in nodes})
    with ranks(2, save_all_the_time, nodes, tmp_path, num_saves, timeout_s) as processes:
        checkpoints = tmp_path / "0/checkpoints"
        wait_for(checkpoints, "step-00000001", processes)
        wait_for(checkpoints, ".tmp-step-00000002-*/*.safetensors", processes)
        nodes[1].unplug()
        assert not (checkpoints / "step-00000002").exists()
        time.sleep(down_s)
        nodes[1].plug_in()
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    names = check_all(checkpoints)
    assert not list(checkpoints.glob(".tmp-*"))
    # Training went on to its last step on both, whatever came of the saves.
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in range(2)] == [str(num_saves)] * 2
    if goes_on:
        assert said == ["done", "done"]
        assert len(names) == num_saves
    else:
        assert names == ["step-00000001"]
        assert all("the last checkpoint could not be written" in each for each in said), said
