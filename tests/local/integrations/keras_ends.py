"""Several `fit`s in a process, each with another end: an error, a stop within an epoch, steps that overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
from safetensors.torch import load_file

from harness.checkpoint.format.commit import list_checkpoints
from harness.config.schema import TrackingConfig
from harness.integrations.keras import HarnessCallback
from harness.tasks import Digits

images, labels = (tensor.numpy() for tensor in Digits()._images(evaluation=False).tensors)


def named(run: str) -> HarnessCallback:
    return HarnessCallback(1, run_name=run, tracking=TrackingConfig(enabled=False))


def fit(*callbacks: keras.callbacks.Callback, optimizer: Any = "sgd", data: Any = None, **options: Any) -> None:
    model = keras.Sequential([keras.Input((1, 8, 8)), keras.layers.Flatten(), keras.layers.Dense(10, name="digit")])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = (images[:256] * 16, labels[:256]) if data is None else (data, None)
    model.fit(x, y, verbose=0, callbacks=[*callbacks], **options)


def checkpoints(run: str) -> list[tuple[str, int, int]]:
    found = list_checkpoints(Path("runs") / run / "checkpoints")
    return [(name, manifest.epoch, manifest.step) for name, manifest in found]


class At(keras.callbacks.Callback):  # type: ignore[misc]
    """Does something to the model after a batch, counted from 0, of the second epoch."""

    def __init__(self, batch: int, act: Any) -> None:
        super().__init__()
        self.batch, self.act, self.epoch = batch, act, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == (1, self.batch):
            self.act(self.model)


def fail(model: Any) -> None:
    raise RuntimeError("fell out")


def stop(model: Any) -> None:
    model.stop_training = True


# An error leaves the run open, and the next `fit` has the same callback and another model.
ours = HarnessCallback(1)
try:
    fit(ours, At(3, fail), epochs=4)
except RuntimeError:
    fit(ours, epochs=2)

# Left after 4 of 8 batches: by a callback behind ours, and where nobody knows how many there are, before it.
fit(named("left"), At(3, stop), epochs=4)
assert checkpoints("left") == [("epoch-0001", 1, 8), ("step-00000012", 1, 12)], checkpoints("left")


def batches() -> Any:
    for start in [*range(0, 256, 32)] * 2:
        yield images[start : start + 32], labels[start : start + 32]


fit(At(3, stop), named("endless"), data=batches(), steps_per_epoch=8, epochs=4)
assert checkpoints("endless") == [("epoch-0001", 1, 8), ("step-00000012", 1, 12)], checkpoints("endless")
# At the epoch's last batch it is whole.
fit(named("whole"), At(7, stop), epochs=4)
assert checkpoints("whole") == [("epoch-0001", 1, 8), ("epoch-0002", 2, 16)], checkpoints("whole")

# The rate is the epoch's own, though a callback before ours has changed it for the next.
halving = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=0, min_delta=1e9)
fit(halving, named("halved"), optimizer=keras.optimizers.SGD(0.5), epochs=3)
found = list_checkpoints(Path("runs/halved/checkpoints"))
assert [manifest.metrics["train/lr"] for _, manifest in found] == [0.5, 0.5, 0.25], found

# Gradients of the scaled loss overflow at first, and the batch is no step.
scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01, momentum=0.9), initial_scale=3e38)
fit(named("scaled"), optimizer=scaled, epochs=2)
steps = int(scaled.iterations)
assert 8 < steps < 16, steps
assert checkpoints("scaled")[-1] == ("epoch-0002", 2, steps), (checkpoints("scaled"), steps)
assert load_file("runs/scaled/checkpoints/epoch-0002/optimizer.safetensors")["step.digit.kernel"] == steps
print("as they ended")
