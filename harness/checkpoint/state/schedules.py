"""Compare or reset the learning rate schedules of a resumed run.

A scheduler's state contains its arguments (`T_max`, milestones), so a run that is resumed with another number of epochs
continues the old schedule. `compare_schedules` reports the difference and the upcoming learning rates.
`reset_schedules` instead steps the new scheduler from its start to the checkpoint's position.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from harness.checkpoint.format.json_values import encode
from harness.checkpoint.state.param_groups import Group, match_groups
from harness.checkpoint.state.trainer_state import AnyWatched, TrainerState
from harness.errors import CheckpointError

# Values in a scheduler's state that change during training; the others are its arguments.
COUNTED = frozenset(("last_epoch", "best", "num_bad_epochs", "cooldown_counter", "verbose", "last_lr"))
# Values that schedulers keep in a parameter group.
_OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
_MAX_LOOKED_AHEAD = 10_000


def compare_schedules(state: TrainerState, watched: AnyWatched) -> list[str]:
    """Compare each scheduler's arguments with those in the checkpoint, which take precedence.

    Effects: steps torch's own schedulers and loads the checkpoint's state into them, so schedulers and groups must be
    restored afterwards; not collective; main thread.

    Returns:
        A message for each scheduler that differs.
    """
    lines = []
    for part, saved in zip(watched.parts, state.parts, strict=True):
        for scheduler, of_scheduler in _each(part.scheduler, saved.scheduler):
            if line := _difference(scheduler, of_scheduler):
                lines.append(line)
    return lines


def _difference(scheduler: Any, saved: Mapping[str, Any]) -> str:
    name = type(scheduler).__name__
    if type(scheduler) is LambdaLR:
        return _difference_of_functions(scheduler, saved)
    now, before = _values(scheduler.state_dict()), _values(saved)
    others = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    if not others:
        return ""
    changed = ", ".join(f"{key}={_shown(now, key)} ({_shown(before, key)})" for key in others)
    line = (
        f"harness: warning: {name} has other arguments than in the checkpoint (in brackets), which take precedence: "
        f"{changed}; "
    )
    if rates := _rates_ahead(scheduler, saved):
        (from_before, to_before), (from_now, to_now), num_steps = rates
        line += (
            f"in its next {num_steps} steps the learning rate changes from {from_before:.3g} to {to_before:.3g}, "
            f"and with the new arguments it would change from {from_now:.3g} to {to_now:.3g}: "
        )
    return f"{line}set reset_scheduler (--reset_scheduler) to use the new ones"


def _difference_of_functions(scheduler: LambdaLR, saved: Mapping[str, Any]) -> str:
    """Describe a changed schedule function. Checkpoints do not contain it, so that of the code is used."""
    num_steps, before = _num_steps(saved), saved.get("_last_lr")
    if num_steps is None or not before or len(before) != len(scheduler.base_lrs):
        return ""
    try:
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        now = [float(base * function(num_steps)) for base, function in pairs]
    except Exception:
        return ""  # the function raises its own error at the next step
    if all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) for a, b in zip(now, map(float, before), strict=True)):
        return ""
    return (
        "harness: warning: LambdaLR has another function than in the checkpoint, which is used from its next step "
        f"on: the learning rate was {float(before[0]):.3g}, and by the function it is {now[0]:.3g} there"
    )


def reset_schedules(
    state: TrainerState, watched: AnyWatched, groups: Sequence[Group]
) -> tuple[TrainerState, list[str]]:
    """Step the new schedulers to the checkpoint's position instead of loading their saved state.

    Effects: steps the schedulers as often as before the checkpoint; the returned state must be restored afterwards; not
    collective; main thread.

    Returns:
        The state to restore, and a message for each scheduler.

    Raises:
        CheckpointError: if a scheduler cannot be stepped to the checkpoint's position.
    """
    parts, lines = list(state.parts), []
    records = list(state.param_groups)
    numbers = match_groups(records, groups)
    for index, (part, saved) in enumerate(zip(watched.parts, state.parts, strict=True)):
        for scheduler, of_scheduler in _each(part.scheduler, saved.scheduler):
            if isinstance(scheduler, ReduceLROnPlateau):
                lines.append("harness: ReduceLROnPlateau restarts at the checkpoint's learning rate")
                continue
            lines.append(_advance_to(scheduler, of_scheduler))
            own = {id(group) for group in scheduler.optimizer.param_groups}
            for (group, _), number in zip(groups, numbers, strict=True):
                if id(group) in own and number is not None:
                    kept = [*_OF_GROUPS, *(("momentum", "betas") if "max_momentum" in group else ())]
                    moved = {key: copy.deepcopy(group[key]) for key in kept if key in group}
                    records[number] = {**records[number], **moved}
        if part.scheduler is not None:
            parts[index] = replace(saved, scheduler=copy.deepcopy(part.scheduler.state_dict()))
    return replace(state, parts=parts, param_groups=records), lines


def _advance_to(scheduler: Any, saved: Mapping[str, Any]) -> str:
    name, num_steps = type(scheduler).__name__, _num_steps(saved)
    if num_steps is None:
        raise CheckpointError(
            f"reset_scheduler: the state of {name} has no number of steps (last_epoch); resume without reset_scheduler"
        )
    try:
        _advance(scheduler, num_steps - (_num_steps(scheduler.state_dict()) or 0))
    except Exception as error:
        raise CheckpointError(
            f"reset_scheduler: {name} as it is made now cannot be stepped {num_steps} times, as it was before the "
            f"checkpoint: {error}; make it for more steps, or resume without reset_scheduler"
        ) from error
    return f"harness: {name} is reset: after {num_steps} of its steps the learning rate is {_rate(scheduler):.3g}"


def _each(scheduler: Any, saved: Any) -> list[tuple[Any, Mapping[str, Any]]]:
    """Unwrap accelerate's and autologging's schedulers, each with its saved state."""
    if scheduler is None or not isinstance(saved, Mapping):
        return []
    if (named := getattr(scheduler, "named", None)) is not None:
        return [pair for name, each in named.items() for pair in _each(each, saved.get(name))]
    inner = getattr(scheduler, "scheduler", scheduler)
    return [(inner, saved)] if hasattr(inner, "optimizer") else []


def _values(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Extract the arguments of a scheduler from its state, as JSON values."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if key == "_schedulers":
            for number, each in enumerate(value):
                found |= _values(each, f"{prefix}{number}.")
        elif not key.startswith("_") and key not in COUNTED:
            try:
                found[prefix + key] = encode(value)
            except TypeError:
                continue
    return found


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = str(values[key]) if key in values else "no such value"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _rates_ahead(
    scheduler: Any, saved: Mapping[str, Any]
) -> tuple[tuple[float, float], tuple[float, float], int] | None:
    """Return ((saved rate now, later), (new rate now, later), steps until later) of the first group."""
    num_steps = _num_steps(saved)
    if num_steps is None or type(scheduler).__module__ != "torch.optim.lr_scheduler":
        return None
    if isinstance(scheduler, ReduceLROnPlateau):
        return None
    ahead = max(1, min(num_steps, _MAX_LOOKED_AHEAD))
    try:
        _advance(scheduler, num_steps - (_num_steps(scheduler.state_dict()) or 0))
        now = _rate(scheduler)
        _advance(scheduler, ahead)
        then = _rate(scheduler)
        scheduler.load_state_dict(copy.deepcopy(dict(saved)))
        for group, rate in zip(scheduler.optimizer.param_groups, saved["_last_lr"], strict=True):
            group["lr"] = rate
        before = _rate(scheduler)
        _advance(scheduler, ahead)
        return (before, _rate(scheduler)), (now, then), ahead
    except Exception:
        return None  # the schedule ends (OneCycleLR) or has another class; the message has the arguments


def _num_steps(state: Mapping[str, Any]) -> int | None:
    found = state.get("last_epoch")
    if found is None and state.get("_schedulers"):
        found = state["_schedulers"][0].get("last_epoch")
    return found if isinstance(found, int) and found >= 0 else None


def _advance(scheduler: Any, num_steps: int) -> None:
    with warnings.catch_warnings():
        # Torch warns if the optimizer has not stepped yet.
        warnings.simplefilter("ignore")
        for _ in range(num_steps):
            scheduler.step()


def _rate(scheduler: Any) -> float:
    return float(scheduler.optimizer.param_groups[0]["lr"])
