"""Hold the state of one rank: random numbers, position in the data, logged values that are not yet reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.format.json_values import decode, encode
from harness.data import rng_state
from harness.data.resumable_loader import DataState


@dataclass(frozen=True)
class RankState:
    """Hold the state of one rank.

    Args:
        random: states of the random generators after the step, from `rng_state.capture`.
        data: position in the data.
        sums: name -> (sum, weight) of the values logged since the last reduction.
    """

    random: dict[str, Any]
    data: DataState = field(default_factory=DataState)
    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def encoded(self) -> dict[str, Any]:
        """Encode the state as JSON values. Any thread."""
        return {
            "random": rng_state.encode(self.random),
            "data": self.data.to_json(),
            "sums": {name: encode(list(pair)) for name, pair in self.sums.items()},
        }


def restored_state(records: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> RankState | None:
    """Decode this rank's state from the encoded states of all saving ranks; None if the number of ranks differs."""
    if len(records) != world_size:
        return None
    record = records[rank]
    return RankState(rng_state.decode(record["random"]), DataState.from_json(record["data"]), sums_of([record]))


def shared_data_state(records: Sequence[Mapping[str, Any]]) -> DataState:
    """Return the data state for a different number of ranks: the generators of the order, which all ranks share."""
    return DataState(generators=DataState.from_json(records[0]["data"]).generators) if records else DataState()


def sums_of(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Add up the sums and weights of the values that these ranks had logged."""
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        for name, pair in record["sums"].items():
            total, weight = decode(pair)
            old_total, old_weight = found.get(name, (0.0, 0.0))
            found[name] = (old_total + total, old_weight + weight)
    return found
