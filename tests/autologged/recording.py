"""What a script's state was at the end of an epoch's body, by the strategies' own means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tests.distributed.gathered import gather_state

VARIABLE = "RECORD_STATES_IN"


def record(
    accelerator: Accelerator, model: Any, optimizer: Any, epoch: int, more: dict[str, Any] | None = None
) -> None:
    """Keep weights and the optimizer's state, as they are now, where the test asks for it."""
    directory = os.environ.get(VARIABLE)
    if directory is None:
        return
    state = gather_state(accelerator, model, optimizer)
    if accelerator.is_main_process:
        content = {"model": state.model, "optimizer": state.optimizer, **(more or {})}
        torch.save(content, Path(directory) / f"epoch-{epoch + 1:04d}.pt")
