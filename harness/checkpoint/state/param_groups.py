"""Match an optimizer's parameter groups with those of a checkpoint, by the names of their parameters.

    add_saved_groups   add groups that the script added during training (unfreezing) and that the optimizer lacks
    require_groups     raise an error for groups that cannot be matched
    match_groups       find the saved group of each live one

When the resumed script calls `add_param_group` for such a group, the group already has the state of the checkpoint and
the call changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from harness.checkpoint.format.names import some
from harness.checkpoint.sharding.local_shards import innermost
from harness.checkpoint.state.parts import find_watched_parameters
from harness.checkpoint.state.trainer_state import AnyWatched
from harness.errors import CheckpointError

Record = Mapping[str, Any]
# (live group, names of its parameters).
Group = tuple[Mapping[str, Any], Sequence[str]]


def add_saved_groups(watched: AnyWatched, saved: Sequence[Record], groups: Sequence[Group]) -> list[AddedGroups]:
    """Add each saved group to its optimizer if no parameter of the group is in a live group.

    The ``params`` of saved groups are names. Nothing is added to optimizers of flattened parameters (FSDP1, ZeRO).
    After an error, call `undo` of each returned object.

    Effects: not collective, with the same result on every rank; main thread, before training. The optimizer's
    `add_param_group` is replaced until the script has added every such group itself.
    """
    trained = {name for _, names in groups for name in names}
    missing = [record for record in saved if record["params"] and trained.isdisjoint(record["params"])]
    added: list[AddedGroups] = []
    for part, parameters in find_watched_parameters(watched) if missing else ():
        own = [record for record in missing if parameters.keys() >= set(record["params"])]
        if own and part.optimizer is not None:
            added.append(AddedGroups(innermost(part.optimizer), own, parameters))
    return added


class AddedGroups:
    """Add a checkpoint's groups to an optimizer, and ignore the script's later calls that add the same groups."""

    def __init__(self, optimizer: Any, records: Sequence[Record], parameters: Mapping[str, Tensor]) -> None:
        self._optimizer = optimizer
        self._num_before = len(optimizer.param_groups)
        for record in records:
            optimizer.add_param_group(_group_of(optimizer, record, parameters))
        self._awaited = [_identities(group["params"]) for group in optimizer.param_groups[self._num_before :]]
        self._add = optimizer.add_param_group
        vars(optimizer)["add_param_group"] = self._claim

    def _claim(self, param_group: dict[str, Any]) -> None:
        """Replace the optimizer's `add_param_group`; raise if a group overlaps one of the checkpoint's in part."""
        parameters = param_group["params"]
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        given = _identities([each[1] if isinstance(each, tuple) else each for each in listed])
        if given in self._awaited:
            self._awaited.remove(given)
            if not self._awaited:
                del vars(self._optimizer)["add_param_group"]
            return
        if any(given & each for each in self._awaited):
            raise CheckpointError(
                f"add_param_group: the group has {len(given)} parameters, some of which are in another group of the "
                "checkpoint; add the group that was saved, or start another run"
            )
        # `params` may be an iterator, which was consumed above.
        self._add({**param_group, "params": listed})

    def undo(self) -> None:
        """Remove the added groups and restore `add_param_group`."""
        vars(self._optimizer).pop("add_param_group", None)
        del self._optimizer.param_groups[self._num_before :]


def _group_of(optimizer: Any, record: Record, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert a saved group to live parameters. Values that JSON cannot hold get the optimizer's defaults."""
    live: list[Any] = [parameters[name] for name in record["params"]]
    if "param_names" in record:
        live = list(zip(record["param_names"], live, strict=True))
    values = {
        key: copy.deepcopy(value)
        for key, value in record.items()
        if key not in ("params", "param_names") and not isinstance(optimizer.defaults.get(key), Enum)
    }
    return {**values, "params": live}


def _identities(parameters: Sequence[Tensor]) -> frozenset[int]:
    return frozenset(map(id, parameters))


def match_groups(saved: Sequence[Record], groups: Sequence[Group]) -> list[int | None]:
    """Return, for each live group, the index of the saved one with the same parameters, or None."""
    unmatched = {number: frozenset(record["params"]) for number, record in enumerate(saved)}
    found: list[int | None] = []
    for number, (_, names) in enumerate(groups):
        # Groups without parameters, as in ZeRO-3, are matched by index.
        same = next((each for each in (number, *unmatched) if unmatched.get(each) == frozenset(names)), None)
        if same is not None:
            del unmatched[same]
        found.append(same)
    return found


def require_groups(saved: Sequence[Record], groups: Sequence[Group], *, has_scheduler: bool) -> None:
    """Check that the live parameter groups match those of a checkpoint, whose ``params`` are names.

    A live group whose parameters are in no saved group keeps its initial values. A scheduler's state is indexed by
    group, so with a scheduler the number and order of the groups must match too.

    Raises:
        CheckpointError: if parameters are grouped differently, a saved group has no live one, or, with a scheduler,
            there are additional groups or another order.
    """
    matches = match_groups(saved, groups)
    if matches == list(range(len(saved))):
        return
    of_saved = [frozenset(record["params"]) for record in saved]
    for number, (match, (_, names)) in enumerate(zip(matches, groups, strict=True)):
        if match is None and any(not each.isdisjoint(names) for each in of_saved):
            raise _grouped_otherwise(number, frozenset(names), of_saved)
    if missing := sorted(set(range(len(saved))) - set(matches)):
        names = some(sorted(of_saved[missing[0]]))
        raise CheckpointError(
            f"the checkpoint has a parameter group {missing[0]} of {names}, and the optimizer has none of these; "
            "resume with the model and the optimizer that were saved, or start another run"
        )
    if has_scheduler:
        raise CheckpointError(
            "the optimizer has other parameter groups than the checkpoint, or has them in another order, and the "
            "scheduler's state is by their numbers; make them in the order in which they were saved, and add new ones "
            "after watch()"
        )


def _grouped_otherwise(number: int, names: frozenset[str], of_saved: Sequence[frozenset[str]]) -> CheckpointError:
    same_number = of_saved[number] if number < len(of_saved) else frozenset()
    saved = same_number if names & same_number else next(each for each in of_saved if names & each)
    more, fewer = names - saved, saved - names
    others = [f"{some(sorted(more))}, which it had not"] if more else []
    others += [f"no {some(sorted(fewer))}, which it had"] if fewer else []
    return CheckpointError(
        f"the optimizer's parameter group {number} has {', and '.join(others)}; resume with the model and the "
        "optimizer that were saved, or start another run"
    )
