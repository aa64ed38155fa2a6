"""Display the progress on rank 0: a bar on a terminal, else one line for each epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from harness.io.standard_streams import StandardError, flush

# Metrics at the start of an epoch's line; other evaluation metrics follow.
_FIRST = ("train/loss", "eval/loss", "eval/accuracy")
_REDRAW_S = 0.1


class Progress:
    """Displays loss, steps/s, samples/s and the status of the checkpoint. If disabled, only `say` writes.

    Effects: not collective; main thread (`say` any); writes to standard error; does not block.

    Attributes:
        shows_steps: whether a bar is drawn.
    """

    def __init__(self, *, enabled: bool, bar: bool = True) -> None:
        self._enabled = enabled
        self._console = Console(file=cast(IO[str], StandardError()), highlight=False, soft_wrap=True)
        self._bar: RichProgress | None = None
        self._delivery: RichProgress | None = None
        self._task: TaskID | None = None
        self._latest: Mapping[str, float] = {}
        self._redrawn_s = 0.0
        if enabled and bar and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("[dim]{task.fields[checkpoint]}"),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
        self.shows_steps = self._bar is not None

    def watch(self, latest: Mapping[str, float]) -> None:
        """Set the dictionary that contains the latest metrics."""
        self._latest = latest

    def epoch_begins(self, epoch: int, num_batches: int | None) -> None:
        """Show the start of an epoch; the number of batches is None if it is unknown."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._bar.start()
            self._task = self._bar.add_task(f"epoch {epoch + 1}", total=num_batches, numbers="", checkpoint="")

    def step_done(self, num_batches: int, checkpoint_status: str) -> None:
        """Show a completed optimizer step, at most ten times a second."""
        if self._bar is None or self._task is None or time.monotonic() - self._redrawn_s < _REDRAW_S:
            return
        self._redrawn_s = time.monotonic()
        parts = [f"loss {self._latest['train/loss']:.4f}"] if "train/loss" in self._latest else []
        for key, unit in (("perf/steps_per_s", "steps/s"), ("perf/samples_per_s", "samples/s")):
            if key in self._latest:
                parts.append(f"{self._latest[key]:.1f} {unit}")
        self._bar.update(self._task, completed=num_batches, numbers="  ".join(parts), checkpoint=checkpoint_status)
        self._bar.refresh()

    def epoch_done(self, epoch: int, step: int, latest: Mapping[str, float], checkpoint_status: str) -> None:
        """Print the line of a completed epoch."""
        if not self._enabled:
            return
        names = [n for n in _FIRST if n in latest] + sorted(
            n for n in latest if n.startswith("eval/") and n not in _FIRST
        )
        numbers = "  ".join(f"{name} {latest[name]:.4f}" for name in names)
        rate = f"{latest['perf/samples_per_s']:.0f} samples/s" if "perf/samples_per_s" in latest else ""
        self.say(f"epoch {epoch:>3}  step {step:>6}  {numbers}  {rate}  [{checkpoint_status}]")

    def delivering(self, share: float, left: str) -> None:
        """Show the share that the publisher has delivered, while the run drains its outbox."""
        if self._enabled and self._console.is_terminal:
            if self._delivery is None:
                self.stop()
                self._delivery = RichProgress(
                    TextColumn("delivering to MLflow"),
                    BarColumn(bar_width=20),
                    TextColumn("{task.description}"),
                    console=self._console,
                    auto_refresh=False,
                    transient=True,
                )
                self._delivery.start()
                self._delivery.add_task("", total=1.0)
            self._delivery.update(self._delivery.task_ids[0], completed=share, description=left)
            self._delivery.refresh()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        (self._bar.console if self._bar is not None else self._console).print(text, markup=False)

    def stop(self) -> None:
        """Remove the bars."""
        if self._delivery is not None:
            self._delivery.stop()
            self._delivery = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._task = None
            self.shows_steps = False
            flush()
