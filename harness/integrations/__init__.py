"""Callbacks for other frameworks. Each module requires its own framework, and no other module imports it.

In reading order:

    callback_base  a run in the training loop of a framework
    transformers   `transformers.Trainer`
    lightning      `lightning.pytorch.Trainer`
    keras          Keras 3 on torch
    accelerate     `HarnessTracker` for `Accelerator(log_with=...)`
"""
