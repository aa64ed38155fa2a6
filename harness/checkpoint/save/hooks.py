"""The interface between a saver and its owner. Importing this never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from harness.checkpoint.format.commit import Manifest
    from harness.checkpoint.state.rank_state import RankState


class CheckpointHooks(Protocol):
    """The owner of a `Saver` and a `Retention`; the training package implements it.

    Effects: `capture_rank_state` runs in the main thread of every rank that saves. The others run in rank 0's
    checkpoint thread; they are not collective, and may block on the disk.
    """

    def capture_rank_state(self) -> RankState:
        """Return this rank's own state as it is now. Called once for each save that training can be resumed from."""

    def on_checkpoint_committing(self) -> None:
        """Make durable what has to be on disk before the checkpoint is. The checkpoint is committed next.

        Raises:
            Exception: the checkpoint is not committed.
        """

    def on_checkpoint_committed(self, name: str, manifest: Manifest) -> None:
        """Publish a checkpoint that is durable.

        Raises:
            Exception: the checkpoint stays, and the status of the save has the error.
        """

    def on_checkpoint_retired(self, name: str, key: str) -> None:
        """Record that the checkpoint `name` is removed next; `key` is its manifest's.

        Raises:
            HarnessError, OSError: the checkpoint is not removed.
        """


@dataclass(frozen=True)
class RunFacts:
    """What a run's manifests record of it.

    Args:
        topology: the strategy and the number of ranks, by name.
        versions: of the libraries, by name.
    """

    topology: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
