"""harness: the training loop, checkpoint and tracking layer around Accelerate.

``__all__`` lists the public names. Each is imported at its first use, so that ``import harness`` and ``--help`` never
import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.autologging.api import autolog, resume
    from harness.config.schema import CheckpointConfig, ClassSpec, RunConfig, TrackingConfig, TrainerConfig
    from harness.config.task import StepOutput, Task
    from harness.distributed.model_preparation import separate_embeddings
    from harness.errors import HarnessError
    from harness.models.mlflow_flavor import load_model
    from harness.training.periodic_logger import PeriodicLogger

__version__ = "0.1.0"

_HOME = {
    "CheckpointConfig": "harness.config.schema",
    "ClassSpec": "harness.config.schema",
    "HarnessError": "harness.errors",
    "PeriodicLogger": "harness.training.periodic_logger",
    "RunConfig": "harness.config.schema",
    "StepOutput": "harness.config.task",
    "Task": "harness.config.task",
    "TrackingConfig": "harness.config.schema",
    "TrainerConfig": "harness.config.schema",
    "autolog": "harness.autologging.api",
    "load_model": "harness.models.mlflow_flavor",
    "resume": "harness.autologging.api",
    "separate_embeddings": "harness.distributed.model_preparation",
}

__all__ = [
    "CheckpointConfig",
    "ClassSpec",
    "HarnessError",
    "PeriodicLogger",
    "RunConfig",
    "StepOutput",
    "Task",
    "TrackingConfig",
    "TrainerConfig",
    "autolog",
    "load_model",
    "resume",
    "separate_embeddings",
]


# Modules of functions for scripts that create their own `Accelerator`.
_MODULES = ("cpu", "rendezvous")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"harness.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
