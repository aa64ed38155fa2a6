"""A transformers model as accelerate can prepare it for FSDP2: each parameter in one group.

accelerate shards the layers that the model names (`_no_split_modules`), then the input and output embeddings by
themselves, then the rest. A parameter comes into two groups, on which torch fails,

    where a layer holds an embedding (`BertEmbeddings`, `ViTEmbeddings`)      "value was None"
    where other modules have the embedding's weight (T5's encoder, decoder)   "is shared with a parameter ..."
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from harness.errors import ConfigError


def separate_embeddings(accelerator: Accelerator, model: nn.Module) -> None:
    """Have the embeddings of a model be in the group alone that accelerate makes of them.

    Layers that hold an embedding are not sharded as layers; modules that are the input embedding but for their
    identity become that module. Names in the model's state stay.

    Effects: changes accelerate's plugin and the model, before it is prepared; not collective, and the same on every
    rank; nothing on disk.

    Args:
        accelerator: of the model; under another strategy than FSDP2 nothing is done.
        model: not prepared yet.

    Raises:
        ConfigError: if the user has named a layer that holds an embedding.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    embeddings = [_embedding(model, name) for name in ("get_input_embeddings", "get_output_embeddings")]
    if embeddings[0] is not None:
        _unite(model, embeddings[0])
    if _wraps_layers(plugin):
        _choose_layers(plugin, model, [each for each in embeddings if each is not None])


def _unite(model: nn.Module, embedding: nn.Module) -> None:
    """Put the embedding in place of modules that have its parameters and do the same with them."""
    own = dict(embedding.named_parameters())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is embedding or type(child) is not type(embedding) or not own:
                continue
            parameters = dict(child.named_parameters())
            is_tied = parameters.keys() == own.keys() and all(parameters[key] is own[key] for key in own)
            if is_tied and _options(child) == _options(embedding):
                setattr(parent, name, embedding)


def _options(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if not key.startswith("_")}


def _choose_layers(plugin: Any, model: nn.Module, embeddings: list[nn.Module]) -> None:
    asked = plugin.transformer_cls_names_to_wrap
    names = list(getattr(model, "_no_split_modules", None) or []) if asked is None else list(asked)
    holding = {
        type(module).__name__
        for module in model.modules()
        if type(module).__name__ in names
        and any(inner is each for inner in list(module.modules())[1:] for each in embeddings)
    }
    if not holding:
        return
    others = [name for name in names if name not in holding]
    if asked is not None:
        raise ConfigError(
            "FSDP_TRANSFORMER_CLS_TO_WRAP",
            f"names {', '.join(sorted(holding))}, which holds an embedding that accelerate shards by itself under "
            f"FSDP2; give {','.join(others) or 'the class of the layers alone'} "
            "(fsdp_transformer_layer_cls_to_wrap in a configuration file of accelerate)",
        )
    plugin.transformer_cls_names_to_wrap = others


def _wraps_layers(plugin: Any) -> bool:
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    return getattr(policy, "__name__", "") == "transformer_auto_wrap_policy"


def _embedding(model: nn.Module, name: str) -> Any:
    """What the model's method of this name gives, as accelerate asks for it; None: it has none."""
    method = getattr(model, name, None)
    try:
        return None if method is None else method()
    except (NotImplementedError, AttributeError):
        return None
