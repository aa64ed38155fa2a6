"""Several models in one run, as a GAN has them: saved, resumed and counted together, on one process."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig, load_model
from harness.checkpoint.format.commit import list_checkpoints
from harness.checkpoint.format.verify import require_whole
from harness.checkpoint.state.trainer_state import Watched
from harness.errors import CheckpointError
from harness.training.watched import StepCounter

NUM_BATCHES = 8
NUM_EPOCHS = 2


class Crash(Exception):
    pass


@dataclass
class Setting:
    """How one GAN is trained: the generator steps once after so many steps of the critic."""

    n_critic: int = 3
    critic_steps: int = 1
    steps_of: str | None = "generator"
    every_n_steps: int = 1
    crash_at_batch: int | None = None
    has_schedulers: bool = True
    reverses: bool = False


class Count:
    """Batches that were trained on, in all attempts: `enumerate` begins anew when a run goes on within an epoch."""

    def __init__(self) -> None:
        self.num_batches = 0

    def state_dict(self) -> dict[str, int]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


@dataclass
class Outcome:
    """What a training has at its end."""

    values: dict[str, Any]
    steps: list[int]
    latest: dict[str, float]


def train(run_dir: Path, setting: Setting) -> Outcome:
    """One attempt; `steps` has the logger's step at the beginning of each batch that was trained on."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    set_seed(1)
    accelerator = Accelerator(cpu=True)
    generator: Any = nn.Sequential(OrderedDict(fc=nn.Linear(2, 4), norm=nn.BatchNorm1d(4)))
    critic: Any = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 1))
    opt_g: Any = torch.optim.AdamW(generator.parameters(), lr=0.01)
    opt_c: Any = torch.optim.RMSprop(critic.parameters(), lr=0.02)
    loader = DataLoader(torch.arange(4.0 * NUM_BATCHES * 4).view(-1, 4) / 64, batch_size=4, shuffle=True)
    generator, critic, opt_g, opt_c, loader = accelerator.prepare(generator, critic, opt_g, opt_c, loader)
    decay_g = torch.optim.lr_scheduler.StepLR(opt_g.optimizer, 2, 0.5) if setting.has_schedulers else None
    decay_c = torch.optim.lr_scheduler.ExponentialLR(opt_c.optimizer, 0.9) if setting.has_schedulers else None
    models = {"critic": (critic, opt_c, decay_c), "generator": (generator, opt_g, decay_g)}
    steps: list[int] = []
    with PeriodicLogger(
        accelerator,
        every_n_epochs=1,
        run_name="run",
        run_dir=run_dir,
        checkpoint=CheckpointConfig(every_n_steps=setting.every_n_steps, when_busy="wait"),
        tracking=TrackingConfig(enabled=False, log_every_n_steps=1),
    ) as logger:
        logger.watch(dict(reversed(models.items())) if setting.reverses else models, steps_of=setting.steps_of)
        count = Count()
        logger.register("count", count)
        for _ in logger.epochs(NUM_EPOCHS):
            for real in logger.batches(loader):
                count.num_batches += 1
                steps.append(logger.step)
                for _ in range(setting.critic_steps):
                    fake = generator(torch.randn(4, 2)).detach()
                    opt_c.zero_grad()  # the generator's backward has left gradients here
                    accelerator.backward(critic(fake).mean() - critic(real).mean())
                    opt_c.step()
                if decay_c is not None:
                    decay_c.step()
                if count.num_batches % setting.n_critic == 0:
                    opt_g.zero_grad()
                    accelerator.backward(-critic(generator(torch.randn(4, 2))).mean())
                    opt_g.step()
                    if decay_g is not None:
                        decay_g.step()
                if setting.crash_at_batch == count.num_batches:
                    raise Crash
    values = {"generator": generator.state_dict(), "critic": critic.state_dict(), "random": torch.rand(3)}
    values |= {"opt_g": opt_g.optimizer.state_dict(), "opt_c": opt_c.optimizer.state_dict()}
    if decay_g is not None and decay_c is not None:
        values |= {"decay_g": decay_g.state_dict(), "decay_c": decay_c.state_dict()}
    return Outcome(values, steps, {name: value for name, value in logger.latest.items() if "perf" not in name})


