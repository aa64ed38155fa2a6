"""Train a task. `PeriodicLogger` does all periodic work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.config.cadence import Patience
from harness.config.schema import EarlyStopping, TrainerConfig
from harness.config.task import StepOutput, Task
from harness.distributed.topology import strategy_of
from harness.errors import ConfigError, NonFiniteLossError

if TYPE_CHECKING:
    from harness.training.periodic_logger import PeriodicLogger


def fit(
    accelerator: Accelerator,
    task: Task,
    config: TrainerConfig,
    logger: PeriodicLogger,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    train_loader: Any,
    eval_loader: Any,
) -> None:
    """Train until `max_epochs`, `max_steps` or early stopping.

    Model, optimizer and loaders are prepared; `logger` is started and watches the model. The scheduler (or None) is not
    prepared: it is stepped here, once for each optimizer step.

    Effects: collective; main thread; writes to disk through `PeriodicLogger`.

    Raises:
        NonFiniteLossError: if the training loss became NaN or infinite.
        ConfigError: if early stopping has no evaluation data, or monitors a metric that does not exist.
    """
    # DeepSpeed clips by its own configuration and returns the norm at no extra cost.
    clips = config.max_grad_norm is not None or accelerator.distributed_type == DistributedType.DEEPSPEED
    patience = _Stopping(config.early_stopping, eval_loader)
    if patience.counter is not None:
        logger.register("early_stopping", patience.counter)
    # Check the reduced loss: unlike a batch's it is the same on all ranks, and needs no device synchronisation.
    logger.on_reduced(_check_finite)
    for _ in logger.epochs(config.max_epochs, config.max_steps):
        model.train()
        for batch in logger.batches(train_loader, config.limit_train_batches):
            with accelerator.accumulate(model):
                output = task.step(model, batch)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    _log_gradient_norm(accelerator, clips, config.max_grad_norm, logger, model)
                optimizer.step()
                if scheduler is not None and accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
            logger.log(_named("train", output), output.weight)
        if eval_loader is not None:
            evaluate(task, config, logger, model, eval_loader)
            if patience.is_exhausted(logger):
                logger.stop()


def evaluate(task: Task, config: TrainerConfig, logger: PeriodicLogger, model: nn.Module, loader: Any) -> None:
    """Evaluate once and store the means in ``logger.latest["eval/..."]``."""
    objects = _eval_metrics(task)
    model.eval()
    with torch.no_grad():
        for batch in logger.eval_batches(loader, config.limit_eval_batches):
            output = task.step(model, batch)
            logger.log(_named("eval", output), output.weight)
            if objects:
                logger.update(objects, output.predictions, output.targets)


def _eval_metrics(task: Task) -> dict[str, Any]:
    make = getattr(task, "eval_metrics", None)
    return {} if make is None else {f"eval/{name}": metric for name, metric in make().items()}


def _named(prefix: str, output: StepOutput) -> dict[str, Tensor | float]:
    return {f"{prefix}/loss": output.loss, **{f"{prefix}/{name}": value for name, value in output.metrics.items()}}


def _log_gradient_norm(
    accelerator: Accelerator, clips: bool, max_norm: float | None, logger: PeriodicLogger, model: nn.Module
) -> None:
    """Clip if configured, and log the norm before clipping at steps at whose end metrics are reduced."""
    is_logged = logger.is_log_step_next
    if clips:
        norm = accelerator.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    elif is_logged:
        # Without clipping the norm costs an extra pass over the gradients.
        if strategy_of(accelerator) == "fsdp1":
            # FSDP1's gradients are local slices in plain tensors; only its own clipping sums over the ranks.
            norm = accelerator.clip_grad_norm_(model.parameters(), math.inf)
        else:
            accelerator.unscale_gradients()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if is_logged and norm is not None:
        logger.log({"train/grad_norm": norm.full_tensor() if isinstance(norm, DTensor) else norm})


def _check_finite(values: Mapping[str, float], step: int) -> None:
    loss = values.get("train/loss")
    if loss is not None and not math.isfinite(loss):
        raise NonFiniteLossError("train/loss", loss, step)


class _Stopping:
    def __init__(self, config: EarlyStopping | None, eval_loader: Any) -> None:
        self._config = config
        self.counter: Patience | None = None
        if config is not None:
            self.counter = Patience(config.mode, config.patience)
            if eval_loader is None:
                raise ConfigError("trainer.early_stopping", "needs evaluation data, and the task has none; use null")

    def is_exhausted(self, logger: PeriodicLogger) -> bool:
        if self._config is None or self.counter is None:
            return False
        if self._config.monitor not in logger.latest:
            known = ", ".join(sorted(name for name in logger.latest if name.startswith("eval/")))
            raise ConfigError(
                "trainer.early_stopping.monitor", f"there is no metric {self._config.monitor!r}; there are {known}"
            )
        return self.counter.is_exhausted_by(logger.latest[self._config.monitor])
