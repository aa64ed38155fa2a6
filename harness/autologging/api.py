"""`harness.autolog` and `harness.resume`, which a script or `harness run` calls."""

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
    """Log and checkpoint the training of an unchanged Accelerate script.

    The run receives the script's parameters and metrics, `train/loss`, learning rate and speed, data sets and
    provenance. A checkpoint every few epochs has weights in safetensors and the optimizer's state. An epoch is one
    iteration over the training loader.

    Effects: imports torch and accelerate, and replaces methods of theirs until it is called with `disable`
    (docs/reference/autolog.md lists them). Every rank calls it alike, from the main thread, before the script's
    ``Accelerator()``. The training then has the effects of `PeriodicLogger`, and creates ``runs/<run_name>/``.

    Args:
        every_n_epochs: epochs between checkpoints, with one more at the end; None for one at the end alone.
        log_models: publish each checkpoint as an MLflow LoggedModel; False to keep checkpoints on disk alone.
        log_datasets: record the data sets as inputs of the run.
        log_every_n_steps: optimizer steps between metrics within an epoch; None for the ends of epochs alone.
        monitor: the metric that ranks checkpoints, which may be the script's own; None to rank newer ones higher.
        mode: ``min`` if a smaller monitor is better, ``max`` if a larger one is.
        save_top_k: number of best checkpoints to keep, beside the newest; 0 for the newest alone; -1 for all.
        registered_model_name: register each published checkpoint under this name.
        extra_tags: further tags of the run.
        disable: end autologging: restore the replaced methods, and end the logging of a training that runs.
        silent: print no lines.
        exclusive: log to a separate run, even if the script has an active MLflow run.
        when_busy: if a checkpoint is due while the previous one is still being written: ``wait`` for it, or ``skip``
            the new one with a message.

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
    """Resume the run of this name in an autologged script, or start from a checkpoint.

    The script's model, optimizer and scheduler are restored after `accelerator.prepare`. The script still counts its
    epochs from the first. Completed epochs are therefore replayed with one batch each and without effect, and what the
    script logs in them is dropped. docs/reference/autolog.md lists the limits.

    Effects: changes the settings of `autolog`; call it before or after that, before the script's first batch.

    Args:
        resume_from: ``auto`` to resume the run of this name, or to begin it; ``never`` to refuse an existing run; a
            run's directory, such as ``runs/vit``, to resume that run; or a checkpoint's directory or address in MLflow,
            from which the first training starts a new run.
        run_name: name of the run and its directory; None for the script's name. The second training of a process uses
            ``<run_name>-2``, and so on.
        run_dir: the directory of all runs.
        experiment_name: the MLflow experiment; None for that of ``MLFLOW_EXPERIMENT_ID`` (set by
            `mlflow.set_experiment`) or of ``MLFLOW_EXPERIMENT_NAME``, or else ``default``.
        reset_scheduler: use the schedule that the script now makes, for example for more epochs; False for the
            checkpoint's.

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
        # The script repeats all its trainings from the first.
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
