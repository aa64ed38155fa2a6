"""What autologging costs an Accelerate loop that knows nothing of it: the same loop with and without, in one run.

    python benchmarks/autolog_overhead.py --json                 one process
    accelerate launch ... benchmarks/autolog_overhead.py --json  several

Short windows of each kind take turns (ABBA) over the same model, as in `loop_overhead`, whose figures these are too.
With: all functions are replaced, each loss is logged, each epoch ends with its metrics reduced and appended to the
run's history. Without: they are put back, and the loop runs as accelerate alone has it, but for two hooks on the
optimizer's step that stay (1 us). Checkpoints are another benchmark's (`checkpoint`), and MLflow another process's.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from loop_overhead import Times, by_hand, figures, rounds, tasks

from harness.autologging.settings import Settings
from harness.autologging.switch import Switch
from harness.config import CheckpointConfig, TrackingConfig, TrainerConfig
from harness.runtime import start, strategy_of
from harness.task import Task

_EPOCHS = 3


def measure(accelerator: Any, name: str, task: Task, num_rounds: int, directory: Path) -> list[tuple[Times, Times]]:
    """Times of some rounds, over a model of their own."""
    settings = Settings(
        CheckpointConfig(every_n_epochs=None, save_last=False),
        TrackingConfig(enabled=False, log_every_n_steps=None),
        run_name=name,
        run_dir=str(directory),
    )
    switch = Switch(settings)
    switch.turn_on()
    set_seed(0)
    model = task.model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, task.train_data())

    def timed(window: Callable[[], None]) -> Times:
        accelerator.wait_for_everyone()
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        window()
        return Times(time.perf_counter() - begun_s, time.process_time() - begun_cpu_s)

    def logged() -> Times:
        switch._replacements.put()
        return timed(lambda: by_hand(accelerator, task, model, optimizer, loader))

    def plain() -> Times:
        switch._replacements.take_away()
        return timed(lambda: by_hand(accelerator, task, model, optimizer, loader))

    list(rounds(logged, plain, 1))  # warm
    times = list(rounds(logged, plain, num_rounds))
    assert switch.session.logger is not None
    assert switch.session.logger.epoch >= _EPOCHS * (2 * num_rounds - 1)
    switch.turn_off()
    accelerator.free_memory()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="ratio of an autologged loop's time to that of the loop alone")
    parser.add_argument("--task", choices=sorted(tasks()), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="in all, of two windows of each kind")
    parser.add_argument("--repeats", type=int, default=4, help="the rounds are over so many models in turn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = start(TrainerConfig(), seed=0)
    results = []
    for name in arguments.task or sorted(tasks()):
        times: list[tuple[Times, Times]] = []
        task = tasks()[name]
        steps_per_window = _EPOCHS * (len(task.train_data()) // accelerator.num_processes)
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as directory:
                times += measure(accelerator, name, task, arguments.rounds // arguments.repeats, Path(directory))
        results.append(figures(name, steps_per_window, times))
    if not accelerator.is_main_process:
        return
    record = {
        "benchmark": "autolog_overhead",
        "strategy": strategy_of(accelerator),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "machine": f"{platform.machine()}, {platform.processor() or 'CPU'}, {torch.get_num_threads()} thread(s)",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "results": results,
    }
    if arguments.json:
        print(json.dumps(record, indent=2))
        return
    for result in results:
        low, high = result["ratio_95"]
        print(
            f"{result['task']:8} {record['strategy']} x {record['num_processes']}: with / without "
            f"{result['ratio']:.4f} (95 %: {low:.4f} to {high:.4f}), step {result['step_by_hand_ms']:.2f} ms"
        )


if __name__ == "__main__":
    sys.exit(main())
