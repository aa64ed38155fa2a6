"""`fit` with gradients that are accumulated over its epochs' ends, 3 of 8 batches; argv: fail in it, or check."""

from __future__ import annotations

import sys
from typing import Any

import keras
import torch
from safetensors.torch import load_file

from harness.integrations.keras import HarnessCallback
from harness.tasks import Digits

HOW = sys.argv[1]
BATCHES = 3
images, labels = (tensor.numpy() for tensor in Digits()._images(evaluation=False).tensors)


class At(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Two batches of the third epoch are done, and with the two left over from the second a step.
        if HOW == "fail" and int(self.model.optimizer.variables[0]) == 18:
            raise RuntimeError("fell out")


keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((1, 8, 8)), keras.layers.Flatten(), keras.layers.Dense(10)])
rate = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=1, decay_rate=0.9)
optimizer = keras.optimizers.SGD(rate, momentum=0.9, gradient_accumulation_steps=BATCHES)
model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(
    images[:256],
    labels[:256],
    batch_size=32,
    epochs=4,
    verbose=0,
    callbacks=[
        keras.callbacks.BackupAndRestore("backup", delete_checkpoint=False),
        HarnessCallback(1, run_name="digits"),
        At(),
    ],
)
weights = load_file("runs/digits/checkpoints/epoch-0004/model.safetensors")
assert torch.equal(weights["dense.kernel"], model.layers[-1].kernel.value)
state = load_file("runs/digits/checkpoints/epoch-0004/optimizer.safetensors")
slots = {slot.name: slot.value for slot in optimizer.variables}
for slot in ("momentum", "gradient_accumulator"):
    assert torch.equal(state[f"{slot}.dense.kernel"], slots[f"sequential_dense_kernel_{slot}"]), slot
    assert state[f"{slot}.dense.kernel"].any(), slot
assert state["iteration.dense.kernel"] == 32
assert state["step.dense.kernel"] == optimizer.iterations == 10
assert load_file("runs/digits/checkpoints/epoch-0001/optimizer.safetensors")["step.dense.bias"] == 2
print("the same, at the rate", float(optimizer.learning_rate))
