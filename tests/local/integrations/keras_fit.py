"""`fit` on real images; argv: how it goes on or ends (stop, fail, check)."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import keras
import numpy
import torch
from safetensors.torch import load_file

import harness
from harness.errors import ConfigError
from harness.integrations.keras import HarnessCallback, load_model
from harness.tasks import Digits

HOW = sys.argv[1]
images, labels = (tensor.numpy() for tensor in Digits()._images(evaluation=False).tensors)
images = images.transpose(0, 2, 3, 1)


class At(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if int(self.model.optimizer.iterations) == 20:
            if HOW == "fail":
                raise RuntimeError("fell out")
            if HOW == "stop":
                os.kill(os.getpid(), signal.SIGUSR1)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2:
            # Of this moment, behind the checkpoint of which training goes on.
            torch.save([self.model.layers[0].kernel.value, slots()["sequential_conv2d_kernel_velocity"]], "kept.pt")


def slots() -> dict[str, torch.Tensor]:
    return {slot.name: slot.value for slot in model.optimizer.variables}


keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Input((8, 8, 1)),
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.1),
        keras.layers.Dense(10),
    ]
)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
model.fit(
    images[:256],
    labels[:256],
    batch_size=32,
    epochs=4,
    validation_data=(images[256:320], labels[256:320]),
    verbose=0,
    callbacks=[
        keras.callbacks.BackupAndRestore("backup", delete_checkpoint=False),
        HarnessCallback(1, run_name="digits"),
        At(),
    ],
)
if HOW == "check":
    import mlflow
    from mlflow import MlflowClient

    found = MlflowClient().search_logged_models(["1"], order_by=[{"field_name": "creation_time", "ascending": False}])
    where = f"models:/{found[0].model_id}"
    batch = torch.from_numpy(images[:100])
    expected = model(batch, training=False)
    assert torch.equal(load_model(where)(batch, training=False), expected)
    assert torch.equal(harness.load_model(where)(batch), expected)
    weights = load_file("runs/digits/checkpoints/epoch-0004/model.safetensors")
    assert torch.equal(weights["batch_normalization.moving_mean"], model.layers[1].moving_mean.value)
    state = load_file("runs/digits/checkpoints/epoch-0004/optimizer.safetensors")
    assert state["step.dense.kernel"] == 32
    assert torch.equal(state["velocity.conv2d.kernel"], slots()["sequential_conv2d_kernel_velocity"])
    assert len(state) == 6 * 3
    kernel, velocity = torch.load("kept.pt", weights_only=False)
    before = "runs/digits/checkpoints/epoch-0003"
    assert torch.equal(load_file(f"{before}/model.safetensors")["conv2d.kernel"], kernel)
    assert torch.equal(load_file(f"{before}/optimizer.safetensors")["velocity.conv2d.kernel"], velocity)

    # Two outputs, each with its loss; and a `fit` that counts its epochs anew, with an optimizer that goes on.
    pixels = keras.Input((8, 8, 1), name="pixels")
    hidden = keras.layers.Dense(16, activation="relu")(keras.layers.Flatten()(pixels))
    digit = keras.layers.Dense(10, name="digit")(hidden)
    odd = keras.layers.Dense(1, activation="sigmoid", name="odd")(hidden)
    two = keras.Model(pixels, {"digit": digit, "odd": odd})
    losses = {"digit": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "odd": "binary_crossentropy"}
    two.compile("sgd", losses, metrics={"digit": ["accuracy"]})
    targets = {"digit": labels[:256], "odd": (labels[:256] % 2).astype("float32")}

    def fit_two(**epochs: int) -> HarnessCallback:
        ours = HarnessCallback(2, run_name="two", input_example=images[:4])
        two.fit(images[:256], targets, validation_data=(images[:256], targets), verbose=0, callbacks=[ours], **epochs)
        return ours

    fit_two(epochs=2)
    try:
        fit_two(epochs=2)
    except ConfigError as error:
        assert "epoch-0002 of step 16 already; pass initial_epoch=2 to fit, or another run_name to the callback" in str(
            error
        )
    else:
        raise AssertionError("its checkpoints would have had the names of those before")
    ours = fit_two(epochs=4, initial_epoch=2)
    test = {"digit": labels[256:320], "odd": (labels[256:320] % 2).astype("float32")}
    two.evaluate(images[256:320], test, verbose=0, callbacks=[ours])
    (run,) = MlflowClient().search_runs(["1"], "run_name = 'two'")
    assert run.info.status == "FINISHED"
    assert {"train/digit_loss", "train/odd_loss", "eval/digit_accuracy", "eval/loss"} <= run.data.metrics.keys()
    (last,) = MlflowClient().search_logged_models(["1"], f"source_run_id = '{run.info.run_id}' AND tags.step = '32'")
    given = mlflow.pyfunc.load_model(f"models:/{last.model_id}").predict(images[:10])
    for name, expected in two(images[:10], training=False).items():
        assert numpy.array_equal(given[name], expected.detach().numpy())
    print("the same")
