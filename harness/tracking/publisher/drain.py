"""What MLflow has not had yet, in the terms of who waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.tracking.journal.delivery_state import read_delivered
from harness.tracking.journal.entries import Kind, read_entries
from harness.tracking.journal.heartbeat import sent_bytes
from harness.tracking.journal.segments import journal_end

_MODELS: Final[tuple[Kind, ...]] = ("checkpoint",)


@dataclass(frozen=True)
class Left:
    """What is left, at one moment.

    Args:
        models: checkpoints that are to be published.
        size_bytes: of their files and of the journal.
        share: that is delivered, 0 to 1, of what was left when this was asked first.
    """

    models: int
    size_bytes: int
    share: float

    def __str__(self) -> str:
        models = f", {self.models} checkpoint{'s' * (self.models != 1)} to go" if self.models else ""
        return f"{self.share:.0%} ({self.size_bytes / 1e6:,.1f} MB left{models})"


class Drain:
    """Looks at a run's outbox whose trainer has ended.

    Effects: not collective; any thread; reads small files.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._outbox_dir = run_dir / "outbox"
        done = read_delivered(self._outbox_dir)
        self._models = [
            (entry.end_offset, self._size_bytes(entry.body["name"], entry.body["files"]))
            for entry in read_entries(self._outbox_dir, min(done.models_offset, done.offset), _MODELS)
        ]
        self._sent_bytes = sent_bytes(self._outbox_dir)
        self._journal_bytes = journal_end(self._outbox_dir)
        self._total_bytes = max(1, self._left_bytes())

    def left(self) -> Left:
        """What is left now."""
        left_bytes = self._left_bytes()
        done = read_delivered(self._outbox_dir)
        models = sum(offset > done.models_offset for offset, _ in self._models)
        return Left(models, left_bytes, 1 - left_bytes / self._total_bytes)

    def _left_bytes(self) -> int:
        done = read_delivered(self._outbox_dir)
        waiting = sum(size for offset, size in self._models if offset > done.models_offset)
        acknowledged = sum(size for offset, size in self._models if offset <= done.models_offset)
        # Of the model that is on its way, by the publisher's own count of what has gone.
        on_its_way = max(0, sent_bytes(self._outbox_dir) - self._sent_bytes - acknowledged)
        return max(0, waiting - on_its_way) + self._journal_bytes - done.offset

    def _size_bytes(self, name: str, files: list[str]) -> int:
        directory = self._run_dir / "checkpoints" / name
        return sum((directory / file).stat().st_size for file in files if (directory / file).exists())
