from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from harness.checkpoint.format.names import named_state, unwrapped
from harness.errors import CheckpointError


class DistributedDataParallel(nn.Module):
    """As torch's own: known by its class's name, holds the model under `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedEngine(DistributedDataParallel):
    pass


class FSDPLinear(DistributedDataParallel):
    """As FSDP2 makes them: a subclass on the fly of the user's class."""


class Net(nn.Module):
    """Has a submodule of its own that is called `module`, and buffers of both kinds."""

    scale: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.module(x))) * self.scale
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("a", torch.ones(2))
        self.register_buffer("b", self.a)


def names(model: nn.Module) -> set[str]:
    state = named_state(model)
    return {*state.parameters, *state.buffers, *state.aliases}


def test_names_equal_state_dict_when_not_wrapped() -> None:
    model = Net()
    state = named_state(model)
    assert names(model) == set(model.state_dict())
    assert list(state.parameters) == [name for name, _ in model.named_parameters()]
    assert all(state.parameters[name] is parameter for name, parameter in model.named_parameters())


def test_own_submodule_keeps_its_name_when_called_module() -> None:
    assert {"module.weight", "module.bias"} <= set(named_state(Net()).parameters)


def test_buffer_is_skipped_when_not_persistent() -> None:
    state = named_state(Net())
    assert "cache" not in names(Net())
    assert set(state.buffers) == {"scale", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


@pytest.mark.parametrize(
    "wrap",
    [
        DistributedDataParallel,
        DeepSpeedEngine,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        checkpoint_wrapper,
        offload_wrapper,
        lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
        lambda model: torch.compile(DistributedDataParallel(checkpoint_wrapper(model)), backend="eager"),
    ],
)
def test_wrappers_are_removed_when_at_the_top(wrap: object) -> None:
    model = Net()
    expected = set(model.state_dict())
    wrapped = wrap(model)  # type: ignore[operator]
    assert names(wrapped) == expected
    assert unwrapped(wrapped) is model


def test_names_stay_the_same_when_a_compiled_model_has_run() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.zeros(2, 2))
    assert set(named_state(compiled).parameters) == {name for name, _ in model.named_parameters()}


def test_wrappers_are_removed_when_inside() -> None:
    model = Net()
    expected = set(model.state_dict())
    model.head[0] = checkpoint_wrapper(model.head[0])
    model.module = torch.compile(model.module, backend="eager")
    assert "module._orig_mod.weight" in dict(model.named_parameters())
    assert names(model) == expected


def test_wrapper_is_known_when_its_class_is_a_subclass() -> None:
    inner = nn.Linear(1, 1)
    assert unwrapped(FSDPLinear(inner)) is inner
    assert unwrapped(inner) is inner


def test_tied_weight_is_stored_once_with_an_alias_when_shared() -> None:
    state = named_state(Tied())
    assert state.aliases == {"head.weight": "embed.weight", "b": "a"}
    assert set(state.parameters) == {"embed.weight", "body.weight", "body.bias"}
    assert set(state.buffers) == {"a"}


def test_whole_module_has_aliases_when_used_twice() -> None:
    shared = nn.Linear(2, 2)
    state = named_state(nn.Sequential(shared, nn.ReLU(), shared))
    assert set(state.parameters) == {"0.weight", "0.bias"}
    assert state.aliases == {"2.weight": "0.weight", "2.bias": "0.bias"}


def test_module_is_passed_over_when_it_is_none() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model.register_module("absent", None)
    assert names(model) == {"0.weight", "0.bias"}


def test_alias_is_found_when_the_tied_module_is_wrapped() -> None:
    model = Tied()
    model.head = checkpoint_wrapper(model.head)
    assert named_state(torch.compile(model, backend="eager")).aliases["head.weight"] == "embed.weight"


