from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from harness.checkpoint.format.commit import Manifest, list_checkpoints, read_manifest
from harness.checkpoint.format.json_values import decode
from harness.checkpoint.format.verify import require_whole, verify
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError
from tests.checkpoint_hooks import NoHooks
from tests.unit.checkpoint.optimizers import OfObjects

Make = Callable[..., Saver]


class Net(nn.Module):
    """Tied weights, statistics, a frozen layer, and an average that forward moves."""

    ema: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.norm = nn.BatchNorm1d(width)
        self.mix = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.copy = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.copy.weight.lerp_(self.mix.weight, 0.5)
        out: Tensor = self.head(self.frozen(self.mix(self.norm(self.embed(x)))))
        return out


def watched_of(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **values: Any
) -> Watched:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make(trained, **{"lr": 0.1, **values})
    return Watched(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=3))


def train(watched: Watched, steps: int = 1) -> None:
    for _ in range(steps):
        loss = watched.model(torch.arange(16)).square().mean()
        loss.backward()
        watched.optimizer.step()
        watched.scheduler.step()
        watched.optimizer.zero_grad()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "head.weight"}


def moments_of(watched: Watched) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in watched.model.named_parameters()}
    found = {}
    for parameter, values in watched.optimizer.state.items():
        for kind, value in values.items():
            if isinstance(value, Tensor):
                found[f"{kind}.{names[id(parameter)]}"] = value.detach().clone()
            elif value is not None:
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                found[f"{kind}.{names[id(parameter)]}"] = torch.tensor(value, dtype=dtype)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def loaded(path: Path, kind: str = "model") -> dict[str, Tensor]:
    require_whole(path)
    found: dict[str, Tensor] = {}
    for file in path.glob(f"{kind}*.safetensors"):
        found |= load_file(file)
    return found


def moment(step: int) -> Moment:
    return Moment(f"step-{step:08d}", epoch=1, step=step, batches_in_epoch=4, metrics={"eval/loss": 0.5})


@pytest.fixture
def watched() -> Watched:
    torch.manual_seed(0)
    made = watched_of(Net())
    train(made)
    return made


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


class Committed(NoHooks):
    """Calls a function with each committed checkpoint."""

    def __init__(self, function: Callable[[str, Manifest], None]) -> None:
        self._function = function

    def on_checkpoint_committed(self, name: str, manifest: Manifest) -> None:
        self._function(name, manifest)


@pytest.fixture
def make(accelerator: Accelerator, checkpoints: Path) -> Iterator[Make]:
    made: list[Saver] = []

    def make_saver(
        watched: Watched | None,
        committed: Callable[[str, Manifest], None] = lambda name, manifest: None,
        **values: Any,
    ) -> Saver:
        config = CheckpointConfig(**values)
        facts = RunFacts({"strategy": "single"}, {"torch": "2"})
        saver = Saver(accelerator, Collectives(0, 1), config, checkpoints, facts, Committed(committed))
        made.append(saver)
        if watched is not None:
            saver.check(watched)
        return saver

    yield make_saver
    for saver in made:
        with suppress(CheckpointError):
            saver.close()


def block(path: Path) -> Callable[[], None]:
    """Make a directory one that nobody can write to, root included; returns what undoes it."""
    aside = path.with_name(path.name + " aside")
    path.rename(aside)
    path.write_text("")

    def undo() -> None:
        path.unlink()
        aside.rename(path)

    return undo


def test_report_has_the_failure_when_another_save_has_followed(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched)
    undo = block(checkpoints)
    saver.save(moment(1))
    saver.wait()
    undo()
    saver.save(moment(2))
    saver.wait()
    assert saver.status.startswith("step-00000002 written")
    costs, failure = saver.pop_report()
    assert costs["checkpoint/num_failed"] == 1
    assert failure is not None and failure.startswith("step-00000001 FAILED: ") and str(checkpoints) in failure
    saver.save(moment(3))
    saver.wait()
    assert saver.pop_report()[1] is None


# ----------------------------------------------------------------------------- what is saved