def names_of(run_dir: Path) -> list[str]:
    """Of the checkpoints that are taken by steps, each of which is whole."""
    directory = run_dir / "run" / "checkpoints"
    names = [name for name, _ in list_checkpoints(directory) if name.startswith("step")]
    for name in names:
        require_whole(directory / name)
    return sorted(names)


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the last bit."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


# ------------------------------------------------------------------------------ files


def test_one_set_of_files_holds_all_models_when_saved(tmp_path: Path) -> None:
    outcome = train(tmp_path, Setting())
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-0002"
    weights = load_file(checkpoint / "model.safetensors")
    expected = {
        f"{model}.{name}": value for model in ("critic", "generator") for name, value in outcome.values[model].items()
    }
    assert_same(weights, expected)
    state = load_file(checkpoint / "optimizer.safetensors")
    assert {name for name in state if name.endswith("generator.fc.weight")} == {
        "exp_avg.generator.fc.weight",
        "exp_avg_sq.generator.fc.weight",
        "step.generator.fc.weight",
    }
    assert {name.split(".")[0] for name in state if ".critic." in name} == {"square_avg", "step"}
    record = json.loads((checkpoint / "trainer_state.json").read_text())
    assert [group["params"][0] for group in record["optimizer"]["param_groups"]] == [
        "critic.0.weight",
        "generator.fc.weight",
    ]
    assert [part["name"] for part in record["parts"]] == ["critic", "generator"]
    assert [part["scheduler"]["last_epoch"] for part in record["parts"]] == [16, 5]
    assert outcome.latest["train/lr/generator"] == 0.0025


def test_models_are_loaded_when_given_as_a_module_dict(tmp_path: Path) -> None:
    outcome = train(tmp_path, Setting(every_n_steps=1000))
    models = nn.ModuleDict(
        {
            "critic": nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 1)),
            "generator": nn.Sequential(OrderedDict(fc=nn.Linear(2, 4), norm=nn.BatchNorm1d(4))),
        }
    )
    load_model(tmp_path / "run" / "checkpoints" / "epoch-0002", model=models)
    assert_same(dict(models["generator"].state_dict()), dict(outcome.values["generator"]))


# ------------------------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting(), [0, 0, 0, 1, 1, 1, 2, 2]),
        (Setting(steps_of="critic"), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Setting(steps_of=None), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Setting(steps_of="critic", critic_steps=2), [0, 2, 4, 6, 8, 10, 12, 14]),
    ],
    ids=["generator", "critic", "first", "two_a_batch"],
)
def test_steps_are_those_of_one_optimizer_when_several_step(
    tmp_path: Path, setting: Setting, expected: list[int]
) -> None:
    assert train(tmp_path, setting).steps[:NUM_BATCHES] == expected


def test_each_checkpoint_is_taken_once_when_a_batch_makes_two_steps(tmp_path: Path) -> None:
    train(tmp_path, Setting(steps_of="critic", critic_steps=2, every_n_steps=3))
    # A multiple of 3 lies behind steps 4, 6, 10, 12 and 16; the last batch of an epoch is its epoch's checkpoint.
    assert names_of(tmp_path) == [f"step-{step:08d}" for step in (4, 6, 10, 12, 18, 22, 24, 28, 30)]


def test_step_is_not_counted_when_the_loss_scaler_skips_it() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counter, scaler = StepCounter(Watched(model, optimizer, None)), torch.amp.GradScaler("cpu")
    counts = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(counter.pop())
    assert counts == [1, 0, 1]
    counter.close()
    optimizer.step()
    assert counter.pop() == 0


