"""Lightning's `fit`: with its `MLFlowLogger`, or under MLflow's autologging."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import task
from benchmarks.peers.lightning_module import PACKAGE, Module, pl
from harness.distributed import cpu_strategies

asked = task.options()
is_autologged = asked.peer == "mlflow_autolog"
strategies: Any = importlib.import_module(f"{PACKAGE}.strategies")


class Noting(pl.Callback):  # type: ignore[misc]
    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        def log_to_logger(name: str, value: Any) -> None:
            trainer.logger.log_metrics({name: value}, step=trainer.global_step)

        notes.odd_values(trainer.global_step, module.log if is_autologged else log_to_logger)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        notes.step(trainer.global_step)


class DeepSpeedOnCpu(strategies.DeepSpeedStrategy):  # type: ignore[misc]
    """Lightning's strategy without its requirement of CUDA."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def strategy() -> Any:
    if asked.strategy == "fsdp2":
        return strategies.ModelParallelStrategy(2, 1, process_group_backend="gloo")
    if asked.strategy == "zero2":
        cpu_strategies.prepare_deepspeed()
        return DeepSpeedOnCpu(stage=2, process_group_backend="gloo", logging_batch_size_per_gpu=4)
    return strategies.DDPStrategy(process_group_backend="gloo") if asked.strategy == "ddp" else "auto"


logger, callbacks = False, [Noting()]
if is_autologged:
    import mlflow.pytorch

    freq = int(asked.save_freq) if asked.save_freq.isdigit() else asked.save_freq
    # Without these MLflow keeps the best by a `val_loss` that there need not be; "default" leaves it at that.
    saving = {} if freq == "default" else {"checkpoint_save_best_only": False, "checkpoint_save_freq": freq}
    mlflow.pytorch.autolog(log_every_n_step=1, **saving)
else:
    logger = importlib.import_module(f"{PACKAGE}.loggers").MLFlowLogger("compare", log_model="all")
    kept = importlib.import_module(f"{PACKAGE}.callbacks").ModelCheckpoint
    callbacks.append(kept("kept", "{epoch}", save_top_k=-1, save_last=True))
trainer = pl.Trainer(
    max_epochs=asked.epochs,
    accelerator="cpu",
    devices=1 if asked.strategy == "single" else 2,
    strategy=strategy(),
    logger=logger,
    callbacks=callbacks,
    log_every_n_steps=1,
    use_distributed_sampler=False,
    enable_checkpointing=not is_autologged,
    enable_progress_bar=False,
    enable_model_summary=False,
)
notes = task.Notes(asked, trainer.global_rank)
last = Path("kept/last.ckpt")
module = Module(asked.steps, is_sharded=asked.strategy == "fsdp2")
trainer.fit(module, ckpt_path=str(last) if last.exists() else None)
