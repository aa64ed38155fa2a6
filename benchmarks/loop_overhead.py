"""The overhead of our loop over a hand-written Accelerate loop on the same task, both in one run.

    python benchmarks/loop_overhead.py --json                 one process
    accelerate launch ... benchmarks/loop_overhead.py --json  several

Short windows of each kind alternate (ABBA), so that other load on the machine affects both. The figure is the median
over the rounds of the ratio of their times, with its 95 % bootstrap interval. The hand-written loop is that of
Accelerate's examples, without metrics, checkpoints and tracking. Ours logs the loss of each step, reduces it every
10 steps and appends it to the outbox, as in a usual run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.config.schema import TrainerConfig
from harness.config.task import Task
from harness.distributed.strategies import start
from harness.distributed.topology import strategy_of
from harness.tasks import ByteLM, Digits
from harness.training.fit import fit


def tasks() -> dict[str, Task]:
    """Return the tasks by name, with steps of 4 ms and of 25 ms."""
    return {
        "digits": Digits(),
        "byte_lm": ByteLM(max_text_bytes=10_000, context_length=64, d_model=128, num_layers=2, batch_size=8),
    }


# Several epochs, as a run ends only once.
EPOCHS_PER_WINDOW = 3


def by_hand(accelerator: Any, task: Task, model: Any, optimizer: Any, loader: Any) -> None:
    """Run the hand-written loop."""
    for _ in range(EPOCHS_PER_WINDOW):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = task.step(model, batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


@dataclass(frozen=True)
class Times:
    """Wall time and CPU time of a window, in seconds."""

    wall_s: float
    cpu_s: float

    def __add__(self, other: Times) -> Times:
        return Times(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


# Called with the accelerator, a task's name, the task, the number of rounds, and a directory for the run.
Measure = Callable[[Any, str, Task, int, Path], list[tuple[Times, Times]]]


def timed(accelerator: Any, window: Callable[[], None]) -> Times:
    """Measure one window, which all ranks start together."""
    accelerator.wait_for_everyone()
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    window()
    return Times(time.perf_counter() - begun_s, time.process_time() - begun_cpu_s)


def rounds(ours: Callable[[], Times], theirs: Callable[[], Times], num_rounds: int) -> Iterator[tuple[Times, Times]]:
    """Measure both kinds for each round, in the order ABBA."""
    for _ in range(num_rounds):
        first, second, third, fourth = ours(), theirs(), theirs(), ours()
        yield first + fourth, second + third


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def measure(accelerator: Any, name: str, task: Task, num_rounds: int, directory: Path) -> list[tuple[Times, Times]]:
    """Measure some rounds with a new model and logger, since memory placement affects the times."""
    set_seed(0)
    model = task.model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, task.train_data())
    checkpoint = CheckpointConfig(every_n_epochs=None, save_last=False)
    tracking = TrackingConfig(enabled=False)
    with PeriodicLogger(
        accelerator, None, run_name=name, run_dir=directory, checkpoint=checkpoint, tracking=tracking
    ) as logger:
        logger.watch(model, optimizer)

        def ours() -> Times:
            config = TrainerConfig(max_epochs=logger.epoch + EPOCHS_PER_WINDOW, max_grad_norm=1.0)
            return timed(
                accelerator, lambda: fit(accelerator, task, config, logger, model, optimizer, None, loader, None)
            )

        def theirs() -> Times:
            return timed(accelerator, lambda: by_hand(accelerator, task, model, optimizer, loader))

        list(rounds(ours, theirs, 1))  # warm
        times = list(rounds(ours, theirs, num_rounds))
    accelerator.free_memory()
    return times


def figures(name: str, steps_per_window: int, times: list[tuple[Times, Times]]) -> dict[str, Any]:
    """Return one task's figures."""
    ratios = [mine.wall_s / hand.wall_s for mine, hand in times]
    cpu_ratios = [mine.cpu_s / hand.cpu_s for mine, hand in times]
    return {
        "task": name,
        "steps_per_window": steps_per_window,
        "rounds": len(times),
        "step_by_hand_ms": 1e3 * statistics.median(hand.wall_s for _, hand in times) / (2 * steps_per_window),
        "ratio": statistics.median(ratios),
        "ratio_95": interval(ratios),
        # Of processor time: what other processes on the machine do is not in it, nor what waits cost.
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratio_95": interval(cpu_ratios),
    }


def report(benchmark: str, of_what: str, measure: Measure) -> None:
    """Measure the selected tasks and print the figures: the command line of a benchmark.

    Args:
        benchmark: its name.
        of_what: the ratio: ours over theirs.
        measure: gives the times of some rounds of a task.
    """
    parser = argparse.ArgumentParser(description=f"ratio of times: {of_what}")
    parser.add_argument("--task", choices=sorted(tasks()), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="in all, of two windows of each kind")
    parser.add_argument("--repeats", type=int, default=5, help="the rounds are over so many models in turn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = start(TrainerConfig(), seed=0)
    results = []
    for name in arguments.task or sorted(tasks()):
        times: list[tuple[Times, Times]] = []
        task = tasks()[name]
        steps_per_window = EPOCHS_PER_WINDOW * (len(task.train_data()) // accelerator.num_processes)
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as directory:
                num_rounds = arguments.rounds // arguments.repeats
                times += measure(accelerator, name, task, num_rounds, Path(directory))
        results.append(figures(name, steps_per_window, times))
    if not accelerator.is_main_process:
        return
    record = {
        "benchmark": benchmark,
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
            f"{result['task']:8} {record['strategy']} x {record['num_processes']}: {of_what} "
            f"{result['ratio']:.4f} (95 %: {low:.4f} to {high:.4f}), step {result['step_by_hand_ms']:.2f} ms"
        )


if __name__ == "__main__":
    report("loop_overhead", "ours / by hand", measure)
