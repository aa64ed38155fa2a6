"""The configuration of a run, as frozen values. Importing this never imports torch.

`RunConfig` is what the YAML file and the command line become (`harness.config.parsing`), and what every
later stage takes. Each rule is checked where the value is made, so that a `RunConfig` that exists
is valid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import ConfigError

# What `harness launch` leaves for its ranks to check against.
NUM_PROCESSES_VARIABLE = "HARNESS_NUM_PROCESSES"

Mode = Literal["min", "max"]
Precision = Literal["fp32", "bf16", "fp16"]


def _at_least(key: str, value: float | None, least: int, remedy: str) -> None:
    if value is not None and value < least:
        raise ConfigError(key, f"must be at least {least}, got {value}; {remedy}")


@dataclass(frozen=True)
class ClassSpec:
    """A class to be built: where it is, and what its constructor is given.

    Args:
        class_path: importable path of the class, such as ``my_project.tasks.Segmentation``.
        init_args: keyword arguments of its constructor.
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when a metric no longer gets better.

    Args:
        monitor: name of the evaluation metric, such as ``eval/loss``.
        mode: ``min`` if smaller is better, ``max`` if larger is.
        patience: number of evaluations without improvement that are tolerated.
    """

    monitor: str
    mode: Mode = "min"
    patience: int = 3

    def __post_init__(self) -> None:
        _at_least("trainer.early_stopping.patience", self.patience, 1, "use 1 to stop at the first")


@dataclass(frozen=True)
class TrainerConfig:
    """The loop.

    Args:
        max_epochs: passes over the training data.
        max_steps: optimizer steps after which training ends, whatever the epoch.
        mixed_precision: fp32, bf16 or fp16 (not `no`, which YAML reads as false).
        gradient_accumulation_steps: batches for each optimizer step.
        max_grad_norm: gradients are clipped to this norm; null: not clipped.
        limit_train_batches: batches of each training epoch; null: all.
        limit_eval_batches: batches of each evaluation; null: all.
        overfit_batches: train again and again on only the first so many batches, not shuffled.
        early_stopping: when to stop before max_epochs; null: never.
        detect_anomaly: torch's anomaly detection; slow, for debugging.
        progress_bar: a progress bar on rank zero, where there is a terminal.
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
# The names that safetensors, and so this configuration, know floating-point types by.
SAVE_DTYPES = ("float32", "bfloat16", "float16")


