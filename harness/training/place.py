"""Where training stands: what is complete, and whether it goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingPosition:
    """Counted alike by every rank.

    Attributes:
        epoch: epochs that are complete.
        step: optimizer steps that are complete.
        samples_per_batch: of the loader that is iterated over, all ranks together; None: not known.
        is_stopped: whether training was ended before its last epoch, for good.
    """

    epoch: int = 0
    step: int = 0
    samples_per_batch: int | None = None
    is_stopped: bool = False

    @property
    def step_name(self) -> str:
        """Of a checkpoint that is taken here by steps."""
        return f"step-{self.step:08d}"
