"""A script that tracks with MLflow already, on every rank alike: its own run, autologging of MLflow's, a tracker."""

import argparse
import json

import accelerate
import mlflow
import mlflow.pytorch
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import harness


def functions():
    found = [mlflow.log_metric, mlflow.log_metrics, mlflow.log_params, mlflow.start_run, mlflow.set_experiment]
    found += [Accelerator.prepare, Accelerator.backward, Accelerator.log, accelerate.tracking.MLflowTracker.log]
    return [*found, accelerate.data_loader.DataLoaderShard.__iter__]


def train(accelerator, num_epochs, epoch_is_over):
    data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8))
    for epoch in range(num_epochs):
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        epoch_is_over(epoch)
    accelerator.trackers = []
    accelerator.free_memory()


def tracks(epoch):
    mlflow.log_metric("by_mlflow", 10.0 * epoch, step=epoch)
    if epoch == 0:
        # As accelerate's tracker begins: within the run that is active.
        accelerator.trackers = [accelerate.tracking.MLflowTracker("of the script's")]
        mlflow.log_param("late", 1)
        mlflow.set_tag("team", "a")
        mlflow.log_text("a note", "note.txt")
    accelerator.log({"by_accelerate": torch.tensor(10.0 * epoch)}, step=epoch)


def tracks_apart(epoch):
    accelerator.log({"by_accelerate": 5.0}, step=epoch)
    if accelerator.is_main_process:
        mlflow.log_metric("of_script_alone", 1.0)


parser = argparse.ArgumentParser()
parser.add_argument("--num_epochs", type=int, default=2)
mlflow.autolog()
mlflow.pytorch.autolog()
before = functions()
harness.autolog(every_n_epochs=2)
args = parser.parse_args()
mlflow.set_experiment("of the script's")
with mlflow.start_run(run_name="of the script's") as run:
    accelerator = Accelerator(log_with="mlflow")
    mlflow.log_params({"hidden": 4})
    train(accelerator, args.num_epochs, tracks)
    harness.autolog(every_n_epochs=None, exclusive=True)
    train(accelerator, 1, tracks_apart)
accelerator.end_training()
harness.autolog(disable=True)
replaced = [str(now) for now, then in zip(functions(), before, strict=True) if now is not then]
if accelerator.is_main_process:
    with open("told.json", "w") as file:
        json.dump({"run_id": run.info.run_id, "replaced_afterwards": replaced}, file)
