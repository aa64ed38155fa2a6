"""What a rank holds of several models together: of each one alone, with prefixed names, and then merged.

    name every model's tensors  ->  `find_named` for each model  ->  one `LocalShards`

A tensor that two models share is named by the first one; in the second its name is an alias, as for tied weights. An
optimizer may hold parameters of another model, where FSDP1 and ZeRO have not flattened these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from harness.checkpoint.format.tensor_shard import TensorShard
from harness.checkpoint.sharding.local_shards import (
    LocalShards,
    NamedTensor,
    OptimizedTensor,
    Selection,
    find_named,
    find_stepped,
    is_engine,
    name_tensors,
    names_by_id,
)
from harness.checkpoint.sharding.state_form import Form
from harness.checkpoint.state.trainer_state import AnyWatched, Watched
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError


def find_watched(
    accelerator: Accelerator,
    watched: AnyWatched,
    *,
    weights_only: bool,
    dtype: torch.dtype | None,
    restoring: bool = False,
) -> LocalShards:
    """Find what this rank holds of all that is watched; see `held.find_held`.

    Effects: not collective; main thread, between steps; reads metadata only.

    Raises:
        CheckpointError: if something is not understood, or two optimizers train the same parameter.
    """
    selection = Selection(weights_only, dtype, accelerator.is_main_process, restoring)
    found = [
        find_named(part.model, part.optimizer, selection, named)
        for part, named in zip(watched.parts, _named(watched.parts), strict=True)
    ]
    if len(found) == 1:
        return found[0]
    if not weights_only:
        _refuse_trained_twice(watched.parts, found)
    return _merged(found)


def find_watched_stepped(watched: AnyWatched) -> list[tuple[Watched, list[OptimizedTensor]]]:
    """What each optimizer steps on, with the part that it was given with; see `held.find_stepped`.

    Effects: as `find_watched`.
    """
    return [
        (part, find_stepped(part.model, part.optimizer, named))
        for part, named in zip(watched.parts, _named(watched.parts), strict=True)
        if part.optimizer is not None
    ]


def find_watched_parameters(watched: AnyWatched) -> list[tuple[Watched, Mapping[str, Tensor]]]:
    """Of each part the parameters that an optimizer could step on as they are, by name: none where they are flattened.

    Effects: as `find_watched`.
    """
    return [
        (part, {} if named.units or is_engine(part.model) else named.state.parameters)
        for part, named in zip(watched.parts, _named(watched.parts), strict=True)
    ]


def _named(parts: Sequence[Watched]) -> list[NamedTensor]:
    """The tensors of each part by name; each part knows the names of the others' parameters."""
    named_before: dict[int, str] = {}
    # All of them are kept until the last one is named: the identity of a tensor that is freed may come again.
    found = [name_tensors(part.model, part.prefix, named_before) for part in parts]
    names = {identity: name for each in found for identity, name in names_by_id(each.state).items()}
    return [each._replace(state=replace(each.state, others=names)) for each in found] if len(found) > 1 else found


def _refuse_trained_twice(parts: Sequence[Watched], found: Sequence[LocalShards]) -> None:
    trained_by: dict[str, str] = {}
    for part, held in zip(parts, found, strict=True):
        for name in (name for names in held.group_names() for name in names):
            if (first := trained_by.setdefault(name, part.name)) != part.name:
                raise CheckpointError(
                    f"watch(): {name} is trained by the optimizers of {first!r} and {part.name!r}, and a checkpoint "
                    "holds one state of a parameter; leave it out of one of them, or use checkpoint.save_weights_only"
                )


def _merged(found: Sequence[LocalShards]) -> LocalShards:
    """All of them as one; its `sources` are those of the parts in order."""
    held = LocalShards(
        sources=_sources(found),
        aliases={alias: name for each in found for alias, name in each.aliases.items()},
        groups=[group for each in found for group in each.groups],
        sharded_modules=tuple(module for each in found for module in each.sharded_modules),
        sizes=[size for each in found for size in each.sizes],
        members=[member for each in found for member in each.members],
        trees=[tree for each in found for tree in each.trees],
        forms=_forms(found),
    )

    def complete(collectives: Collectives) -> None:
        for each in found:
            each.complete(collectives)
        held.sources = _sources(found)
        held.forms = _forms(found)  # FSDP1 gathers those of other ranks

    def refresh() -> None:
        for each in found:
            each.refresh()

    held.complete, held.refresh = complete, refresh
    return held


def _forms(found: Sequence[LocalShards]) -> dict[str, Form]:
    return {name: form for each in found for name, form in each.forms.items()}


def _sources(found: Sequence[LocalShards]) -> list[TensorShard]:
    """The parts' sources; what no optimizer of any part trains may change between steps, and is copied at once."""
    trained = {name for each in found for names in each.group_names() for name in names}
    sources = [source for each in found for source in each.sources]
    if not trained:
        return sources
    return [
        replace(source, at_once=source.spec.name not in trained) if source.spec.section == "model" else source
        for source in sources
    ]
