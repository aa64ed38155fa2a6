"""Parameters, buffers and optimizer state of any memory layout and type: saved and restored with equal values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from harness.checkpoint.format.commit import read_manifest
from harness.checkpoint.format.files import LocalFiles
from harness.checkpoint.format.index import CheckpointIndex
from harness.checkpoint.restore.restore import restore_tensors, restore_weights
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.sharding.local_shards import OptimizedTensor
from harness.checkpoint.state.materialize import BuiltState, build_state
from harness.checkpoint.state.trainer_state import Moment, Watched, read_trainer_state
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError
from tests.checkpoint_hooks import NoHooks
from tests.unit.data.test_memory_layout import LAYOUTS

# An optimizer can write only to what has its memory for itself.
OF_PARAMETERS = [name for name in LAYOUTS if name not in ("expanded", "expanded_whole", "windows")]
TYPES = [
    torch.complex64,
    torch.bool,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
]


class Sums(torch.optim.Optimizer):
    """Sums gradients up in a state of the parameter's layout, in one that is transposed, and in one element of many."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["same"] = torch.zeros_like(parameter)
                turned = tuple(reversed(range(parameter.ndim)))
                state["turned"] = torch.zeros(parameter.shape[::-1]).permute(turned)
                state["one"] = torch.zeros(12)[::11][1:]
            state["same"].add_(parameter.grad)
            state["turned"].add_(parameter.grad, alpha=2)
            state["one"].add_(parameter.grad.sum())
            parameter.sub_(state["same"], alpha=self.param_groups[0]["lr"])


def made(seed: float) -> Watched:
    model = nn.Module()
    for name in OF_PARAMETERS:
        model.register_parameter(f"p_{name}", nn.Parameter(LAYOUTS[name](torch.arange(12.0) + seed)))
    for name, view in LAYOUTS.items():
        model.register_buffer(f"b_{name}", view(torch.arange(12.0) * seed))
    for dtype in TYPES:
        model.register_buffer(f"b_{str(dtype)[6:]}", (torch.arange(6) + seed).to(dtype).reshape(2, 3).t())
    model.register_buffer("b_conjugated", torch.tensor([complex(seed, 2 * seed)]).conj())
    return Watched(model, Sums(model.parameters()), None)


def stepped(watched: Watched) -> Watched:
    for parameter in watched.model.parameters():
        parameter.grad = torch.ones_like(parameter) * 0.5 + parameter.detach()
    watched.optimizer.step()  # type: ignore[union-attr]
    return watched


def tensors_of(watched: Watched) -> dict[str, Tensor]:
    assert watched.optimizer is not None
    names = {id(parameter): name for name, parameter in watched.model.named_parameters()}
    state = {f"{kind}.{names[id(p)]}": v for p, kinds in watched.optimizer.state.items() for kind, v in kinds.items()}
    return {**watched.model.state_dict(), **state}


def saved(watched: Watched, accelerator: Accelerator, directory: Path) -> Path:
    saver = Saver(accelerator, Collectives(0, 1), CheckpointConfig(), directory, RunFacts(), NoHooks())
    saver.check(watched)
    saver.save(Moment("step-1", 0, 1, 0, {}))
    saver.close()
    return directory / "step-1"


@pytest.mark.parametrize("has_state", [False, True], ids=["state_to_be_made", "state_is_there"])
def test_values_are_equal_when_restored(accelerator: Accelerator, tmp_path: Path, has_state: bool) -> None:
    first, second = stepped(made(1.0)), made(2.0)
    checkpoint = saved(first, accelerator, tmp_path)
    if has_state:
        stepped(second)
    restore_tensors(accelerator, second, checkpoint, Collectives(0, 1))
    expected, found = tensors_of(first), tensors_of(second)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name
    # And the layouts are the model's own.
    for name, value in made(1.0).model.state_dict().items():
        assert found[name].stride() == value.stride(), name


def test_state_is_flat_when_the_checkpoint_has_an_order(accelerator: Accelerator, tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    first = stepped(Watched(model, Sums(model.parameters()), None))
    checkpoint = saved(first, accelerator, tmp_path)
    manifest = read_manifest(checkpoint)
    record = read_trainer_state(checkpoint, manifest).parts[0].optimizer
    assert "order" in str(record.forms["weight"])
    # As ZeRO partitions it: both parameters in one tensor, with padding.
    flat = nn.Parameter(torch.zeros(16))
    optimizer = Sums([flat])
    partition = OptimizedTensor(optimizer.param_groups[0], flat, ["weight", "bias"])
    build_state(
        BuiltState(optimizer), [partition], CheckpointIndex.of(checkpoint, manifest, LocalFiles(checkpoint)), record
    )
    assert optimizer.state[flat]["turned"].shape == optimizer.state[flat]["same"].shape == (16,)


@pytest.mark.parametrize("how", ["resumed", "initial_weights"])
def test_error_names_the_buffer_when_its_elements_share_memory(
    accelerator: Accelerator, tmp_path: Path, how: str
) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.arange(3.0))
    checkpoint = saved(Watched(model, None, None), accelerator, tmp_path)
    model.register_buffer("scale", torch.ones(1).expand(3))
    restore: Any = restore_tensors if how == "resumed" else restore_weights
    with pytest.raises(CheckpointError, match=r"scale: cannot be restored: elements that share memory .*clone"):
        restore(accelerator, Watched(model, None, None), checkpoint, Collectives(0, 1))


def test_error_names_the_buffer_when_safetensors_lacks_its_type(accelerator: Accelerator, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(
        CheckpointError, match=r"wide: safetensors has no type for torch.complex128; .*persistent=False"
    ):
        saved(Watched(model, None, None), accelerator, tmp_path)
