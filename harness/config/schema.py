"""Define the configuration of a run as frozen dataclasses. Importing this never imports torch.

`harness.config.parsing` creates a `RunConfig` from YAML and the command line, and prints these docstrings as
``--help``. Each class checks its values when it is constructed, so every `RunConfig` is valid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import ConfigError

# The number of processes that `harness launch` requested; each rank compares it with its world size.
NUM_PROCESSES_VARIABLE = "HARNESS_NUM_PROCESSES"

Mode = Literal["min", "max"]
Precision = Literal["fp32", "bf16", "fp16"]


def _at_least(key: str, value: float | None, least: int, remedy: str) -> None:
    if value is not None and value < least:
        raise ConfigError(key, f"must be at least {least}, got {value}; {remedy}")


@dataclass(frozen=True)
class ClassSpec:
    """A class and the arguments of its constructor.

    Args:
        class_path: import path, such as ``my_project.tasks.Segmentation``.
        init_args: keyword arguments.
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when a metric no longer improves.

    Args:
        monitor: name of the evaluation metric, such as ``eval/loss``.
        mode: ``min`` if a smaller value is better, ``max`` if a larger value is.
        patience: number of evaluations without improvement after which training stops.
    """

    monitor: str
    mode: Mode = "min"
    patience: int = 3

    def __post_init__(self) -> None:
        _at_least("trainer.early_stopping.patience", self.patience, 1, "use 1 to stop at the first")


@dataclass(frozen=True)
class TrainerConfig:
    """The training loop.

    Args:
        max_epochs: passes over the training data.
        max_steps: optimizer steps after which training ends, in any epoch; null: no limit.
        mixed_precision: fp32, bf16 or fp16 (not `no`, which YAML reads as false).
        gradient_accumulation_steps: batches per optimizer step.
        max_grad_norm: norm to which gradients are clipped; null: no clipping.
        limit_train_batches: batches of each training epoch; null: all.
        limit_eval_batches: batches of each evaluation; null: all.
        overfit_batches: train on this number of leading batches only, without shuffling; null: on all.
        early_stopping: when to stop before max_epochs; null: never.
        detect_anomaly: enable torch's anomaly detection, which is slow; for debugging.
        progress_bar: show a progress bar on rank zero, if it has a terminal.
    """

    max_epochs: int = 20
    max_steps: int | None = None
    mixed_precision: Precision = "fp32"
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    limit_train_batches: int | None = None
    limit_eval_batches: int | None = None
    overfit_batches: int | None = None
    early_stopping: EarlyStopping | None = None
    detect_anomaly: bool = False
    progress_bar: bool = True

    def __post_init__(self) -> None:
        at = "trainer."
        _at_least(at + "max_epochs", self.max_epochs, 1, "use 1 for a single pass over the data")
        _at_least(at + "max_steps", self.max_steps, 1, "use null for no limit")
        _at_least(at + "gradient_accumulation_steps", self.gradient_accumulation_steps, 1, "use 1 for none")
        _at_least(at + "limit_train_batches", self.limit_train_batches, 1, "use null for all batches")
        _at_least(at + "limit_eval_batches", self.limit_eval_batches, 1, "use null for all batches")
        _at_least(at + "overfit_batches", self.overfit_batches, 1, "use null for ordinary training")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(
                at + "max_grad_norm", f"must be more than 0, got {self.max_grad_norm}; use null for no clipping"
            )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)", re.IGNORECASE)
_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# The names of floating-point types in safetensors.
SAVE_DTYPES = ("float32", "bfloat16", "float16")


def parse_size_bytes(key: str, text: str) -> int:
    """Return the number of bytes in a size such as ``5GB`` (powers of ten, as in Hugging Face's libraries).

    Raises:
        ConfigError: if the text is not a size, or the size is zero.
    """
    match = _SIZE.fullmatch(text.strip())
    size_bytes = int(float(match[1]) * _SIZE_UNITS[match[2].upper()]) if match else 0
    if size_bytes < 1:
        raise ConfigError(key, f"must be a size such as 500MB or 5GB, got {text!r}")
    return size_bytes


@dataclass(frozen=True)
class CheckpointConfig:
    """When and how checkpoints are written.

    Args:
        every_n_epochs: number of epochs between checkpoints; null: none by epochs.
        every_n_steps: number of optimizer steps between checkpoints; null: none by steps.
        save_weights_only: omit the optimizer and all other state that only a resume needs.
        dtype: cast floating-point weights to this type when saving: float32, bfloat16 or float16; null: no cast.
        max_shard_size: split the weights into files of at most this size, such as 5GB; null: one file.
        transport: `direct`: each rank writes its own bytes; `gather`: rank zero writes those of all ranks; `auto`:
            direct if all ranks share a file system that supports it, else gather; `force_direct`: direct without that
            check (docs/guides/cluster.md has the table).
        when_busy: while the previous checkpoint is still being written: skip the new one, or wait.
        when_failed: if a checkpoint could not be written, for example to a full disk: continue training, or stop. A
            missing last checkpoint is an error at the end of training in either case.
        timeout_s: seconds after which a checkpoint that is not complete on disk is aborted.
        monitor: metric by which checkpoints are compared, such as eval/loss; null: a newer one is better.
        mode: ``min`` if a smaller monitor is better, ``max`` if a larger one is.
        save_top_k: number of best checkpoints to keep, beside the newest; 0: only the newest; -1: all.
        save_last: write a checkpoint at the end of training too, even if none is due.
    """

    every_n_epochs: int | None = 5
    every_n_steps: int | None = None
    save_weights_only: bool = False
    dtype: str | None = None
    max_shard_size: str | None = None
    transport: Literal["auto", "direct", "gather", "force_direct"] = "auto"
    when_busy: Literal["skip", "wait"] = "skip"
    when_failed: Literal["continue", "stop"] = "continue"
    timeout_s: float = 1800.0
    monitor: str | None = None
    mode: Mode = "min"
    save_top_k: int = -1
    save_last: bool = True

    def __post_init__(self) -> None:
        at = "checkpoint."
        _at_least(at + "every_n_epochs", self.every_n_epochs, 1, "use 1 to save each epoch, null to save by steps only")
        _at_least(at + "every_n_steps", self.every_n_steps, 1, "use 1 to save each step, null to save by epochs only")
        if self.dtype is not None and self.dtype not in SAVE_DTYPES:
            raise ConfigError(at + "dtype", f"must be one of {', '.join(SAVE_DTYPES)} or null, got {self.dtype!r}")
        if self.max_shard_size is not None:
            parse_size_bytes(at + "max_shard_size", self.max_shard_size)
        _at_least(at + "save_top_k", self.save_top_k, -1, "use -1 to keep all, 0 to keep only the newest")
        if not self.timeout_s > 0:
            raise ConfigError(at + "timeout_s", f"must be more than 0 seconds, got {self.timeout_s}")

    @property
    def max_shard_size_bytes(self) -> int | None:
        """Maximum size of one file; None for a single file of any size."""
        if self.max_shard_size is None:
            return None
        return parse_size_bytes("checkpoint.max_shard_size", self.max_shard_size)


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow is, and what is published there.

    Args:
        enabled: false: no MLflow run; metrics and checkpoints stay in the run directory.
        tracking_uri: MLflow server or store; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.
        experiment_name: null: that of MLFLOW_EXPERIMENT_ID, or of MLFLOW_EXPERIMENT_NAME, else `default`.
        log_every_n_steps: number of optimizer steps over which metrics are reduced and logged; null: log only at the
            ends of epochs.
        log_every_n_epochs: number of epochs between those whose end and evaluation are logged; metrics of a checkpoint
            are always logged.
        log_models: publish each checkpoint as an MLflow LoggedModel.
        log_resume_state: publish the state that a resume needs (twice the size of the weights or more) with none, with
            all, or with only the last LoggedModel; with `last` it is deleted from the previous one, if the store can.
        log_datasets: record the data sets as inputs of the run.
        log_system_metrics: log CPU, memory, disk and network of every node, and the job's GPUs.
        silent: print no lines about tracking; errors are in the run's ``outbox/publisher.log``.
        offline: contact no store: all entries stay in the run's outbox until `harness sync` delivers them, from any
            host.
        parent_run: name or id of an MLflow run of the same experiment to nest this run under. A name without a run
            creates one, which ends with the last of its children.
        max_upload_rate: maximum size of files that are uploaded per second, such as 100MB; null: no limit.
        max_outbox_size: maximum size on disk of the journal for MLflow, such as 2GB. Delivered entries are deleted
            first; if the store is unreachable until it is full, metrics are dropped and counted.
        registered_model_name: register each published checkpoint under this name; null: register none.
        registered_model_aliases: set the aliases `last` and, by checkpoint.monitor, `best` on its versions.
        tags: further tags of the run.
        start_timeout_s: seconds that the store has to answer at the start.
        drain_timeout_s: seconds that the end of training waits for entries that are not delivered yet.
    """

    enabled: bool = True
    tracking_uri: str | None = None
    experiment_name: str | None = None
    log_every_n_steps: int | None = 10
    log_every_n_epochs: int = 1
    log_models: bool = True
    log_resume_state: Literal["none", "last", "all"] = "none"
    log_datasets: bool = True
    log_system_metrics: bool = False
    registered_model_name: str | None = None
    registered_model_aliases: bool = False
    silent: bool = False
    offline: bool = False
    parent_run: str | None = None
    max_upload_rate: str | None = None
    max_outbox_size: str = "2GB"
    tags: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 10.0
    drain_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        at = "tracking."
        _at_least(at + "log_every_n_steps", self.log_every_n_steps, 1, "use 1 to log each step, null for epochs")
        _at_least(at + "log_every_n_epochs", self.log_every_n_epochs, 1, "use 1 to log each epoch")
        if self.max_upload_rate is not None:
            parse_size_bytes(at + "max_upload_rate", self.max_upload_rate)
        if self.max_outbox_bytes < 1_000_000:
            raise ConfigError(at + "max_outbox_size", f"must be at least 1MB, got {self.max_outbox_size}")
        for name in ("start_timeout_s", "drain_timeout_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(at + name, f"must be more than 0 seconds, got {value}")
        if self.log_resume_state not in ("none", "last", "all"):
            raise ConfigError(at + "log_resume_state", f"must be none, last or all, got {self.log_resume_state!r}")
        if self.registered_model_aliases and self.registered_model_name is None:
            raise ConfigError(
                at + "registered_model_aliases",
                "need a registered model; set tracking.registered_model_name too",
            )

    @property
    def max_outbox_bytes(self) -> int:
        """Maximum size of the journal on disk."""
        return parse_size_bytes("tracking.max_outbox_size", self.max_outbox_size)

    @property
    def max_upload_bytes_per_s(self) -> int | None:
        """Maximum rate of uploads; None for no limit."""
        return (
            None if self.max_upload_rate is None else parse_size_bytes("tracking.max_upload_rate", self.max_upload_rate)
        )


@dataclass(frozen=True)
class RunConfig:
    """All values that define a run.

    Args:
        task: class of the task, a `harness.Task`.
        optimizer: class of the optimizer; it gets the model's parameters.
        scheduler: class of the learning rate scheduler, stepped with the optimizer; null: none.
        seed: of model initialisation, data order and all other random numbers.
        run_dir: directory in which each run gets its own.
        run_name: name of that directory and of the MLflow run; null: generated.
        resume_from_checkpoint: auto: resume an existing run from its newest checkpoint; never: refuse an existing run;
            or the source of a new run: the directory of a checkpoint or of a run, or an address in MLflow
            (``runs:/...``, ``models:/...``).
        initial_weights: source of a new run's weights: the directory of a checkpoint or of a Hugging Face model, or an
            address in MLflow; null: the task's model as constructed.
        reset_scheduler: on a resume, apply the scheduler as configured now from the checkpoint's step on; false:
            restore its state.
        trainer: the training loop.
        checkpoint: when and how checkpoints are written.
        tracking: where MLflow is, and what is published there.
    """

    task: ClassSpec
    optimizer: ClassSpec = field(default_factory=lambda: ClassSpec("torch.optim.AdamW", {"lr": 1e-3}))
    scheduler: ClassSpec | None = None
    seed: int = 17
    run_dir: str = "runs"
    run_name: str | None = None
    resume_from_checkpoint: str = "auto"
    initial_weights: str | None = None
    reset_scheduler: bool = False
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be from 0 to 4294967295, got {self.seed}")
        check_run_name(self.run_name)
        if not self.resume_from_checkpoint:
            raise ConfigError("resume_from_checkpoint", "must be auto, never, a path or an address in MLflow, got ''")


def check_run_name(run_name: str | None) -> None:
    """Refuse a run name that cannot be the name of a directory.

    Raises:
        ConfigError: if it contains other characters than letters, digits, ``.``, ``_`` and ``-``.
    """
    if run_name is not None and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", run_name):
        raise ConfigError("run_name", f"must be letters, digits, '.', '_' and '-' only, got {run_name!r}")
