"""The composition root: builds a run from its configuration. Only this file knows all parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from harness.config import instantiate
from harness.config.schema import RunConfig
from harness.config.task import Task
from harness.data import dataloaders, memory_layout
from harness.distributed import model_preparation, strategies
from harness.distributed.global_batch import plan_batches
from harness.distributed.topology import strategy_of
from harness.io.progress import Progress
from harness.run.directory import write_config
from harness.training.fit import fit
from harness.training.periodic_logger import PeriodicLogger


def train(config: RunConfig) -> PeriodicLogger:
    """Train as configured, on the ranks that the launcher started.

    Effects: collective; main thread; returns when all is trained, written and, on rank zero, delivered; leaves
    ``<run_dir>/<run_name>/``.

    Raises:
        HarnessError: if a failure is one that a user can fix; its message is one line.
    """
    # Configuration errors are raised before an MLflow run is created.
    set_seed(config.seed)
    task = instantiate.build_task(config.task)
    instantiate.check_optimization(config)
    accelerator = strategies.start(config.trainer, config.seed)
    with make_logger(accelerator, config) as logger:
        if accelerator.is_main_process and logger.run_path is not None:
            write_config(logger.run_path, config)
        model, optimizer, scheduler, train_loader, eval_loader = prepare(accelerator, task, config, logger)
        logger.watch(model, optimizer, scheduler)
        with torch.autograd.set_detect_anomaly(config.trainer.detect_anomaly):
            fit(accelerator, task, config.trainer, logger, model, optimizer, scheduler, train_loader, eval_loader)
    return logger


def make_logger(accelerator: Accelerator, config: RunConfig) -> PeriodicLogger:
    """Return the configured periodic logger, not started."""
    logger = PeriodicLogger(
        accelerator,
        every_n_epochs=config.checkpoint.every_n_epochs,
        run_name=config.run_name,
        run_dir=config.run_dir,
        checkpoint=config.checkpoint,
        tracking=config.tracking,
        resume_from_checkpoint=config.resume_from_checkpoint,
        initial_weights=config.initial_weights,
        reset_scheduler=config.reset_scheduler,
        params=replace(config, tracking=replace(config.tracking, tracking_uri=None)),
    )
    logger.progress = Progress(enabled=accelerator.is_main_process, bar=config.trainer.progress_bar)
    logger.progress.watch(logger.latest)
    return logger


def prepare(
    accelerator: Accelerator, task: Task, config: RunConfig, logger: PeriodicLogger
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any, Any, Any]:
    """Build model, optimizer, scheduler and loaders, and prepare them with accelerate.

    A run that is resumed on another number of ranks keeps its global batch if that number divides it.

    Effects: collective; main thread; blocks until the ranks have the same model; nothing on disk.
    """
    trainer, world_size = config.trainer, accelerator.num_processes
    train_loader, eval_loader = task.train_data(), task.eval_data()
    dataloaders.check_size(train_loader, world_size, "training")
    if eval_loader is not None:
        dataloaders.check_size(eval_loader, world_size, "evaluation")
    if trainer.overfit_batches is not None:
        train_loader = dataloaders.first_batches(train_loader, trainer.overfit_batches * world_size)
    train_loader = _keep_global_batch(accelerator, train_loader, logger)
    # Seed again, so that the model does not depend on how many random numbers the data used.
    set_seed(config.seed)
    model = task.model()
    model_preparation.check_mixed_precision(accelerator, model)
    if strategy_of(accelerator) == "ddp":
        model_preparation.check_ddp_tensors(accelerator, model)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        memory_layout.make_contiguous(model)
    axes = task.dynamic_axes() if hasattr(task, "dynamic_axes") else None
    logger.describe(config.task, model, getattr(task, "input_example", None), axes)
    optimizer = instantiate.build_optimizer(config.optimizer, model)
    scheduler = instantiate.build_scheduler(config.scheduler, optimizer)
    model_preparation.separate_embeddings(accelerator, model)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    model_preparation.cast_inputs(accelerator, model)
    if eval_loader is not None:
        eval_loader = accelerator.prepare(eval_loader)
    # From here on the ranks have different, repeatable random numbers (dropout).
    set_seed(config.seed, device_specific=True)
    return model, optimizer, scheduler, train_loader, eval_loader


def _keep_global_batch(accelerator: Accelerator, loader: Any, logger: PeriodicLogger) -> Any:
    """Set the batch size and the accumulation that keep the resumed run's global batch.

    With the same number of ranks the configuration applies: it is unchanged, or was changed on purpose.
    """
    world_size, accumulation = accelerator.num_processes, accelerator.gradient_accumulation_steps
    if logger.previous_batch is None or logger.previous_batch.world_size == world_size or loader.batch_size is None:
        return loader
    before = logger.previous_batch.num_samples
    now = world_size * loader.batch_size * accumulation
    if now == before:
        return loader
    plan = plan_batches(before, world_size, loader.batch_size, accumulation)
    if not plan.keeps_global_batch:
        logger.say(
            f"harness: warning: an optimizer step now takes {now} samples; before the resume it took {before}, which "
            f"cannot be divided among {world_size} ranks; to keep it, use a number of ranks that divides {before}"
        )
        return loader
    logger.say(
        f"an optimizer step takes {before} samples, as before: {world_size} ranks x {plan.batch_size} x "
        f"{plan.accumulation} accumulated (configured: {loader.batch_size} x {accumulation})"
    )
    accelerator.gradient_accumulation_steps = plan.accumulation
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed's engine is built from this configuration and counts batches itself.
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_accumulation_steps"] = plan.accumulation
    return loader if plan.batch_size == loader.batch_size else dataloaders.with_batch_size(loader, plan.batch_size)
