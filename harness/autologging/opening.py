"""A training's run is opened: from what the script has prepared, and what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import data
from harness.autologging.passes import TrainedOn
from harness.autologging.script import Arguments, Prepared
from harness.autologging.settings import Settings
from harness.errors import CheckpointError
from harness.periodic import PeriodicLogger
from harness.progress import Progress


def open_run(
    settings: Settings,
    prepared: Prepared,
    arguments: Arguments,
    *,
    params: Mapping[str, Any],
    stem: str,
    mlflow_run_id: str | None,
) -> PeriodicLogger:
    """Start the logger of a training. Collective; main thread; blocks and leaves on disk as `PeriodicLogger.start`.

    Args:
        settings: what was asked for.
        prepared: what the script has prepared.
        arguments: the script's.
        params: parameters that the script has logged already.
        stem: what a made-up name of the run begins with.
        mlflow_run_id: of an MLflow run that the script has made and that is to be this one; rank zero's.

    Raises:
        HarnessError: on all ranks, if the run's directory or the store cannot be used.
    """
    accelerator = prepared.accelerator
    assert accelerator is not None
    sizes = [data.samples_per_batch(loader, accelerator.num_processes) for loader in prepared.loaders[:1]]
    training = {
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        **({"batch_size": sizes[0]} if sizes and sizes[0] is not None else {}),
    }
    own = {"args": dict(arguments.look())} if arguments.look() else {}
    logger = PeriodicLogger(
        accelerator,
        every_n_epochs=settings.checkpoint.every_n_epochs,
        run_name=settings.run_name,
        run_dir=settings.run_dir,
        checkpoint=settings.checkpoint,
        tracking=settings.tracking,
        params={**own, **prepared.hyperparameters, "training": training, **params},
        resume_from_checkpoint=settings.resume_from,
        seeds_workers=False,
    )
    logger.progress = _Quiet() if settings.tracking.silent else logger.progress
    logger.stem = stem
    logger.mlflow_run_id = mlflow_run_id
    logger.start()
    return logger


class Memory:
    """What a run that goes on must know of the passes before: part of each checkpoint.

    Args:
        trained: which passes train.
        prepared: what the script has prepared.

    Attributes:
        optimizer: number of the prepared optimizer that checkpoints are of.
    """

    def __init__(self, trained: TrainedOn, prepared: Prepared) -> None:
        self._trained = trained
        self._prepared = prepared
        self.optimizer = 0

    def state_dict(self) -> dict[str, Any]:
        """What is known now."""
        iterations = [getattr(loader, "iteration", 0) for loader in self._prepared.loaders]
        return {"trained": self._trained.state(), "iterations": iterations, "optimizer": self.optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was known at the checkpoint that the run goes on from."""
        self._trained.put_back(state["trained"])
        for loader, iteration in zip(self._prepared.loaders, state["iterations"], strict=False):
            # accelerate seeds a pass's order with it.
            if hasattr(loader, "iteration"):
                loader.iteration = iteration


def require_first_optimizer(state: Mapping[str, Any] | None) -> None:
    """Refuse to go on from a checkpoint of an optimizer that the script makes only later.

    Args:
        state: of the `Memory` of the run that goes on; None: the run begins.

    Raises:
        CheckpointError: on all ranks alike.
    """
    if state is not None and state["optimizer"] > 0:
        raise CheckpointError(
            f"the checkpoint is of the script's optimizer number {state['optimizer'] + 1}, which it makes in the middle "
            "of its training: that cannot be put back from outside; give another run_name, or write the loop with "
            "PeriodicLogger"
        )


class _Quiet(Progress):
    """Says nothing."""

    def __init__(self) -> None:
        super().__init__(enabled=False)

    def say(self, text: str) -> None:
        """Nothing."""
