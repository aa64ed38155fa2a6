"""A training's run is opened: from what the script has prepared, and what was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness.autologging.iterations import TrainedOn
from harness.autologging.script import Arguments, Prepared
from harness.autologging.settings import FURTHER_FILE, AutologSettings
from harness.data import dataloaders
from harness.errors import CheckpointError
from harness.io.durable_files import replace_file
from harness.io.progress import Progress
from harness.tracking import provenance
from harness.tracking.mlflow.given_run import GivenRun
from harness.training.periodic_logger import PeriodicLogger


def open_run(
    settings: AutologSettings,
    prepared: Prepared,
    arguments: Arguments,
    *,
    params: Mapping[str, Any],
    stem: str,
    given: GivenRun | None,
    params_of_runs: dict[str, dict[str, str]],
) -> PeriodicLogger:
    """Start the logger of a training. Collective; main thread; blocks and leaves on disk as `PeriodicLogger.start`.

    Args:
        settings: what was asked for.
        prepared: what the script has prepared.
        arguments: the script's.
        params: parameters that the script has logged already.
        stem: what a made-up name of the run begins with.
        given: the MLflow run that the user has named and that is to be this one; rank zero's.
        params_of_runs: what trainings of this process have logged, by the MLflow run's id; this one's are added.

    Raises:
        HarnessError: on all ranks, if the run's directory or the store cannot be used.
    """
    accelerator = prepared.accelerator
    assert accelerator is not None
    sizes = [dataloaders.global_batch_size(loader, accelerator.num_processes) for loader in prepared.loaders[:1]]
    training = {
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        **({"batch_size": sizes[0]} if sizes and sizes[0] is not None else {}),
    }
    own = {"args": dict(arguments.look())} if arguments.look() else {}
    flat = provenance.flatten_params({**own, **prepared.hyperparameters, "training": training, **params})
    before = params_of_runs.setdefault(given.run_id, {}) if given is not None else {}
    changed = {name: value for name, value in flat.items() if before.get(name, value) != value}
    before.update({name: value for name, value in flat.items() if name not in changed})
    logger = PeriodicLogger(
        accelerator,
        every_n_epochs=settings.checkpoint.every_n_epochs,
        run_name=settings.run_name,
        run_dir=settings.run_dir,
        checkpoint=settings.checkpoint,
        tracking=settings.tracking,
        params={name: value for name, value in flat.items() if name not in changed},
        resume_from_checkpoint=settings.resume_from,
        seeds_workers=False,
        reset_scheduler=settings.reset_scheduler,
    )
    logger.progress = _Quiet() if settings.tracking.silent else logger.progress
    logger.run_name_prefix = stem
    logger.given_run, logger.uses_given_run = given, False
    logger.start()
    if settings.first_run is not None and logger.run_path is not None and accelerator.is_main_process:
        replace_file(logger.run_path / FURTHER_FILE, json.dumps({"first_run": settings.first_run}) + "\n")
    if changed:
        now = ", ".join(f"{name}={value}" for name, value in changed.items())
        logger.say(f"harness: the MLflow run keeps the parameters of the training before, where this one's are {now}")
    return logger


class AutologState:
    """What a run that goes on must know of the passes before: part of each checkpoint.

    Args:
        trained: which passes train.
        prepared: what the script has prepared.

    Attributes:
        optimizer: number of the prepared optimizer that checkpoints are of.
        num_states: saved by `accelerator.save_state` at the checkpoint that the run goes on from; None: it begins.
    """

    def __init__(self, trained: TrainedOn, prepared: Prepared) -> None:
        self._trained = trained
        self._prepared = prepared
        self.optimizer = 0
        self.num_states: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """What is known now."""
        return {
            "trained": self._trained.state(),
            "iterations": [getattr(loader, "iteration", 0) for loader in self._prepared.loaders],
            "optimizer": self.optimizer,
            "num_states": self._num_states,
        }

    @property
    def _num_states(self) -> int:
        accelerator = self._prepared.accelerator
        counted = 0 if accelerator is None else accelerator.project_configuration.iteration
        # Until the script saves again it counts those that are done anew.
        return max(counted, self.num_states or 0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was known at the checkpoint that the run goes on from."""
        self._trained.put_back(state["trained"])
        self.num_states = state["num_states"]
        for loader, iteration in zip(self._prepared.loaders, state["iterations"], strict=False):
            # accelerate seeds a pass's order with it.
            if hasattr(loader, "iteration"):
                loader.iteration = iteration


def require_first_optimizer(state: Mapping[str, Any] | None) -> None:
    """Refuse to go on from a checkpoint of an optimizer that the script makes only later.

    Args:
        state: of the `AutologState` of the run that goes on; None: the run begins.

    Raises:
        CheckpointError: on all ranks alike.
    """
    if state is not None and state["optimizer"] > 0:
        raise CheckpointError(
            f"the checkpoint is of the script's optimizer number {state['optimizer'] + 1}, which it makes in the "
            "middle of its training: that cannot be put back from outside; give another run_name, or write the loop "
            "with PeriodicLogger"
        )


class _Quiet(Progress):
    """Says nothing."""

    def __init__(self) -> None:
        super().__init__(enabled=False)

    def say(self, text: str) -> None:
        """Nothing."""
