"""Find a rank's shards of all watched models, with prefixed names, and merge them.

    name the tensors of every model  ->  `find_shards` for each model  ->  one `LocalShards`

A tensor that two models share is stored under its name in the first; its name in the second is an alias, as for tied
weights. An optimizer may train parameters of another model, unless FSDP1 or ZeRO has flattened them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from harness.checkpoint.format.tensor_shard import TensorShard
from harness.checkpoint.sharding.find_shards import (
    NamedModel,
    find_optimized,
    find_shards,
    is_deepspeed_engine,
    name_model,
)
from harness.checkpoint.sharding.local_shards import LocalShards, OptimizedTensor, Selection, names_by_id
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
    """Find this rank's shards of weights, buffers and optimizer states; see `Selection` for the options.

    Effects: not collective; main thread, between steps; reads metadata only.

    Raises:
        CheckpointError: if a model or optimizer has an unsupported structure, or two optimizers train one parameter.
    """
    selection = Selection(weights_only, dtype, accelerator.is_main_process, restoring)
    found = [
        find_shards(part.model, part.optimizer, selection, named)
        for part, named in zip(watched.parts, _named(watched.parts), strict=True)
    ]
    if len(found) == 1:
        return found[0]
    if not weights_only:
        _refuse_trained_twice(watched.parts, found)
    return MergedShards.of(found)


def find_watched_optimized(watched: AnyWatched) -> list[tuple[Watched, list[OptimizedTensor]]]:
    """List the tensors that each optimizer steps on, by part.

    Effects: as `find_watched`.
    """
    return [
        (part, find_optimized(part.model, part.optimizer, named))
        for part, named in zip(watched.parts, _named(watched.parts), strict=True)
        if part.optimizer is not None
    ]


def find_watched_parameters(watched: AnyWatched) -> list[tuple[Watched, Mapping[str, Tensor]]]:
    """List the named parameters that an optimizer can step on, by part; none if they are flattened.

    Effects: as `find_watched`.
    """
    return [
        (part, {} if named.units or is_deepspeed_engine(part.model) else named.state.parameters)
        for part, named in zip(watched.parts, _named(watched.parts), strict=True)
    ]


def _named(parts: Sequence[Watched]) -> list[NamedModel]:
    """Name the tensors of each part; each result includes the names of the other parts' parameters."""
    named_before: dict[int, str] = {}
    # Keep all results until the last part is named: the `id` of a freed tensor may be reused.
    found = [name_model(part.model, part.prefix, named_before) for part in parts]
    names = {identity: name for each in found for identity, name in names_by_id(each.state).items()}
    return [each._replace(state=replace(each.state, others=names)) for each in found] if len(found) > 1 else found


def _refuse_trained_twice(parts: Sequence[Watched], found: Sequence[LocalShards]) -> None:
    trained_by: dict[str, str] = {}
    for part, shards in zip(parts, found, strict=True):
        for name in (name for names in shards.group_names() for name in names):
            if (first := trained_by.setdefault(name, part.name)) != part.name:
                raise CheckpointError(
                    f"watch(): {name} is trained by the optimizers of {first!r} and {part.name!r}, and a checkpoint "
                    "holds one state of a parameter; remove it from one of them, or use checkpoint.save_weights_only"
                )


@dataclass
class MergedShards(LocalShards):
    """Merge the shards of several models; `tensors` are those of the parts, in order."""

    parts: Sequence[LocalShards] = ()

    @classmethod
    def of(cls, parts: Sequence[LocalShards]) -> MergedShards:
        """Merge the shards of several models."""
        return cls(
            tensors=_tensors(parts),
            aliases={alias: name for each in parts for alias, name in each.aliases.items()},
            groups=[group for each in parts for group in each.groups],
            sharded_modules=tuple(module for each in parts for module in each.sharded_modules),
            sizes=[size for each in parts for size in each.sizes],
            members=[member for each in parts for member in each.members],
            trees=[tree for each in parts for tree in each.trees],
            forms=_forms(parts),
            parts=parts,
        )

    def complete(self, collectives: Collectives) -> None:
        """Implement `LocalShards.complete`."""
        for each in self.parts:
            each.complete(collectives)
        self.tensors = _tensors(self.parts)
        self.forms = _forms(self.parts)  # FSDP1 adds those of other ranks

    def refresh(self) -> None:
        """Implement `LocalShards.refresh`."""
        for each in self.parts:
            each.refresh()


def _forms(parts: Sequence[LocalShards]) -> dict[str, Form]:
    return {name: form for each in parts for name, form in each.forms.items()}


def _tensors(parts: Sequence[LocalShards]) -> list[TensorShard]:
    """Concatenate the tensors of all parts. A weight that no optimizer of any part trains is volatile."""
    trained = {name for each in parts for names in each.group_names() for name in names}
    tensors = [shard for each in parts for shard in each.tensors]
    if not trained:
        return tensors
    return [
        replace(shard, is_volatile=shard.spec.name not in trained) if shard.spec.section == "model" else shard
        for shard in tensors
    ]