def parse_size_bytes(key: str, text: str) -> int:
    """Number of bytes in a size such as ``5GB`` (powers of ten, as Hugging Face counts them).

    Raises:
        ConfigError: if the text is no size, or is zero.
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
        every_n_epochs: a checkpoint each so many epochs; null: not by epochs.
        every_n_steps: a checkpoint each so many optimizer steps; null: not by steps.
        save_weights_only: leave out the optimizer and what else only resuming needs.
        dtype: cast floating-point weights to this type when saving: float32, bfloat16 or float16.
        max_shard_size: split the weights into files of at most this size, such as 5GB.
        transport: how bytes reach the disk: every rank writes its own (`direct`), or rank zero writes for
            all (`gather`); auto finds out whether all ranks share a file system on which direct is right;
            `force_direct` takes your word for it (docs/guides/cluster.md has the table).
        when_busy: when the checkpoint before is still being written: skip this one, or wait.
        when_failed: when a checkpoint could not be written (a full disk, say): continue training, or stop.
            At the end of training a missing last checkpoint is an error in either case.
        timeout_s: a checkpoint that is not on disk after so many seconds is given up.
        monitor: the metric that ranks checkpoints, such as eval/loss; null: the newer is the better.
        mode: ``min`` if a smaller monitor is better, ``max`` if a larger is.
        save_top_k: keep so many of the best checkpoints, and always the newest; 0: the newest alone; -1: all.
        save_last: write one at the end of training too, wherever the cadence stands.
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
        _at_least(at + "save_top_k", self.save_top_k, -1, "use -1 to keep all, 0 to keep the newest alone")
        if not self.timeout_s > 0:
            raise ConfigError(at + "timeout_s", f"must be more than 0 seconds, got {self.timeout_s}")

    @property
    def max_shard_size_bytes(self) -> int | None:
        """The limit of one file in bytes, or None for a single file."""
        if self.max_shard_size is None:
            return None
        return parse_size_bytes("checkpoint.max_shard_size", self.max_shard_size)


@dataclass(frozen=True)
class TrackingConfig:
    """What goes to MLflow, and where MLflow is.

    Args:
        enabled: false: no MLflow run at all; metrics and checkpoints stay in the run directory.
        tracking_uri: MLflow server or store; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.
        experiment_name: null: that of MLFLOW_EXPERIMENT_ID, or of MLFLOW_EXPERIMENT_NAME, else `default`.
        log_every_n_steps: metrics are reduced and logged each so many optimizer steps; null: at ends of epochs alone.
        log_every_n_epochs: each so many epochs one's end is logged, its evaluation with it; what a checkpoint holds
            is logged in any case.
        log_models: publish each checkpoint as an MLflow LoggedModel.
        log_resume_state: publish with it what resuming needs, the optimizer's state, twice the weights or more: with
            none, with all, or with the last alone: the one before it loses its own then, where the store can delete.
        log_datasets: record the data sets as inputs of the run.
        log_system_metrics: processor, memory, disk and network of every node, and the job's own GPUs.
        silent: no lines about tracking on the terminal; what goes wrong is in the run's ``outbox/publisher.log``.
        offline: reach no store: all stays in the run's outbox, until `harness sync` delivers it, from any host.
        parent_run: name or id of an MLflow run of the same experiment to nest this one under; one of that name is
            made where there is none, and ends with the last of its children.
        max_upload_rate: files go to the store at no more than this in a second, such as 100MB; null: no limit.
        max_outbox_size: how large the journal of what MLflow gets may grow on disk, such as 2GB. What is delivered
            goes first; where the store is away for so long that all of it waits, metrics are left out and counted.
        registered_model_name: register each published checkpoint under this name; null: do not.
        registered_model_aliases: keep the aliases `last`, and by checkpoint.monitor `best`, on its versions.
        tags: further tags of the run.
        start_timeout_s: how long the store may take to answer at the start.
        drain_timeout_s: how long the end of training waits for what is not yet delivered.
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
                "are those of a registered model; give tracking.registered_model_name too",
            )

    @property
    def max_outbox_bytes(self) -> int:
        """The limit of the journal on disk."""
        return parse_size_bytes("tracking.max_outbox_size", self.max_outbox_size)

    @property
    def max_upload_bytes_per_s(self) -> int | None:
        """The limit of the rate at which files go, or None for no limit."""
        return (
            None if self.max_upload_rate is None else parse_size_bytes("tracking.max_upload_rate", self.max_upload_rate)
        )


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run.

    Args:
        task: what is trained: a class that is a `harness.Task`.
        optimizer: the optimizer's class; it is given the model's parameters.
        scheduler: the learning rate scheduler's class, stepped with the optimizer; null: none.
        seed: of model initialisation, data order and all else that is random.
        run_dir: each run gets a directory of its own in here.
        run_name: name of that directory and of the MLflow run; null: made up.
        resume_from_checkpoint: auto: a run that is there already goes on from its newest checkpoint; never: it
            is refused; or where a new run begins: a checkpoint's directory, a run's, or an address in MLflow
            (``runs:/...``, ``models:/...``).
        initial_weights: what a run that begins takes its weights from: a checkpoint's directory, one as Hugging
            Face has it, or an address in MLflow; null: from the task's model.
        reset_scheduler: where the run goes on, the scheduler takes its own course as it is configured now, from the
            step of the checkpoint on; false: the checkpoint's.
        trainer: the loop.
        checkpoint: when and how checkpoints are written.
        tracking: what goes to MLflow.
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
        ConfigError: if it holds anything but letters, digits, ``.``, ``_`` and ``-``.
    """
    if run_name is not None and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", run_name):
        raise ConfigError("run_name", f"must be letters, digits, '.', '_' and '-' only, got {run_name!r}")
