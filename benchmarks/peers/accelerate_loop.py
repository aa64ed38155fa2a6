"""A loop of Accelerate's examples, with its MLflow tracker, or unchanged under `harness run`."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from benchmarks.peers import task
from harness.distributed.strategies import with_cpu_strategies

asked = task.options()
is_ours = asked.peer == "harness_autolog"
if asked.peer == "mlflow_autolog":
    import mlflow

    mlflow.autolog()
    mlflow.pytorch.autolog()
wanted = {
    "log_with": "mlflow" if asked.peer == "accelerate_tracker" else None,
    "dataloader_config": DataLoaderConfiguration(even_batches=False),
}
if not is_ours:
    # On a CPU accelerate takes no DDP unasked, and DDP instead of FSDP2 and ZeRO.
    wanted = with_cpu_strategies(wanted)
accelerator = Accelerator(**wanted)
if asked.strategy == "zero2":
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
model = task.Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
loader = task.loader(asked.steps, accelerator.num_processes)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.init_trackers("compare", config={"lr": 1e-3})
notes = task.Notes(asked, accelerator.process_index)

# Going on is the script's affair with accelerate alone; ours does it from outside.
states = sorted(Path("states").glob("epoch-*")) if not is_ours else []
if states:
    accelerator.load_state(str(states[-1]))
for epoch in range(len(states), asked.epochs):
    model.train()
    for index, batch in enumerate(loader):
        step = epoch * asked.steps + index + 1
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        gathered = accelerator.gather(loss.detach()).mean().item()
        accelerator.log({"loss": loss.item(), "loss_gathered": gathered}, step=step)
        notes.odd_values(step, lambda name, value, step=step: accelerator.log({name: value}, step=step))
        notes.step(step)
    if asked.fails == "sigkill" and not is_ours:
        accelerator.save_state(f"states/epoch-{epoch + 1}")
accelerator.end_training()
