"""Validate the arguments of `PeriodicLogger.watch`, and count the steps of one of several optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from harness.checkpoint.format.names import unwrapped
from harness.checkpoint.sharding.find_shards import is_deepspeed_engine
from harness.checkpoint.sharding.local_shards import innermost
from harness.checkpoint.state.trainer_state import AnyWatched, Several, Watched
from harness.errors import CheckpointError

_DICT_FORM = 'watch({"generator": (g, opt_g), "discriminator": (d, opt_d)})'


def refuse_second_watch() -> CheckpointError:
    """Return the error for a second call of `watch`."""
    return CheckpointError(
        "watch() was called before on this logger, and a second call would replace what checkpoints hold; pass several "
        f"models to one call, as a dict: {_DICT_FORM}"
    )


def watched_of(
    models: nn.Module | Mapping[str, Any], optimizer: Any, scheduler: Any, steps_of: str | None
) -> AnyWatched:
    """Validate the arguments of `PeriodicLogger.watch` and return the models, optimizers and schedulers to save.

    Effects: not collective; deterministic, so all ranks get the same result; reads only.

    Raises:
        CheckpointError: if an argument is not as documented.
    """
    if isinstance(models, nn.Module):
        for name, value in (("optimizer", optimizer), ("scheduler", scheduler)):
            if isinstance(value, (list, tuple, Mapping)):
                raise _refused(f"{name} is a {type(value).__name__}")
        if steps_of is not None:
            raise CheckpointError(f"watch(): steps_of={steps_of!r} is for several models; leave it out for one")
        return Watched(models, optimizer, scheduler)
    if not isinstance(models, Mapping):
        raise _refused(f"model is a {type(models).__name__}")
    if optimizer is not None or scheduler is not None:
        raise _refused("optimizer and scheduler were given beside a dict")
    if not models:
        raise _refused("the dict is empty")
    parts = tuple(_part(name, value) for name, value in models.items())
    _refuse_shared_optimizers(parts)
    return Several(parts, _counted(parts, steps_of))


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"watch(): {what}; give one model as watch(model, optimizer, scheduler), or several as a dict of tuples "
        f"(model,), (model, optimizer) or (model, optimizer, scheduler): {_DICT_FORM}"
    )


def _part(name: Any, value: Any) -> Watched:
    if not isinstance(name, str) or not name.isidentifier():
        raise CheckpointError(
            f"watch(): {name!r} is not a name for a model: it must be an identifier (letters, digits and underscores, "
            "no dots), as it precedes the names of the model's tensors in checkpoints"
        )
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise CheckpointError(
            f"watch(): {name!r} is not a name for a model: nn.ModuleDict, which the models are loaded into, has an "
            "attribute of that name; use another one"
        )
    items = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(items) <= 3 or not isinstance(items[0], nn.Module):
        kinds = ", ".join(type(item).__name__ for item in items)
        raise _refused(f"{name!r} is {'a tuple of ' if isinstance(value, tuple) else ''}{kinds or 'nothing'}")
    model, optimizer, scheduler = (*items, None, None)[:3]
    if optimizer is None and scheduler is not None:
        raise _refused(f"{name!r} has a scheduler without an optimizer")
    return Watched(model, optimizer, scheduler, name)


def _refuse_shared_optimizers(parts: tuple[Watched, ...]) -> None:
    owners: dict[int, str] = {}
    for part in parts:
        if part.optimizer is None:
            continue
        if (first := owners.setdefault(id(innermost(part.optimizer)), part.name)) != part.name:
            raise CheckpointError(
                f"watch(): {first!r} and {part.name!r} have the same optimizer; give it with one of them: it may hold "
                "parameters of the other"
            )


def _counted(parts: tuple[Watched, ...], steps_of: str | None) -> Watched | None:
    trained = {part.name: part for part in parts if part.optimizer is not None}
    if steps_of is None:
        return next(iter(trained.values()), None)
    if steps_of not in trained:
        raise CheckpointError(
            f"watch(): steps_of={steps_of!r} is not a model with an optimizer; use one of: {', '.join(trained)}"
        )
    return trained[steps_of]


def modules_of(watched: AnyWatched) -> tuple[nn.Module, nn.Module]:
    """Return the user's model and the wrapped one that is trained; several models are in an `nn.ModuleDict`.

    The names of the model's tensors are those in a checkpoint.
    """
    if isinstance(watched, Watched):
        return unwrapped(watched.model), watched.model
    return (
        nn.ModuleDict({part.name: unwrapped(part.model) for part in watched.parts}),
        nn.ModuleDict({part.name: part.model for part in watched.parts}),
    )


class StepCounter:
    """Count the steps of one optimizer of several from now on.

    A step that a loss scaler skips is not counted: torch calls no hook for it, and DeepSpeed counts it as skipped.

    Effects: not collective; a hook on the optimizer's step until `close`; nothing on disk.
    """

    def __init__(self, part: Watched) -> None:
        # DeepSpeed steps its optimizer once for each flat group, and counts complete steps in the engine.
        self._engine: Any = part.model if is_deepspeed_engine(part.model) else None
        self._num_seen = 0
        # The hook must run at each step, so it is not traced into a compiled optimizer.
        after_step = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._hook = innermost(part.optimizer).register_step_post_hook(after_step)
        self._num_popped = self._num_steps

    def _after_step(self, *_: Any) -> None:
        self._num_seen += 1

    @property
    def _num_steps(self) -> int:
        if self._engine is None:
            return self._num_seen
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def pop(self) -> int:
        """Return the number of steps since the last call."""
        num_new = self._num_steps - self._num_popped
        self._num_popped += num_new
        return num_new

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()
