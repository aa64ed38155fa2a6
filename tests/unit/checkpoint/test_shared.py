from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.agreement import Agreement
from harness.checkpoint.commit import MANIFEST
from harness.checkpoint.shared import Sight, read_shared_manifest, require_seen
from harness.errors import CheckpointError, DamagedError

PATH = Path("/runs/it/checkpoints/epoch-0001")


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([Sight("b", None)], "rank 1 on b does not see it, which rank 0 on a does; resuming needs a directory that"),
        ([Sight("a", "k"), Sight("b", "other")], "rank 2 on b sees another checkpoint there"),
        ([Sight("b", None), Sight("b", None), Sight("c", None)], r"rank 1 on b \(and 2 more ranks\) does not see it"),
    ],
)
def test_error_names_the_rank_and_its_host_when_it_does_not_see_it(others: list[Sight], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"{PATH}: {said}") as caught:
        require_seen(PATH, [Sight("a", "k"), *others])
    # With the checkpoint before it would be the same.
    assert not isinstance(caught.value, DamagedError)


def test_nothing_is_refused_when_all_see_the_same() -> None:
    require_seen(PATH, [Sight("a", "k"), Sight("b", "k")])


def test_manifest_is_damaged_or_gone_when_rank_zero_cannot_take_it(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint({"weight": torch.ones(3)})
    assert read_shared_manifest(path, Agreement(0, 1)).key == "key"
    (path / MANIFEST).write_text("{")
    with pytest.raises(DamagedError, match="is damaged"):
        read_shared_manifest(path, Agreement(0, 1))
    (path / MANIFEST).unlink()
    with pytest.raises(DamagedError, match="is gone"):
        read_shared_manifest(path, Agreement(0, 1))
