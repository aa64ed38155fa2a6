"""`keras.Model.fit` on the torch backend with the harness callback.

pip install 'harness[keras]'
python examples/keras_fit.py
"""

from __future__ import annotations

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
from sklearn.datasets import load_digits

from harness.integrations.keras import HarnessCallback

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--run_name", default="keras-fit")
options = parser.parse_args()

keras.utils.set_random_seed(0)
digits = load_digits()
images = digits.images.astype("float32")[..., None] / 16
labels = digits.target

model = keras.Sequential(
    [
        keras.layers.Input((8, 8, 1)),
        keras.layers.Conv2D(8, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
model.fit(
    images[:1500],
    labels[:1500],
    batch_size=50,
    epochs=options.epochs,
    validation_data=(images[1500:], labels[1500:]),
    verbose=0,
    callbacks=[HarnessCallback(every_n_epochs=2, experiment_name="examples", run_name=options.run_name)],
)
