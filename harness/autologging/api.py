"""`harness.autolog` and `harness.resume`: what a script, or `harness run`, calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from harness.autologging.settings import AutologSettings, first_run_of, script_name
from harness.config.schema import CheckpointConfig, Mode, check_run_name
from harness.errors import ConfigError

_settings = AutologSettings()


def autolog(
    every_n_epochs: int | None = 5,
    log_models: bool = True,
    log_datasets: bool = True,
    log_every_n_steps: int | None = None,
    monitor: str | None = None,
    mode: Mode = "min",
    save_top_k: int = -1,
    registered_model_name: str | None = None,
    extra_tags: Mapping[str, str] | None = None,
    disable: bool = False,
    silent: bool = False,
    exclusive: bool = False,
    when_busy: Literal["wait", "skip"] = "wait",
) -> None:
    """Log and save what an Accelerate script trains, without another line in it.

    From what the script prepares and does the run has its parameters, `train/loss`, learning rate and speed, its data
    sets and where it came from, and each so many epochs a checkpoint: weights in safetensors, with the optimizer's
    state. An epoch is one pass over the loader that is trained on. What the script logs itself lands in the same run.

    Effects: imports torch and accelerate, and replaces methods of theirs (see docs/reference/autolog.md) until it is
    called with `disable`. Every rank calls it alike, from the main thread, before the script's ``Accelerator()``.
    What the training then does is as with `PeriodicLogger`; leaves ``runs/<run_name>/``.

    Args:
        every_n_epochs: a checkpoint each so many epochs, and one at the end; None: at the end alone.
        log_models: publish each checkpoint as an MLflow LoggedModel; False: they are on disk alone.
        log_datasets: record the data sets as inputs of the run.
        log_every_n_steps: log metrics each so many optimizer steps too; None: at ends of epochs alone.
        monitor: the metric that ranks checkpoints, the script's own included; None: the newer is the better.
        mode: ``min`` if a smaller monitor is better, ``max`` if a larger is.
        save_top_k: keep so many of the best checkpoints, and always the newest; 0: the newest alone; -1: all.
        registered_model_name: register each published checkpoint under this name.
        extra_tags: further tags of the run.
        disable: end autologging: nothing is replaced any more, and a training that runs is logged no further.
        silent: no lines about it on the terminal.
        exclusive: make a run of our own, where the script has an active MLflow run.
        when_busy: when an epoch's checkpoint is due and the one before is not on disk yet: ``wait`` until it is, or
            ``skip`` this one, with a line. Only epochs that are shorter than a save see a difference.

    Raises:
        ConfigError: if a value breaks a rule.
    """
    global _settings
    from harness.autologging.patcher import turn_off, turn_on

    if disable:
        turn_off()
        _settings = AutologSettings()
        return
    checkpoint = CheckpointConfig(
        every_n_epochs=every_n_epochs, monitor=monitor, mode=mode, save_top_k=save_top_k, when_busy=when_busy
    )
    tracking = replace(
        _settings.tracking,
        log_every_n_steps=log_every_n_steps,
        log_models=log_models,
        log_datasets=log_datasets,
        registered_model_name=registered_model_name,
        tags=dict(extra_tags or {}),
        silent=silent,
    )
    _settings = replace(_settings, checkpoint=checkpoint, tracking=tracking, exclusive=exclusive)
    turn_on(_settings)


def resume(
    resume_from: str = "auto",
    *,
    run_name: str | None = None,
    run_dir: str | Path = "runs",
    experiment_name: str | None = None,
    reset_scheduler: bool = False,
) -> None:
    """Have an autologged script go on in the run of this name, where there is one, or begin from a checkpoint.

    After the script's `accelerator.prepare` its model, optimizer and scheduler are as they were. The script itself
    still counts its epochs from the first: those that are done go by with one batch each that changes nothing, and
    what it logs meanwhile is left out; docs/guides/any-script.md says how far that goes.

    Effects: none by itself: it says how `autolog` runs; before or after that, before the script's first batch.

    Args:
        resume_from: ``auto``: go on with the run of this name, or begin it; ``never``: a run that is there is
            refused; a run's directory, such as ``runs/vit``: go on with that; or a checkpoint's directory, or an
            address in MLflow, where a new run begins, of the first training if there are several.
        run_name: name of the run and of its directory; None: the script's. The run of a second training in the same
            process is ``<run_name>-2``, and so on.
        run_dir: the directory that the runs' directories are in.
        experiment_name: the MLflow experiment; None: that of ``MLFLOW_EXPERIMENT_ID``, which `mlflow.set_experiment`
            sets, or of ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
        reset_scheduler: where a run goes on, take the scheduler's course as the script makes it now (more epochs, say);
            False: the checkpoint's.

    Raises:
        ConfigError: if a value breaks a rule.
    """
    global _settings
    from harness.autologging import patcher

    if not resume_from:
        raise ConfigError("resume_from", "must be auto, never, a path or an address in MLflow, got ''")
    check_run_name(run_name)
    path = Path(resume_from)
    if run_name is None and (path / "run.json").exists():
        # The script begins with its first training, whichever is meant.
        path = first_run_of(path)
        run_name, run_dir, resume_from = path.resolve().name, path.resolve().parent, "auto"
    if run_name is None and resume_from == "auto":
        run_name = script_name()
    tracking: Any = replace(_settings.tracking, experiment_name=experiment_name)
    _settings = replace(
        _settings,
        tracking=tracking,
        run_name=run_name,
        run_dir=str(run_dir),
        resume_from=resume_from,
        reset_scheduler=reset_scheduler,
    )
    patcher.change(_settings)
