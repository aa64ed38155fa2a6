"""A script that trains in processes that it starts itself, as a notebook does."""

import multiprocessing
import sys

import torch
from accelerate import Accelerator, debug_launcher, notebook_launcher
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import harness

harness.autolog(every_n_epochs=5, log_models=False)


def train(how):
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
    for _ in range(2):
        for inputs, targets in loader:
            accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    if how == "raises":
        raise ValueError("no such luck")
    if how == "exits":
        sys.exit(3)


def in_child(method, how):
    child = multiprocessing.get_context(method).Process(target=train, args=(how,))
    child.start()
    child.join()
    return child.exitcode


def main(where):
    if where == "debug_launcher":
        debug_launcher(train, ("returns",), num_processes=2)
    elif where == "notebook_launcher":
        anywhere = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        notebook_launcher(train, ("raises",), num_processes=2, **anywhere)
    else:
        ways = (("fork", "returns"), ("fork", "raises"), ("spawn", "exits"))
        codes = [in_child(method, how) for method, how in ways]
        print("exit codes", codes)


if __name__ == "__main__":
    main(sys.argv[1])