class BaseTunerLayer(nn.Module):
    """As PEFT's own: known by its class's name, holds the adapted layer under `base_layer`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def test_error_names_both_when_an_adapter_has_its_weights_name() -> None:
    layer = BaseTunerLayer(nn.Linear(2, 2))
    layer.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"0\.weight: two tensors of the model would have this name"):
        named_state(nn.Sequential(layer))


@pytest.mark.parametrize("tied_first", [True, False])
def test_error_names_both_when_a_tied_tensor_has_anothers_name(tied_first: bool) -> None:
    layer, other = BaseTunerLayer(nn.Linear(2, 2)), nn.Linear(2, 2)
    layer.weight = other.weight
    model = nn.Module()
    for name, module in [("other", other), ("layer", layer)][:: 1 if tied_first else -1]:
        model.add_module(name, module)
    with pytest.raises(CheckpointError, match="would have this name"):
        named_state(model)


def test_tensors_are_found_where_they_are_held_when_looked_up() -> None:
    model = Tied()
    model.head = checkpoint_wrapper(model.head)
    state = named_state(torch.compile(model, backend="eager"))
    held = {**state.parameters, **state.buffers}
    assert set(state.holders) == set(held)
    assert all(state.holders[name][0][state.holders[name][1]] is tensor for name, tensor in held.items())


def test_sizes_change_when_the_model_does() -> None:
    changes: list[Callable[[Net], object]] = [
        lambda model: model.register_parameter("extra", nn.Parameter(torch.zeros(1))),
        lambda model: model.norm.register_buffer("extra", torch.zeros(1)),
        lambda model: model.head.append(nn.ReLU()),
        lambda model: model.norm.__delattr__("running_mean"),
    ]
    for change in changes:
        model = Net()
        sizes = named_state(model).sizes
        assert all(len(container) == size for container, size in sizes)
        change(model)
        assert not all(len(container) == size for container, size in sizes)


def plain() -> nn.Module:
    return nn.Sequential(
        OrderedDict(embed=nn.Embedding(8, 4), norm=nn.BatchNorm1d(4), fc=nn.Linear(4, 6), head=nn.Linear(6, 3))
    )


@pytest.mark.parametrize(
    "wrap", [lambda model: model, DistributedDataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_names_do_not_change_when_peft_adapts_the_model(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    import peft

    model = plain()
    before = dict(model.state_dict(keep_vars=True))
    config = peft.LoraConfig(r=2, target_modules=["fc", "embed"], modules_to_save=["head"], bias="all")
    state = named_state(wrap(peft.get_peft_model(model, config)))
    held = {**state.parameters, **state.buffers}
    assert all(held[name] is tensor for name, tensor in before.items())
    assert set(held) - set(before) == {
        "fc.lora_A.default.weight",
        "fc.lora_B.default.weight",
        "embed.lora_embedding_A.default",
        "embed.lora_embedding_B.default",
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
    }
    assert state.aliases == {}


def test_adapters_have_separate_names_when_peft_has_added_two() -> None:
    import peft

    model = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["fc"]))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["fc", "head"]))
    adapters = {name for name in names(model) if "lora" in name}
    assert adapters == {
        *(f"fc.lora_{side}.{adapter}.weight" for side in "AB" for adapter in ("default", "second")),
        *(f"head.lora_{side}.second.weight" for side in "AB"),
    }
    assert set(plain().state_dict()) <= names(model)


@pytest.mark.parametrize("kind", ["DoraConfig", "IA3Config", "VeraConfig", "LoHaConfig", "OFTConfig", "RandLoraConfig"])
def test_every_tensor_has_one_name_when_peft_uses_other_adapters(kind: str) -> None:
    import peft

    values: dict[str, Any] = {"target_modules": ["fc"]}
    if kind == "DoraConfig":
        config = peft.LoraConfig(r=2, use_dora=True, **values)
    elif kind == "IA3Config":
        config = peft.IA3Config(feedforward_modules=[], **values)
    elif kind == "OFTConfig":
        config = peft.OFTConfig(oft_block_size=2, **values)
    else:
        config = getattr(peft, kind)(r=2, **values)
    model = peft.get_peft_model(plain(), config)
    state = named_state(model)
    assert set(plain().state_dict()) <= {*state.parameters, *state.buffers}
    found = {id(tensor) for tensor in [*state.parameters.values(), *state.buffers.values()]}
    assert found >= {id(parameter) for parameter in model.parameters()}
    assert found >= {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft with transformers 5
def test_every_trained_tensor_is_named_when_peft_learns_a_prompt() -> None:
    import peft
    import transformers

    config = transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    model = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    try:
        state = named_state(model)
    except CheckpointError:
        return  # said, not left out
    found = {id(parameter) for parameter in state.parameters.values()}
    assert found >= {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
