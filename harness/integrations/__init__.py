"""Callbacks for other frameworks. Each module needs its own framework, and no other module imports it.

In reading order:

    callback_base  a run in the loop of a framework
    ended_run      metrics of a test after the training
    transformers   `transformers.Trainer`
    lightning      `lightning.pytorch.Trainer`
    keras          Keras 3 on torch
    accelerate     `HarnessTracker` for `Accelerator(log_with=...)`
"""