def test_no_checkpoint_is_lost_when_an_optimizer_steps_late(tmp_path: Path) -> None:
    train(tmp_path, Setting(steps_of="critic", n_critic=5))
    # The last step of an epoch is in the epoch's own.
    assert names_of(tmp_path) == [f"step-{step:08d}" for step in range(1, 16) if step != 8]
    first = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert not any(".generator." in name for name in load_file(first / "optimizer.safetensors"))
    later = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert any(".generator." in name for name in load_file(later / "optimizer.safetensors"))


# ----------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "setting",
    [
        Setting(crash_at_batch=13),
        Setting(steps_of="critic", crash_at_batch=2),
        Setting(steps_of="critic", crash_at_batch=10, critic_steps=2, has_schedulers=False),
    ],
    ids=["between_generator_steps", "before_the_generator_stepped", "two_steps_a_batch"],
)
def test_end_is_the_same_when_the_run_was_killed(tmp_path: Path, setting: Setting) -> None:
    expected = train(tmp_path / "whole", Setting(**{**vars(setting), "crash_at_batch": None}))
    with pytest.raises(Crash):
        train(tmp_path / "cut", setting)
    found = train(tmp_path / "cut", Setting(**{**vars(setting), "crash_at_batch": None}))
    assert 0 < len(found.steps) < len(expected.steps)
    assert found.steps == expected.steps[-len(found.steps) :]
    assert_same(found.values, expected.values)
    assert found.latest == expected.latest


def test_error_names_the_models_when_resumed_in_another_order(tmp_path: Path) -> None:
    train(tmp_path, Setting(every_n_steps=1000))
    with pytest.raises(
        CheckpointError,
        match=r"is of the models 'critic', 'generator', and watch\(\) was given the models 'generator', 'critic'",
    ):
        train(tmp_path, Setting(reverses=True))


# --------------------------------------------------------------------- what is refused

Watch = Callable[[PeriodicLogger, nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer], None]


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (lambda lg, g, og, d, od: (lg.watch(g, og), lg.watch(d, od)), r"called before.*as a dict: watch"),
        (lambda lg, g, og, d, od: lg.watch([g, d], [og, od]), "model is a list.*as a dict of tuples"),
        (lambda lg, g, og, d, od: lg.watch(g, [og, od]), "optimizer is a list.*as a dict of tuples"),
        (lambda lg, g, og, d, od: lg.watch({"g": (g, og)}, od), "beside a dict"),
        (lambda lg, g, og, d, od: lg.watch({}), "the dict is empty"),
        (lambda lg, g, og, d, od: lg.watch({"g.x": (g, og)}), "'g.x' is not a name.*no dots"),
        (lambda lg, g, og, d, od: lg.watch({"": (g, og)}), "'' is not a name"),
        (lambda lg, g, og, d, od: lg.watch({"keys": (g, og)}), "'keys' is not a name.*nn.ModuleDict"),
        (lambda lg, g, og, d, od: lg.watch({"g": (og, g)}), "'g' is a tuple of \\w*SGD, Linear; give"),
        (lambda lg, g, og, d, od: lg.watch({"g": [g, og]}), "'g' is list; give"),
        (lambda lg, g, og, d, od: lg.watch({"g": (g, og), "d": (d, og)}), "'g' and 'd' have the same optimizer"),
        (lambda lg, g, og, d, od: lg.watch({"g": (g, og), "d": d}, steps_of="d"), "steps_of='d'.*use one of: g"),
        (lambda lg, g, og, d, od: lg.watch(g, og, steps_of="g"), "steps_of='g' is for several models"),
        (lambda lg, g, og, d, od: lg.watch({"d": (d, og)}), "group 0 with shape .* is not the model's"),
    ],
)  # fmt: skip
def test_error_names_the_rule_when_watch_is_called_otherwise(
    tmp_path: Path, accelerator: Accelerator, watch: Watch, message: str
) -> None:
    g, d = nn.Linear(2, 4), nn.Linear(4, 1)
    og, od = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (g, d))
    with (
        pytest.raises(CheckpointError, match=message),
        PeriodicLogger(accelerator, run_dir=tmp_path, tracking=TrackingConfig(enabled=False)) as logger,
    ):
        watch(logger, g, og, d, od)
