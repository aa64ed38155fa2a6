"""Hooks of a saver that has no run around it."""

from __future__ import annotations

import torch

from harness.checkpoint.format.commit import Manifest
from harness.checkpoint.save.hooks import CheckpointHooks
from harness.checkpoint.state.rank_state import RankState
from harness.data import rng_state


class NoHooks(CheckpointHooks):
    """Captures the random numbers of the CPU, and publishes nothing."""

    def capture_rank_state(self) -> RankState:
        return RankState(rng_state.capture(torch.device("cpu")))

    def on_checkpoint_committing(self) -> None:
        pass

    def on_checkpoint_committed(self, name: str, manifest: Manifest) -> None:
        pass

    def on_checkpoint_retired(self, name: str, key: str) -> None:
        pass
