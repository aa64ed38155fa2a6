from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import settings

# One profile for all: the time of an example says nothing on a machine that other jobs share.
settings.register_profile("unit", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("unit")

torch.set_num_threads(1)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """A real Accelerator of one process, on the CPU."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
