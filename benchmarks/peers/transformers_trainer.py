"""Hugging Face's `Trainer` with its `MLflowCallback`, a save each epoch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import MLflowCallback

from benchmarks.peers import task
from harness.distributed import cpu_strategies

asked = task.options()
os.environ["HF_MLFLOW_LOG_ARTIFACTS"] = "1"
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": "auto",
}
if asked.strategy == "fsdp2":
    # On a CPU accelerate would run DDP instead, and it reads version 1 where none is named.
    os.environ.setdefault("FSDP_VERSION", "2")
    cpu_strategies.prepare_fsdp("no", InitProcessGroupKwargs())
if asked.strategy == "zero2":
    cpu_strategies.prepare_deepspeed()


class OurBatches(Trainer):  # type: ignore[misc]
    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(task.loader(asked.steps, self.args.world_size))


class Noting(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # To the callback alone: with a tensor in its own history the Trainer cannot save any more.
        (mlflows,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, MLflowCallback)]
        notes.odd_values(state.global_step, lambda name, value: mlflows.on_log(args, state, control, {name: value}))
        notes.step(state.global_step)


arguments = TrainingArguments(
    "out",
    num_train_epochs=asked.epochs,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    weight_decay=0.0,
    logging_steps=1,
    save_strategy="epoch",
    report_to="mlflow",
    disable_tqdm=True,
    use_cpu=True,
    deepspeed=ZERO_2 if asked.strategy == "zero2" else None,
    accelerator_config={"use_configured_state": AcceleratorState._shared_state != {}, "even_batches": False},
)
notes = task.Notes(asked, arguments.process_index)
world = arguments.world_size
trainer = OurBatches(task.Net(), arguments, train_dataset=task.Rows(asked.steps * world), callbacks=[Noting()])
trainer.train(resume_from_checkpoint=True if list(Path("out").glob("checkpoint-*")) else None)
