"""Callbacks for other frameworks. Each module requires its framework; no other module imports it.

In reading order:

    callback_base  the shared part of the callbacks
    transformers   `transformers.Trainer`
    lightning      `lightning.pytorch.Trainer`
    keras          Keras 3 on torch
    accelerate     `HarnessTracker` for `Accelerator(log_with=...)`
"""