def test_checkpoint_is_whole_and_told_when_saved(make: Make, watched: Watched, checkpoints: Path) -> None:
    told: list[tuple[str, Manifest]] = []
    saver = make(watched, lambda name, manifest: told.append((name, manifest)))
    assert saver.save(moment(10))
    saver.close()
    path = checkpoints / "step-00000010"
    manifest = read_manifest(path)
    assert told == [("step-00000010", manifest)]
    assert (manifest.epoch, manifest.step, manifest.metrics) == (1, 10, {"eval/loss": 0.5})
    assert {file.name for file in manifest.files} | {"manifest.json"} == {p.name for p in path.iterdir()}
    assert {*manifest.save} >= {"transport", "blocked_s", "copy_s", "write_s", "sync_s", "durable_s", "overlapped"}
    assert manifest.save["transport"] == "direct"
    record = json.loads((path / "trainer_state.json").read_text())
    assert (record["epoch"], record["step"]) == (1, 10)
    assert record["position"] == {"loaders_done": 0, "batches": 4, "samples_per_batch": None, "accumulation": 1}
    assert record["scheduler"]["last_epoch"] == 1
    (group,) = record["optimizer"]["param_groups"]
    assert group["params"] == ["embed.weight", "norm.weight", "norm.bias", "mix.weight", "mix.bias"]
    assert (group["lr"], decode(group["betas"])) == (0.1, (0.9, 0.999))
    assert len(record["ranks"]) == 1
    assert "step-00000010 written" in saver.status
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000010"]


