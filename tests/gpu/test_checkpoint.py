"""On CUDA the copy runs on a stream of its own, beside the training's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from harness.checkpoint.format.verify import require_whole
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from tests.checkpoint_hooks import NoHooks
from tests.distributed.saving_ranks import Counting, Weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
_CYCLES = 200_000_000  # about a tenth of a second


@pytest.mark.parametrize("late", ["before the save", "after the save", "both"])
def test_checkpoint_is_of_its_step_when_the_compute_stream_is_late(tmp_path: Path, late: str) -> None:
    accelerator = Accelerator()
    model = Weights().to(accelerator.device)
    optimizer = Counting(model)
    saver = Saver(accelerator, Collectives(0, 1), CheckpointConfig(when_busy="wait"), tmp_path, RunFacts(), NoHooks())
    saver.check(Watched(model, optimizer, None))
    for step in range(1, 8):
        if late != "after the save":
            torch.cuda._sleep(_CYCLES)
        optimizer.step()
        model.steps.fill_(step)
        begun_s = time.perf_counter()
        saver.save(Moment(f"step-{step:08d}", 0, step, 0, {}))
        call_s = time.perf_counter() - begun_s
        if late != "before the save":
            torch.cuda._sleep(_CYCLES)
        # What forward would do to a buffer, at once.
        model.steps.fill_(-1)
        if step > 2 and late == "before the save":
            assert call_s < 0.05, "the host waited for the device"
    saver.close()
    for step in range(1, 8):
        directory = tmp_path / f"step-{step:08d}"
        require_whole(directory)
        for file in ("model.safetensors", "optimizer.safetensors"):
            for name, tensor in load_file(directory / file).items():
                assert bool((tensor == step).all()), f"{name} is not of step {step}"
