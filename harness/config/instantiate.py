"""Import the classes that the configuration names, check their arguments and construct the objects.

jsonargparse checks names and types against the constructor's signature. This module shortens its errors to one line.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from harness.config.parsing import readable
from harness.config.schema import ClassSpec, RunConfig
from harness.config.task import Task
from harness.errors import ConfigError


def load_class(key: str, class_path: str) -> type[Any]:
    """Import a class.

    Raises:
        ConfigError: if it does not exist; with the most similar name, if there is one.
    """
    module_path, _, name = class_path.rpartition(".")
    at = f"{key}.class_path"
    if not module_path or class_path.startswith("."):
        raise ConfigError(at, f"must be a module and a class, such as my_project.tasks.MyTask, got {class_path!r}")
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        raise ConfigError(
            at, f"cannot import {module_path!r}: {error}; install it, or start in the directory that contains it"
        ) from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        near = difflib.get_close_matches(name, [n for n in dir(module) if inspect.isclass(getattr(module, n))], 1)
        hint = f"; did you mean {module_path}.{near[0]}?" if near else ""
        raise ConfigError(at, f"{module_path} has no class {name!r}{hint}")
    return found


def check_arguments(key: str, spec: ClassSpec, provided: Sequence[str] = ()) -> Any:
    """Check `init_args` against the constructor and return the arguments, converted to its types.

    The configuration may not contain the `provided` parameters, which harness passes. Messages begin with `key`.

    Effects: imports and instantiates the classes that the arguments name. For arguments from an untrusted source use
    `harness.models.described_model`.

    Raises:
        ConfigError: for an argument that is unknown, missing or of a wrong type.
    """
    found = load_class(key, spec.class_path)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(
        found, skip=set(provided) or None, instantiate=True, sub_configs=True, fail_untyped=False
    )
    # jsonargparse would pass None for a missing argument without a type.
    for name in _without_default(found):
        if name not in {*spec.init_args, *provided} and any(a.dest == name for a in parser._actions):
            raise ConfigError(f"{key}.init_args.{name}", f"is missing; {spec.class_path} needs it")
    for name in spec.init_args:
        if not any(action.dest.split(".")[0] == name for action in parser._actions):
            known = sorted({a.dest.split(".")[0] for a in parser._actions if a.dest not in ("help", "config")})
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{key}.init_args.{name}",
                f"is not an argument of {spec.class_path}; {hint}it takes {', '.join(known) or 'none'}",
            )
    try:
        return parser.instantiate(parser.parse_object(dict(spec.init_args)))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError("", f"{key}.init_args.{readable(error)} (for {spec.class_path})") from error


def _without_default(found: type[Any]) -> list[str]:
    """Return the names of the constructor's parameters that have neither a type nor a default."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (ValueError, TypeError):  # a class in C has no signature
        return []
    empty = inspect.Parameter.empty
    return [each.name for each in parameters if each.annotation is empty and each.default is empty]


def check_optimization(config: RunConfig) -> None:
    """Check the arguments of the optimizer and the scheduler before they are constructed.

    Raises:
        ConfigError: as `check_arguments`.
    """
    check_arguments("optimizer", config.optimizer, ("params",))
    if config.scheduler is not None:
        check_arguments("scheduler", config.scheduler, ("optimizer",))


def build(key: str, spec: ClassSpec, **provided: Any) -> Any:
    """Construct an object of the configured class. The `provided` arguments are passed first, by position.

    Raises:
        ConfigError: if class or arguments are wrong, or the constructor rejects them.
    """
    arguments = check_arguments(key, spec, tuple(provided))
    try:
        return load_class(key, spec.class_path)(*provided.values(), **arguments.as_dict())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}.init_args", f"{spec.class_path} rejects them: {error}") from error


def build_task(spec: ClassSpec) -> Task:
    """Construct the task.

    Raises:
        ConfigError: if class or arguments are wrong, or the class is not a `harness.Task`.
    """
    task: Any = build("task", spec)
    missing = [name for name in ("model", "train_data", "eval_data", "step") if not callable(getattr(task, name, None))]
    if missing:
        raise ConfigError(
            "task.class_path", f"{spec.class_path} is not a harness.Task: it lacks {', '.join(missing)}()"
        )
    return cast(Task, task)


def build_optimizer(spec: ClassSpec, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Construct the optimizer of all parameters that require gradients.

    Raises:
        ConfigError: if class or arguments are wrong, or the class is not an optimizer.
    """
    if not issubclass(load_class("optimizer", spec.class_path), torch.optim.Optimizer):
        raise ConfigError("optimizer.class_path", f"{spec.class_path} is not a torch.optim.Optimizer")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return cast(torch.optim.Optimizer, build("optimizer", spec, params=parameters))


def build_scheduler(spec: ClassSpec | None, optimizer: torch.optim.Optimizer) -> Any:
    """Construct the learning rate scheduler, or return None if none is configured.

    Raises:
        ConfigError: if class or arguments are wrong, or the class is not a scheduler that steps without a metric.
    """
    if spec is None:
        return None
    found = load_class("scheduler", spec.class_path)
    if not issubclass(found, LRScheduler) or issubclass(found, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler.class_path",
            f"must be a torch LRScheduler that is stepped without a metric, got {spec.class_path}",
        )
    return build("scheduler", spec, optimizer=optimizer)
