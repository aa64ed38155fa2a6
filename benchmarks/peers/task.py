"""The training task of all peers of `compare_autolog`, its records, and its faults.

The loss is the mean of the samples' own values, whatever the model says: batches are of six samples that are 1 and of
two that are 2, in turn, so that with two ranks one has all the large batches. Then the value of a metric says how it
came about: 1 is rank zero's alone, 1.5 a mean of means, 1.25 the mean over samples. As no gradient comes of it the
weights stay as they were made, and whatever becomes of them can be checked against these.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SIZES, VALUES = (6, 2), (1.0, 2.0)
NUM_INPUTS = 8
SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigkill": signal.SIGKILL}
# Of a metric, each given to the peer as its users would give it.
ODD_VALUES: dict[str, Any] = {
    "nan": float("nan"),
    "inf": float("inf"),
    "text": "good",
    "none": None,
    "yes": True,
    "tensor": torch.tensor([3.0]),
    "array": torch.tensor([4.0]).numpy(),
    "several": torch.tensor([1.0, 2.0]),
}


def options() -> argparse.Namespace:
    """Parse the benchmark's options; unknown ones are the launcher's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of an epoch, on each rank")
    parser.add_argument("--pace_s", type=float, default=0.0, help="that a step takes at least")
    parser.add_argument("--fails", default="", help="how, at step `--fails_at`")
    parser.add_argument("--fails_at", type=int, default=0)
    parser.add_argument("--save_freq", default="epoch", help="MLflow's `checkpoint_save_freq`")
    parser.add_argument("--odd_values", action="store_true")
    parser.add_argument("--loop", default="", help="MLflow's autologging beside a loop of one's own")
    return parser.parse_known_args()[0]


class Net(nn.Module):
    """Return a small model, equal in each process."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(17)
            self.first = nn.Linear(NUM_INPUTS, 32)
            self.last = nn.Linear(32, 1)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.last(torch.relu(self.first(inputs)))
        return {"loss": labels.mean() + 0.0 * outputs.sum(), "logits": outputs}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, num_batches: int) -> None:
        self.values = [VALUES[batch % 2] for batch in range(num_batches) for _ in range(SIZES[batch % 2])]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": torch.full((NUM_INPUTS,), index / 100), "labels": torch.tensor(self.values[index])}


class Batches:
    """Batches of six and two samples in turn; every `world`-th from `rank` if the framework does not divide them."""

    drop_last = False

    def __init__(self, num_batches: int, rank: int = 0, world: int = 1) -> None:
        ends = [sum(SIZES[i % 2] for i in range(batch + 1)) for batch in range(num_batches)]
        all_of_them = [list(range(end - SIZES[i % 2], end)) for i, end in enumerate(ends)]
        self.batches = all_of_them[rank::world]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def loader(num_steps: int, world: int, rank: int | None = None) -> DataLoader[Any]:
    """Return the loader of all ranks' batches, or of one rank's."""
    num_batches = num_steps * world
    batches = Batches(num_batches) if rank is None else Batches(num_batches, rank, world)
    return DataLoader(Rows(num_batches), batch_sampler=batches)  # type: ignore[arg-type]


class Notes:
    """Records each step of one rank in ``rank-<rank>.jsonl``, and causes the fault of the step."""

    def __init__(self, asked: argparse.Namespace, rank: int) -> None:
        self._asked = asked
        self._rank = rank
        self._path = Path(f"rank-{rank}.jsonl")
        self.write(step=0)

    def write(self, **what: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"time_s": time.time(), **what}) + "\n")

    def step(self, step: int) -> None:
        """Record a step, counted from 1."""
        self.write(step=step)
        time.sleep(self._asked.pace_s)
        if self._asked.fails_at != step:
            return
        if self._asked.fails == "raise":
            raise RuntimeError("the disk of this data set fell out")
        if self._asked.fails == "exit":
            sys.exit(3)
        if self._rank == 0:
            os.kill(os.getpid(), SIGNALS[self._asked.fails])

    def odd_values(self, step: int, log: Any) -> None:
        """Log each value that is not finite after the second step, if the option is set."""
        if not self._asked.odd_values or step != 2:
            return
        for name, value in ODD_VALUES.items():
            try:
                log(f"odd_{name}", value)
            except Exception as error:
                self.write(step=step, odd=name, raised=type(error).__name__)