def test_files_are_the_state_bit_for_bit_when_saved(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched, when_busy="wait")
    expected = {}
    for step in (10, 20, 30):
        expected[step] = weights_of(watched.model), moments_of(watched)
        saver.save(moment(step))
        train(watched)
    saver.close()
    for step, (weights, moments) in expected.items():
        path = checkpoints / f"step-{step:08d}"
        assert_same(loaded(path), weights)
        assert_same(loaded(path, "optimizer"), moments)
    with safe_open(checkpoints / "step-00000010" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    other = Net()
    missing, unexpected = load_model(other, checkpoints / "step-00000010" / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_state_is_of_the_moment_when_training_goes_on(make: Make, checkpoints: Path, is_overlapped: bool) -> None:
    torch.manual_seed(0)
    watched = watched_of(Net(width=700))
    train(watched)
    saver = make(watched)
    if is_overlapped:
        saver.prepare()
        train(watched)  # a step is seen: from now on the fence can be relied on
        saver.save(moment(5))  # the first of its kind does not overlap
        saver.wait()
        train(watched)
    weights, moments = weights_of(watched.model), moments_of(watched)
    last_epoch = watched.scheduler.last_epoch
    assert saver.save(moment(10))
    train(watched, 2)
    watched.model.eval()
    with torch.no_grad():
        watched.model(torch.arange(16))
    saver.close()
    path = checkpoints / "step-00000010"
    assert read_manifest(path).save["overlapped"] == is_overlapped
    assert_same(loaded(path), weights)
    assert_same(loaded(path, "optimizer"), moments)
    assert json.loads((path / "trainer_state.json").read_text())["scheduler"]["last_epoch"] == last_epoch
    assert not torch.equal(watched.model.copy.weight, weights["copy.weight"])
    assert not torch.equal(watched.model.norm.running_mean, weights["norm.running_mean"])


def test_state_is_of_the_moment_when_steps_are_fused_into_backward(make: Make, checkpoints: Path) -> None:
    torch.manual_seed(0)
    model = Net(width=700)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in trained}
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())

    def run() -> None:
        model(torch.arange(16)).square().mean().backward()
        model.zero_grad()

    run()
    saver = make(Watched(model, None, None))
    saver.prepare()
    run()
    saver.save(moment(5))
    saver.wait()
    run()
    weights = weights_of(model)
    saver.save(moment(10))
    run()
    saver.close()
    path = checkpoints / "step-00000010"
    assert read_manifest(path).save["overlapped"]
    assert_same(loaded(path), weights)
    assert not torch.equal(model.mix.weight, weights["mix.weight"])


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "AMSGrad": (torch.optim.AdamW, {"amsgrad": True}),
    "ASGD": (torch.optim.ASGD, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {}),
    "fused AdamW": (torch.optim.AdamW, {"fused": True}),
    "AdamW with a tensor for lr": (torch.optim.AdamW, {"lr": torch.tensor(0.1)}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_state_is_there_when_the_optimizer_is(make: Make, checkpoints: Path, kind: str) -> None:
    make_optimizer, values = OPTIMIZERS[kind]
    watched = watched_of(Net(), make_optimizer, **values)
    train(watched, 2)
    saver = make(Watched(watched.model, watched.optimizer, None))
    saver.save(moment(10))
    expected = moments_of(watched)
    saver.close()
    assert_same(loaded(checkpoints / "step-00000010", "optimizer"), expected)
    assert (kind == "SGD") == (expected == {})
    record = json.loads((checkpoints / "step-00000010" / "trainer_state.json").read_text())
    assert float(decode(record["optimizer"]["param_groups"])[0]["lr"]) == pytest.approx(0.1)


def test_groups_keep_their_parameters_apart_when_there_are_two(make: Make, checkpoints: Path) -> None:
    model = Net()
    groups = [{"params": [model.embed.weight], "lr": 0.5}, {"params": list(model.norm.parameters()), "lr": 0.25}]
    optimizer = torch.optim.SGD(groups)
    saver = make(Watched(model, optimizer, None))
    optimizer.param_groups[0]["lr"] = 0.125  # as it is now, not as it was found
    saver.save(moment(10))
    saver.close()
    record = json.loads((checkpoints / "step-00000010" / "trainer_state.json").read_text())
    assert [(group["lr"], group["params"]) for group in record["optimizer"]["param_groups"]] == [
        (0.125, ["embed.weight"]),
        (0.25, ["norm.weight", "norm.bias"]),
    ]
    assert record["scheduler"] is None


def test_weights_alone_are_there_when_configured_so(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched, save_weights_only=True, dtype="bfloat16")
    expected = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in weights_of(watched.model).items()
    }
    saver.save(moment(10))
    saver.close()
    assert {p.name for p in (checkpoints / "step-00000010").iterdir()} == {"model.safetensors", "manifest.json"}
    assert_same(loaded(checkpoints / "step-00000010"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_alone_are_cast_when_the_optimizer_is_saved_too(
    make: Make, watched: Watched, checkpoints: Path, dtype: str
) -> None:
    saver = make(watched, dtype=dtype)
    moments = moments_of(watched)
    expected = watched.model.mix.weight.detach().to(getattr(torch, dtype))
    saver.save(moment(10))
    saver.close()
    assert torch.equal(loaded(checkpoints / "step-00000010")["mix.weight"], expected)
    assert_same(loaded(checkpoints / "step-00000010", "optimizer"), moments)


def test_files_and_index_are_right_when_the_weights_are_split(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched, max_shard_size="600B")
    expected = weights_of(watched.model)
    saver.save(moment(10))
    saver.close()
    path = checkpoints / "step-00000010"
    assert_same(loaded(path), expected)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert set(index["weight_map"].values()) == {p.name for p in path.glob("model-*.safetensors")}
    assert len(set(index["weight_map"].values())) > 1
    assert "model.safetensors.index.json" in {file.name for file in read_manifest(path).files}


def test_damage_is_found_when_a_byte_of_a_saved_file_changes(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched)
    saver.save(moment(10))
    saver.close()
    path = checkpoints / "step-00000010"
    for file in read_manifest(path).files:
        content = bytearray((path / file.name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / file.name).write_bytes(content)
    assert len(verify(path).problems) == len(read_manifest(path).files) == 3


def test_new_structure_is_saved_when_the_model_changes_between_saves(
    make: Make, watched: Watched, checkpoints: Path
) -> None:
    saver = make(watched, when_busy="wait")
    saver.save(moment(10))
    watched.model.extra = nn.Linear(3, 3)
    watched.optimizer.load_state_dict(watched.optimizer.state_dict())
    weights, moments = weights_of(watched.model), moments_of(watched)
    saver.save(moment(20))
    saver.close()
    assert_same(loaded(checkpoints / "step-00000020"), weights)
    assert_same(loaded(checkpoints / "step-00000020", "optimizer"), moments)
    assert "extra.weight" not in loaded(checkpoints / "step-00000010")


def test_shape_is_the_new_one_when_a_parameter_was_turned_where_it_is(
    make: Make, watched: Watched, checkpoints: Path
) -> None:
    saver = make(watched, when_busy="wait")
    saver.save(moment(10))
    watched.model.embed.weight.data = watched.model.embed.weight.data.t()
    weights = weights_of(watched.model)
    saver.save(moment(20))
    saver.close()
    assert_same(loaded(checkpoints / "step-00000020"), weights)


def test_save_fails_and_the_next_one_does_not_when_the_schedulers_state_is_odd_for_once(
    make: Make, watched: Watched, checkpoints: Path
) -> None:
    saver = make(watched, when_busy="wait")
    saver.save(moment(10))
    watched.scheduler.odd = object()
    saver.save(moment(20))
    saver.wait()
    assert "step-00000020 FAILED: builtins.object is not a number" in saver.status
    del watched.scheduler.odd
    saver.save(moment(30))
    saver.close()
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000010", "step-00000030"}


def test_memory_is_given_back_when_a_new_structure_takes_its_place(make: Make, watched: Watched) -> None:
    saver = make(watched, when_busy="wait")
    saver.save(moment(10))
    saver.wait()
    staging = weakref.ref(saver._pipeline.staging)  # type: ignore[union-attr]
    watched.model.extra = nn.Linear(3, 3)
    saver.prepare()
    gc.collect()
    assert staging() is None
    saver.close()


def test_groups_are_those_of_the_moment_when_one_was_added(make: Make, checkpoints: Path) -> None:
    watched = watched_of(Net(), torch.optim.SGD)
    saver = make(watched, when_busy="wait")
    saver.save(moment(10))
    watched.model.frozen.requires_grad_(True)
    watched.optimizer.add_param_group({"params": list(watched.model.frozen.parameters()), "lr": 0.01})
    train(watched)
    saver.save(moment(20))
    saver.close()
    record = json.loads((checkpoints / "step-00000020" / "trainer_state.json").read_text())
    assert [group["params"] for group in record["optimizer"]["param_groups"]][1:] == [["frozen.weight", "frozen.bias"]]


# ------------------------------------------------------------------------ what is refused


def test_error_names_the_optimizer_when_its_step_needs_a_closure(make: Make) -> None:
    model = nn.Linear(3, 2)
    watched = Watched(model, torch.optim.LBFGS(model.parameters()), None)
    with pytest.raises(CheckpointError, match=r"LBFGS: its step needs a closure.*checkpoint\.save_weights_only: true"):
        make(watched)
    make(watched, save_weights_only=True)


@pytest.mark.parametrize("value", [object(), {"a": [slice(1)]}, {(1, 2): 3.0}])
def test_error_names_the_state_when_it_is_not_understood(make: Make, value: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["history"] = value
    with pytest.raises(CheckpointError, match=r"SGD: cannot save its state 'history' of weight: a .*save_weights_only"):
        make(Watched(model, optimizer, None))


class OfLateObjects(OfObjects):
    """Makes its objects of the first gradient that is not zero."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if any(parameter.grad.any() for group in self.param_groups for parameter in group["params"]):
            super().step(closure)


@pytest.mark.parametrize("optimizer", [OfObjects, OfLateObjects])
def test_objects_are_refused_at_the_first_save_when_a_resume_could_not_make_them(make: Make, optimizer: Any) -> None:
    model = nn.Linear(3, 2)
    watched = Watched(model, optimizer(model.parameters()), None)
    saver = make(watched)
    model(torch.ones(1, 3)).sum().backward()
    watched.optimizer.step()  # type: ignore[union-attr]
    before, numbers = weights_of(model), torch.get_rng_state()
    if optimizer is OfLateObjects:
        with pytest.raises(CheckpointError, match=r"OfLateObjects: made no projectors\.0 of weight"):
            saver.prepare()
    else:
        saver.prepare()
    assert_same(weights_of(model), before)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert watched.optimizer.num_steps == 1  # type: ignore[union-attr]


def test_error_names_the_tensor_when_it_is_sparse(make: Make) -> None:
    model = nn.EmbeddingBag(8, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = make(Watched(model, optimizer, None))
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"momentum_buffer\.weight: is a sparse tensor .*SparseAdam") as caught:
        saver.prepare()
    assert "memory" not in str(caught.value)


def test_error_names_the_tensor_when_two_would_have_its_name(make: Make) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("weight", nn.Parameter(torch.zeros(2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["GG"] = [torch.zeros(2)]
    with pytest.raises(CheckpointError, match=r"cannot save its state 'GG\.0\.weight': another tensor"):
        make(Watched(model, optimizer, None))


def test_weights_are_saved_when_the_optimizer_cannot_be(make: Make, checkpoints: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["history"] = ["a"]
    saver = make(Watched(model, optimizer, None), save_weights_only=True)
    saver.save(moment(10))
    saver.close()
    assert set(loaded(checkpoints / "step-00000010")) == {"weight", "bias"}


def test_error_names_the_group_when_the_optimizer_is_another_models(make: Make) -> None:
    stranger = torch.optim.SGD(nn.Linear(5, 2).parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"group 0 with shape \(2, 5\) is not the model's"):
        make(Watched(Net(), stranger, None))


def test_error_names_the_tensor_when_safetensors_has_no_such_type(make: Make) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"phase: safetensors has no type for torch\.complex128"):
        make(Watched(model, None, None))


def test_error_names_the_scheduler_when_its_state_is_no_json(make: Make, watched: Watched, checkpoints: Path) -> None:
    class Odd(torch.optim.lr_scheduler.StepLR):
        def state_dict(self) -> dict[str, Any]:
            return {"history": object()}

    odd = Watched(watched.model, watched.optimizer, Odd(watched.optimizer, 1))
    with pytest.raises(CheckpointError, match="the state of Odd cannot be written as JSON"):
        make(odd)
    assert list(checkpoints.iterdir()) == []
    make(odd, save_weights_only=True)


# --------------------------------------------------------------------------- busy, failing


def test_checkpoint_is_skipped_when_the_one_before_is_being_written(
    make: Make, watched: Watched, checkpoints: Path
) -> None:
    may_end = threading.Event()
    saver = make(watched, lambda name, manifest: may_end.wait(60) and None)
    try:
        assert saver.save(moment(10))
        assert not saver.save(moment(20))
        assert saver.num_skipped == 1
        assert "skipped" in saver.status
    finally:
        may_end.set()
    saver.close()
    assert [manifest.step for _, manifest in list_checkpoints(checkpoints)] == [10]


@pytest.mark.parametrize(("when_busy", "must"), [("wait", False), ("skip", True)])
def test_checkpoint_waits_when_it_is_told_to(
    make: Make, watched: Watched, checkpoints: Path, when_busy: str, must: bool
) -> None:
    may_end = threading.Event()
    saver = make(watched, lambda name, manifest: may_end.wait(60) and None, when_busy=when_busy)
    assert saver.save(moment(10))
    threading.Timer(0.2, may_end.set).start()
    assert saver.save(moment(20), must=must)
    assert may_end.is_set()
    saver.close()
    assert [manifest.step for _, manifest in list_checkpoints(checkpoints)] == [10, 20]
    assert saver.num_skipped == 0


def test_training_is_not_held_up_when_a_changed_model_meets_a_busy_save(
    make: Make, watched: Watched, checkpoints: Path
) -> None:
    may_end = threading.Event()
    saver = make(watched, lambda name, manifest: may_end.wait(60) and None)
    try:
        saver.save(moment(10))
        watched.model.extra = nn.Linear(3, 3)
        assert not saver.save(moment(20))
    finally:
        may_end.set()
    assert saver.save(moment(30), must=True)
    saver.close()
    assert "extra.weight" in loaded(checkpoints / "step-00000030")


def test_earlier_checkpoint_stays_and_the_error_is_told_when_the_name_is_taken(
    make: Make, watched: Watched, checkpoints: Path
) -> None:
    told: list[str] = []
    saver = make(watched, lambda name, manifest: told.append(name), when_busy="wait")
    saver.save(moment(10))
    (checkpoints / "step-00000020").mkdir()  # in the way
    assert saver.save(moment(20))
    with pytest.raises(CheckpointError, match=r"the last checkpoint could not be written: .*step-00000020"):
        saver.close()
    assert told == ["step-00000010"]
    assert saver.num_failed == 1
    assert "step-00000020 FAILED" in saver.status
    assert [name for name, _ in list_checkpoints(checkpoints)] == ["step-00000010"]
    assert not list(checkpoints.glob(".tmp-*"))


def test_error_is_told_when_the_directory_cannot_be_written(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched)
    undo = block(checkpoints)
    assert saver.save(moment(10))
    with pytest.raises(CheckpointError, match=r"the last checkpoint could not be written: .*checkpoints"):
        saver.close()
    undo()
    assert list(checkpoints.iterdir()) == []


def test_training_steps_on_when_a_save_failed(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched, when_busy="wait")
    saver.prepare()
    train(watched)
    undo = block(checkpoints)
    saver.save(moment(10))
    train(watched)  # the fence is down again
    assert saver.save(moment(20))
    assert saver.num_failed >= 1  # the second may have failed already, too
    train(watched)
    saver.save(moment(30), must=True)
    # Not while the third is being written: it would make the directory anew.
    saver.wait()
    assert saver.num_failed == 3
    undo()
    weights = weights_of(watched.model)
    saver.save(moment(40), must=True)
    saver.close()
    assert [name for name, _ in list_checkpoints(checkpoints)][-1] == "step-00000040"
    assert_same(loaded(checkpoints / "step-00000040"), weights)


@pytest.mark.parametrize("must", [False, True])
def test_next_save_raises_when_one_failed_and_the_run_is_to_stop(
    make: Make, watched: Watched, checkpoints: Path, must: bool
) -> None:
    saver = make(watched, when_busy="wait", when_failed="stop")
    undo = block(checkpoints)
    assert saver.save(moment(10))
    with pytest.raises(
        CheckpointError, match=r"could not be written, and checkpoint\.when_failed is stop: .*checkpoints"
    ):
        saver.save(moment(20), must=must)
    undo()


def test_checkpoint_stands_when_it_could_not_be_published(make: Make, watched: Watched, checkpoints: Path) -> None:
    def refuse(name: str, manifest: Manifest) -> None:
        raise CheckpointError("the outbox is full")

    saver = make(watched, refuse)
    saver.save(moment(10))
    saver.close()
    assert saver.status == "step-00000010 written, but not published: the outbox is full"
    assert len(list_checkpoints(checkpoints)) == 1


def test_unfinished_write_is_told_when_abandoned(make: Make, watched: Watched) -> None:
    may_end = threading.Event()
    saver = make(watched, lambda name, manifest: may_end.wait(60) and None)
    try:
        saver.save(moment(10))
        saver.abandon(timeout_s=0.01)
        assert saver.status == "the last checkpoint was not finished"
    finally:
        may_end.set()


def test_write_in_flight_is_finished_when_there_is_time(make: Make, watched: Watched, checkpoints: Path) -> None:
    saver = make(watched)
    saver.save(moment(10))
    saver.abandon(timeout_s=60)
    assert [name for name, _ in list_checkpoints(checkpoints)] == ["step-00000010"]


def children() -> set[int]:
    """Processes that this one has started and that are not yet gone."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_no_process_is_left_when_closed(make: Make, watched: Watched, checkpoints: Path, fails: bool) -> None:
    before = children()
    saver = make(watched)
    undo = block(checkpoints) if fails else None
    saver.save(moment(10))
    with suppress(CheckpointError):
        saver.close()
    assert children() - before == set()
    if undo:
        undo()
