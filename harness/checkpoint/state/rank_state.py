"""What only one rank has at a moment: its random numbers, its place in the data, what it has logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.format.json_values import decode, encode
from harness.data import rng_state
from harness.data.resumable_loader import DataState


@dataclass(frozen=True)
class RankState:
    """Of one rank.

    Args:
        random: random numbers after the step, as `rng_state.capture` returns them.
        data: what else is needed to go on where the data was.
        sums: name -> (sum, weight) of what was logged since metrics were reduced last.
    """

    random: dict[str, Any]
    data: DataState = field(default_factory=DataState)
    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def encoded(self) -> dict[str, Any]:
        """As JSON values; from any thread."""
        return {
            "random": rng_state.encode(self.random),
            "data": self.data.to_json(),
            "sums": {name: encode(list(pair)) for name, pair in self.sums.items()},
        }


def of_rank(records: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> RankState | None:
    """What this rank goes on with; None where the ranks are not as many as they were.

    Args:
        records: of each rank, as `RankState.encoded` made them.
        rank: this rank.
        world_size: number of ranks now.
    """
    if len(records) != world_size:
        return None
    record = records[rank]
    return RankState(rng_state.decode(record["random"]), DataState.from_json(record["data"]), sums_of([record]))


def order_of(records: Sequence[Mapping[str, Any]]) -> DataState:
    """What other ranks than those that saved can go on with: the generators of the order, which all ranks share."""
    return DataState(generators=DataState.from_json(records[0]["data"]).generators) if records else DataState()


def sums_of(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """What these ranks together had logged."""
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        for name, pair in record["sums"].items():
            total, weight = decode(pair)
            had = found.get(name, (0.0, 0.0))
            found[name] = (had[0] + total, had[1] + weight)
    return found
