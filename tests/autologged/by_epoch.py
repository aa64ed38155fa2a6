"""Several epochs with accumulation, a scheduler for each step, an evaluation, metrics through `accelerator.log`."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from tests.autologged.recording import record


def get_dataloaders(batch_size: int):
    # Labels that a linear model has given: to import a library that brings data takes longer than the training.
    images = torch.rand(550, 64)
    labels = (images @ torch.randn(64, 10)).argmax(dim=-1)
    train = TensorDataset(images[:400], labels[:400])
    evaluation = TensorDataset(images[400:550], labels[400:550])
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(evaluation, batch_size=32)


def training_function(args):
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)
    train_dataloader, eval_dataloader = get_dataloaders(args.batch_size)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    lr_scheduler = OneCycleLR(optimizer, max_lr=args.lr, epochs=args.num_epochs, steps_per_epoch=len(train_dataloader))
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    accelerator.init_trackers("classifier", config={"hidden": 32})

    for epoch in range(args.num_epochs):
        model.train()
        total_loss = 0
        for images, labels in train_dataloader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                total_loss += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

        model.eval()
        correct = 0
        num_samples = 0
        for images, labels in eval_dataloader:
            with torch.no_grad():
                predictions = model(images).argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, labels))
            correct += (predictions == references).sum().item()
            num_samples += len(references)
        accuracy = correct / num_samples
        accelerator.print(
            f"epoch {epoch}: accuracy {accuracy:.6f} loss {total_loss.item() / len(train_dataloader):.9f}"
        )
        accelerator.log(
            {"accuracy": accuracy, "mean_loss": total_loss.item() / len(train_dataloader), "epoch": epoch}, step=epoch
        )
        record(accelerator, model, optimizer, epoch, {"accuracy": accuracy})
    accelerator.end_training()


def main():
    parser = argparse.ArgumentParser(description="Train a classifier.")
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    args = parser.parse_args()
    training_function(args)


if __name__ == "__main__":
    main()
