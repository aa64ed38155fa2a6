"""What of an optimizer belongs to no parameter: in the checkpoint, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from harness.checkpoint.format.commit import STATES, read_manifest
from harness.checkpoint.format.verify import verify
from harness.checkpoint.restore.locate import find_checkpoints
from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.checkpoint.restore.resume import resume
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.save.writer_client import write_json
from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.checkpoint.state.optimizer_record import OptimizerRecord, check_step, groups_record
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.trainer_state import Moment, Watched, read_trainer_state
from harness.checkpoint.tools.export import export
from harness.checkpoint.tools.inspect import contents
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError
from tests.checkpoint_hooks import NoHooks
from tests.unit.checkpoint.optimizers import Norm, OfShared, Projector


def made(seed: int = 0, optimizer: Any = OfShared) -> Watched:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return Watched(model, optimizer(model.parameters(), lr=0.01), None)


def train(watched: Watched, steps: int) -> None:
    assert watched.optimizer is not None
    for _ in range(steps):
        watched.model(torch.ones(1, 3)).square().sum().backward()
        watched.optimizer.step()
        watched.optimizer.zero_grad()


def saved(watched: Watched, accelerator: Accelerator, directory: Path) -> Path:
    saver = Saver(accelerator, Collectives(0, 1), CheckpointConfig(), directory, RunFacts(), NoHooks())
    saver.check(watched)
    saver.save(Moment("step-3", 0, 3, 0, {}))
    saver.close()
    return directory / "step-3"


def resumed(watched: Watched, accelerator: Accelerator, directory: Path) -> list[str]:
    lines: list[str] = []
    collectives = Collectives(0, 1)
    assert resume(
        find_checkpoints(directory), accelerator, collectives, watched, RemoteFiles(collectives), lines.append
    )
    return lines


def test_training_is_bit_equal_when_state_has_no_parameter(accelerator: Accelerator, tmp_path: Path) -> None:
    first, second = made(), made(1)
    train(first, 3)
    saved(first, accelerator, tmp_path)
    assert resumed(second, accelerator, tmp_path) == []
    one, other = first.optimizer, second.optimizer
    assert isinstance(one, OfShared) and isinstance(other, OfShared)
    shared: Any = other.state
    assert (shared["num_steps"], other.total_step) == (3, 3)
    assert torch.equal(shared["ema"]["long"], torch.full((3,), 3.0)) and torch.equal(other.mask, one.mask)
    assert other.param_groups[0]["filter"] is len and other.param_groups[0]["norm"] is Norm.FROBENIUS
    # Of another type than the parameter, which torch's load_state_dict would cast.
    assert other.state[second.model.weight]["wide"].dtype == torch.float64  # type: ignore[index]
    train(first, 3)
    train(second, 3)
    assert torch.equal(second.model.weight, first.model.weight)  # type: ignore[arg-type]


def test_file_of_states_is_verified_and_listed_when_it_exists(accelerator: Accelerator, tmp_path: Path) -> None:
    watched = made()
    train(watched, 3)
    checkpoint = saved(watched, accelerator, tmp_path)
    manifest = read_manifest(checkpoint)
    assert STATES in {file.name for file in manifest.files} and STATES not in manifest.weight_files
    assert not verify(checkpoint).problems
    assert any(each["file"] == STATES for each in contents(checkpoint)["tensors"])
    export(checkpoint, tmp_path / "exported.safetensors")
    path = checkpoint / STATES
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert verify(checkpoint).problems
    with pytest.raises(DamagedError, match=r"states\.safetensors is not what was written"):
        read_trainer_state(checkpoint, manifest)


def test_nothing_is_added_when_all_state_is_of_parameters(accelerator: Accelerator, tmp_path: Path) -> None:
    watched = made(optimizer=torch.optim.AdamW)
    train(watched, 3)
    checkpoint = saved(watched, accelerator, tmp_path)
    assert not (checkpoint / STATES).exists()
    record = json.loads((checkpoint / "trainer_state.json").read_text())["optimizer"]
    assert record.keys() == {"param_groups", "frozen", "class"} and record["class"] == "torch.optim.adamw.AdamW"


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, OfShared])
def test_checkpoint_is_resumed_when_an_earlier_version_wrote_it(
    accelerator: Accelerator, tmp_path: Path, optimizer: Any
) -> None:
    first, second = made(optimizer=optimizer), made(1, optimizer)
    train(first, 3)
    as_before = OptimizerRecord()
    checkpoint = saved(first, accelerator, tmp_path)
    _write_as_before(checkpoint)
    assert read_trainer_state(checkpoint, read_manifest(checkpoint)).parts[0].optimizer == as_before
    lines = resumed(second, accelerator, tmp_path)
    assert torch.equal(second.model.weight, first.model.weight)  # type: ignore[arg-type]
    assert [key for state in second.optimizer.state.values() for key in state]  # type: ignore[union-attr]
    assert any("restarts with its initial values" in line for line in lines) == (optimizer is OfShared)


def _write_as_before(checkpoint: Path) -> None:
    """Take away what the version before had not, and seal the checkpoint again."""
    from dataclasses import replace

    from harness.checkpoint.format.commit import MANIFEST, manifest_text

    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    (group,) = state["optimizer"]["param_groups"]
    state["optimizer"] = {"param_groups": [{key: group[key] for key in group if key not in ("weights", "filter")}]}
    (checkpoint / STATES).unlink(missing_ok=True)
    manifest = read_manifest(checkpoint)
    files = [file for file in manifest.files if file.name not in (path.name, STATES)]
    files.append(write_json(path, state))
    (checkpoint / MANIFEST).write_text(manifest_text(replace(manifest, files=tuple(files))))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("state", object(), r"OfShared: cannot save its state\['odd'\]: builtins\.object"),
        ("state", torch.eye(2).to_sparse(), r"OfShared: cannot save its state\['odd'\]: a sparse tensor"),
        ("added", object(), r"OfShared: cannot save its state_dict\(\)\['mask'\]"),
        ("group", torch.eye(2).to_sparse(), "'odd' of parameter group 0 cannot be saved: it has a sparse tensor"),
    ],
)
def test_error_has_the_place_when_a_value_cannot_be_saved(
    accelerator: Accelerator, tmp_path: Path, place: str, value: Any, said: str
) -> None:
    watched = made()
    optimizer: Any = watched.optimizer
    if place == "added":
        optimizer.mask = value
    else:
        (optimizer.state if place == "state" else optimizer.param_groups[0])["odd"] = value
    with pytest.raises(CheckpointError, match=said):
        saved(watched, accelerator, tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        {"class": 3},
        {"forms": {}},
        {"forms": [{"form": {"dict": []}}]},
        {"forms": [{"form": "tensor", "parameters": []}]},
        {"forms": [{"form": {"dict": []}, "parameters": [1]}]},
        {"state": 3},
        {"added": {"$tensor": [1, "float32", []]}},
        {"added": {"$stored": ["0", False]}},
    ],
)
def test_record_is_refused_when_it_is_damaged(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        OptimizerRecord.read(record)


def test_optimizer_is_accepted_when_its_closure_is_optional() -> None:
    check_step(torch.optim.SGD(nn.Linear(1, 1).parameters()))
    check_step(None)
    assert not KeptTensors().tensors


class Mode(Enum):
    FAST = "fast"


@dataclass(frozen=True)
class Frozen:
    rank: int = 4


@dataclass
class Moving:
    rank: int = 4


@pytest.mark.parametrize(
    "value",
    [
        Projector(),
        np.ones(2),
        [nn.Parameter(torch.zeros(2))],
        nn.Parameter(torch.zeros(2)),
        {"x": object(), "k": 3},
        {"x": len, "k": 3},
        Moving(),
    ],
    ids=["object", "array", "foreign_parameters", "foreign_parameter", "objects", "mixed", "dataclass"],
)
def test_error_names_the_value_when_a_group_would_lose_it(accelerator: Accelerator, value: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "odd": value}], lr=0.1)
    shards = find_watched(accelerator, Watched(model, optimizer, None), weights_only=False, dtype=None)
    said = r"optimizer: 'odd' of parameter group 0 cannot be saved: .*; make it .*checkpoint\.save_weights_only"
    with pytest.raises(CheckpointError, match=said):
        groups_record(shards, KeptTensors())


def test_values_are_skipped_when_the_code_makes_them_again(accelerator: Accelerator) -> None:
    model = nn.Linear(2, 2)
    values = {
        "function": len,
        "class": dict,
        "partial": partial(len),
        "mode": Mode.FAST,
        "device": torch.device("cpu"),
        "config": Frozen(),
        "references": [model.weight, model.bias],
        "reference": model.bias,
        "functions": {"first": len, "second": None},
    }
    optimizer = torch.optim.SGD([{"params": [model.weight], "kept": [3, None], **values}], lr=0.1)
    shards = find_watched(accelerator, Watched(model, optimizer, None), weights_only=False, dtype=None)
    (record,) = groups_record(shards, KeptTensors())["param_groups"]
    assert record["kept"] == [3, None] and not values.keys() & record.keys()
