"""What only a device can show: that logging never waits for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harness.metrics.reducer import Reducer, WeightedSums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_synchronises_when_device_tensors_are_logged(no_synchronisation: None) -> None:
    sums, reducer = WeightedSums(), Reducer(None, ())
    values = torch.arange(600, device="cuda", dtype=torch.float32).unbind()
    for value in values:
        sums.add({"train/loss": value}, weight=2.0)
    reducer.start(sums, 600, {})
    torch.cuda.set_sync_debug_mode("default")
    reduced = reducer.finish()
    assert reduced is not None and reduced.values == {"train/loss": 299.5}
