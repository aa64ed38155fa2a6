"""What is put around a loader's batch sampler, and what of it is left afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from harness.data.batch_sampler import IterationPlan
from harness.data.resumable_loader import ResumableLoader


def begins_worker(worker: int) -> None:
    pass


def prepared(**options: Any) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(cpu=True)
    return accelerator, accelerator.prepare(DataLoader(TensorDataset(torch.arange(10)), batch_size=2, **options))


def numbers(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


ALL = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1, "persistent_workers": True, "worker_init_fn": begins_worker}]
)
def test_loader_is_unwrapped_when_closed_within_an_iteration(options: dict[str, Any]) -> None:
    accelerator, loader = prepared(**options)
    base = loader.base_dataloader
    before = dict(vars(base))
    batches = ResumableLoader(accelerator)
    _, iterator = batches.begin(loader, None)
    taken = numbers([next(iterator)])
    assert base.batch_sampler is not before["batch_sampler"]
    batches.close()
    assert taken + numbers(iterator) == numbers(loader) == ALL
    after = vars(base)
    assert {name for name in before if after[name] is not before[name]} <= {"_iterator"}
    if (kept := after["_iterator"]) is not None:
        assert kept._index_sampler is before["batch_sampler"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_copy_is_independent_when_the_loader_is_wrapped(copied: Callable[[Any], Any]) -> None:
    accelerator, loader = prepared()
    base = loader.base_dataloader
    own = base.batch_sampler
    batches = ResumableLoader(accelerator)
    _, iterator = batches.begin(loader, None)
    taken = numbers([next(iterator)])
    other = copied(base)
    assert type(other.batch_sampler) is type(own)
    assert other.batch_sampler is not own
    assert numbers(other) == ALL
    assert taken + numbers(iterator) == ALL


def test_iteration_skips_when_persistent_workers_exist() -> None:
    accelerator, loader = prepared(num_workers=1, persistent_workers=True)
    assert numbers(loader) == ALL
    batches = ResumableLoader(accelerator)
    sampler = batches.wrap_sampler(loader)
    assert sampler is not None
    sampler.plan = IterationPlan(num_skipped=3)
    assert numbers(loader) == ALL[3:]
    assert numbers(loader) == ALL
    batches.close()
