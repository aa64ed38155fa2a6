"""What autologging costs an unchanged Accelerate loop: the same loop with and without, in one run.

    python benchmarks/autolog_overhead.py --json                 one process
    accelerate launch ... benchmarks/autolog_overhead.py --json  several

Short windows of each kind alternate (ABBA) over the same model, with the statistics of `loop_overhead`. With: all
functions are patched, each loss is logged, and each epoch reduces its metrics and appends them to the run's history.
Without: the patches are removed, except for two hooks on the optimizer's step (1 us). Checkpoints are measured in
`checkpoint`, and MLflow runs in another process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from loop_overhead import EPOCHS_PER_WINDOW, Times, by_hand, report, rounds, timed

from harness.autologging.patcher import Patcher
from harness.autologging.settings import AutologSettings
from harness.config.schema import CheckpointConfig, TrackingConfig
from harness.config.task import Task


def measure(accelerator: Any, name: str, task: Task, num_rounds: int, directory: Path) -> list[tuple[Times, Times]]:
    """Measure some rounds with a new model."""
    settings = AutologSettings(
        CheckpointConfig(every_n_epochs=None, save_last=False),
        TrackingConfig(enabled=False, log_every_n_steps=None),
        run_name=name,
        run_dir=str(directory),
    )
    switch = Patcher(settings)
    switch.turn_on()
    set_seed(0)
    model = task.model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, task.train_data())

    def logged() -> Times:
        switch._replacements.install()
        return timed(accelerator, lambda: by_hand(accelerator, task, model, optimizer, loader))

    def plain() -> Times:
        switch._replacements.remove()
        return timed(accelerator, lambda: by_hand(accelerator, task, model, optimizer, loader))

    list(rounds(logged, plain, 1))  # warm
    times = list(rounds(logged, plain, num_rounds))
    assert switch.session.logger is not None
    assert switch.session.logger.epoch >= EPOCHS_PER_WINDOW * (2 * num_rounds - 1)
    switch.turn_off()
    accelerator.free_memory()
    return times


if __name__ == "__main__":
    report("autolog_overhead", "with / without", measure)
