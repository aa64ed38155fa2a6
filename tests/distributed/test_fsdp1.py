"""FSDP1 in all its ways: the files are the same, and each goes on with what another has saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.fsdp1_ranks import UPCAST, go_through, prepare_as_a_script, say_what_is_refused
from tests.distributed.test_restore import run, same_files


@pytest.mark.parametrize(
    ("world_size", "ways"),
    [
        (
            2,
            [
                "FULL_SHARD views all",
                "FULL_SHARD flat all",
                "SHARD_GRAD_OP views all",
                "SHARD_GRAD_OP flat all",
                "NO_SHARD views all",
                "NO_SHARD flat all",
            ],
        ),
        (2, ["FULL_SHARD views bf16", "SHARD_GRAD_OP views bf16", "NO_SHARD views bf16"]),
        (4, ["HYBRID_SHARD views all", "_HYBRID_SHARD_ZERO2 views all", "HYBRID_SHARD flat all"]),
        (2, [UPCAST]),
    ],
    ids=["fp32", "bf16", "hybrid", "upcast"],
)
def test_files_and_the_next_step_are_the_same_bit_for_bit_when_another_way_has_saved(
    tmp_path: Path, world_size: int, ways: list[str]
) -> None:
    run(world_size, go_through, tmp_path, ways, "")
    first = tmp_path / ways[0]
    assert not same_files(first / "step-3", first / "step-4")
    for way in ways:
        for name, expected in (("step-3", "step-3"), ("step-4", "step-4"), ("read", "step-3"), ("read-next", "step-4")):
            assert same_files(tmp_path / way / name, first / expected), (way, name)


def test_ranks_say_what_and_why_when_a_state_is_not_understood(tmp_path: Path) -> None:
    run(2, say_what_is_refused, tmp_path)
    for rank in range(2):
        early, turned, factored = (tmp_path / f"said-{rank}").read_text().splitlines()
        remedy = "make the optimizer from the parameters of the prepared model, or set `fsdp_use_orig_params: true`"
        assert remedy in early
        assert turned.startswith("weight: does not lie in C order") and "make it contiguous before" in turned
        assert factored.startswith("SGD: cannot save its state 'rows' of ")


def test_ranks_have_rank_zeros_weights_when_a_script_brings_a_plugin_of_its_own(tmp_path: Path) -> None:
    run(2, prepare_as_a_script, tmp_path)
    mine, theirs = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    expected = list(torch.nn.Linear(3, 2).parameters())
    for other in (mine, theirs):
        assert all(torch.equal(weight, wanted) for weight, wanted in zip(other, expected, strict=True))
