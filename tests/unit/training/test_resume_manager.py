"""A run that was cut off and goes on ends as one that was not: on one process, to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.format.commit import VERSION, list_checkpoints, sealed
from harness.checkpoint.format.verify import verify
from harness.errors import CheckpointError, DamagedError, Stopped
from harness.tracking.journal.entries import read_entries

NUM_EPOCHS = 3


class Noisy(Dataset[Any]):
    """Each sample draws from every generator, as augmentation does."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        noise = 0.1 * torch.randn(3) + 0.1 * random.random() + 0.1 * float(np.random.randn())
        return index, torch.full((3,), index / 22) + noise, torch.tensor(float(index % 3))


class Stream(IterableDataset[Any]):
    """The same, without an index. What it draws is its own."""

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for index in range(22):
            yield index, torch.full((3,), index / 22), torch.tensor(float(index % 3))


@dataclass
class Setting:
    """How one training runs, and where it is cut off: at a step by an error or a signal, or in an evaluation."""

    num_workers: int = 0
    persistent: bool = False
    accumulation: int = 1
    seedable: bool = True
    stream: bool = False
    limit: int | None = None
    crash_at: tuple[int, ...] = ()
    signal_at: tuple[int, ...] = ()
    signal_in_evaluation_of: tuple[int, ...] = ()
    crash_in_evaluation_of: tuple[int, ...] = ()
    resume_from: str = "auto"
    save_weights_only: bool = False
    other_model: bool = False
    other_optimizer: bool = False
    other_scheduler: bool = False


@dataclass
class Outcome:
    """What a training has at its end; `seen` has an entry for each batch that was trained on."""

    weights: Tensor
    moments: Tensor
    rates: list[float]
    next_numbers: tuple[float, float, float]
    latest: dict[str, float]
    seen: list[tuple[int, list[int]]] = field(default_factory=list)


class Crash(Exception):
    pass


@contextmanager
def ending_workers(loader: Any) -> Iterator[None]:
    """Workers that outlast an epoch end with it, and not when a garbage collection comes, which waits 5 s for each."""
    try:
        yield
    finally:
        loader.base_dataloader._iterator = None


def train(run_dir: Path, setting: Setting, ignore: set[int]) -> Outcome:
    """One attempt; what is in `ignore` has happened already, and does not again."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    set_seed(1)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=setting.accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=setting.seedable),
    )
    model: Any = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
    if setting.other_model:
        model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Identity(), nn.Linear(6, 1))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if setting.other_optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    dataset: Any = Stream() if setting.stream else Noisy()
    loader: Any = DataLoader(
        dataset,
        batch_size=4,
        shuffle=None if setting.stream else True,
        num_workers=setting.num_workers,
        persistent_workers=setting.persistent,
    )
    eval_loader: Any = DataLoader(Noisy(), batch_size=8)
    model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, loader, eval_loader)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 4, 0.7)
    seen: list[tuple[int, list[int]]] = []

    def happens(at: tuple[int, ...], number: int, offset: int = 0) -> bool:
        if number in at and number + offset not in ignore:
            ignore.add(number + offset)
            return True
        return False

    with (
        PeriodicLogger(
            accelerator,
            every_n_epochs=1,
            run_name="run",
            run_dir=run_dir,
            checkpoint=CheckpointConfig(every_n_steps=4, when_busy="wait", save_weights_only=setting.save_weights_only),
            tracking=TrackingConfig(enabled=False, log_every_n_steps=3),
            resume_from_checkpoint=setting.resume_from,
        ) as logger,
        ending_workers(loader),
    ):
        logger.watch(model, optimizer, None if setting.other_scheduler else scheduler)
        for epoch in logger.epochs(NUM_EPOCHS):
            model.train()
            for indices, inputs, targets in logger.batches(loader, setting.limit):
                with accelerator.accumulate(model):
                    loss = (model(inputs).squeeze(-1) - targets).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    if accelerator.sync_gradients:
                        scheduler.step()
                    optimizer.zero_grad()
                logger.log({"train/loss": loss}, weight=len(targets))
                seen.append((epoch, indices.tolist()))
                if accelerator.sync_gradients and happens(setting.crash_at, logger.step + 1):
                    raise Crash
                if accelerator.sync_gradients and happens(setting.signal_at, logger.step + 1):
                    os.kill(os.getpid(), signal.SIGUSR1)
            model.eval()
            with torch.no_grad():
                for _, inputs, targets in logger.eval_batches(eval_loader):
                    loss = (model(inputs).squeeze(-1) - targets).square().mean()
                    logger.log({"eval/loss": loss}, weight=len(targets))
                    if happens(setting.signal_in_evaluation_of, epoch, offset=1000):
                        os.kill(os.getpid(), signal.SIGTERM)
                    if happens(setting.crash_in_evaluation_of, epoch, offset=1000):
                        raise Crash
    moments = [state[key].flatten() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return Outcome(
        torch.cat([value.detach().double().flatten() for value in model.state_dict().values()]),
        torch.cat(moments),
        scheduler.get_last_lr(),
        (random.random(), float(np.random.rand()), torch.rand(1).item()),
        {key: value for key, value in logger.latest.items() if key.startswith(("train", "eval"))},
        seen,
    )


def train_to_the_end(run_dir: Path, setting: Setting) -> tuple[Outcome, int]:
    """As often as it takes; how it ended, and how many attempts there were."""
    ignore: set[int] = set()
    for attempt in range(1, 10):
        try:
            return train(run_dir, setting, ignore), attempt
        except (Crash, Stopped):
            continue
    raise AssertionError("it does not come to an end")


def points(run_dir: Path) -> dict[tuple[str, int], set[float]]:
    """The values of each metric at each step that any attempt had."""
    found: dict[tuple[str, int], set[float]] = {}
    for entry in read_entries(run_dir / "run" / "outbox"):
        if entry.kind == "metrics":
            for key, value in entry.body["values"].items():
                if key.startswith(("train", "eval")):
                    found.setdefault((key, entry.body["step"]), set()).add(value)
    return found


@pytest.mark.parametrize(
    "setting",
    [
        Setting(crash_at=(3, 6, 11)),
        Setting(signal_at=(1, 7, 11)),
        Setting(num_workers=2, crash_at=(7,), signal_at=(10,)),
        Setting(num_workers=2, persistent=True, seedable=False, crash_at=(9,), signal_at=(11,)),
        Setting(seedable=False, crash_at=(6,), signal_at=(11,)),
        Setting(accumulation=2, signal_at=(2, 4), crash_at=(7,)),
        Setting(accumulation=4, num_workers=2, signal_at=(3,)),
        Setting(limit=4, crash_at=(6,), signal_at=(9,)),
        Setting(signal_in_evaluation_of=(0, 1)),
        Setting(crash_in_evaluation_of=(1, 2)),
        Setting(limit=4, seedable=False, signal_in_evaluation_of=(1,)),
        Setting(stream=True, crash_at=(9,), signal_at=(11,)),
    ],
    ids=lambda setting: ",".join(f"{k}={v}" for k, v in vars(setting).items() if v != getattr(Setting(), k)),
)
def test_end_is_the_same_when_the_run_was_cut_off(tmp_path: Path, setting: Setting) -> None:
    plain = Setting(
        **{
            **vars(setting),
            "crash_at": (),
            "signal_at": (),
            "signal_in_evaluation_of": (),
            "crash_in_evaluation_of": (),
        }
    )
    expected, _ = train_to_the_end(tmp_path / "whole", plain)
    found, attempts = train_to_the_end(tmp_path / "cut", setting)
    in_evaluation = setting.signal_in_evaluation_of + setting.crash_in_evaluation_of
    assert attempts == 1 + len(setting.crash_at) + len(setting.signal_at) + len(in_evaluation)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.moments, expected.moments)
    assert (found.rates, found.next_numbers, found.latest) == (expected.rates, expected.next_numbers, expected.latest)
    assert expected.seen[-len(found.seen) :] == found.seen
    # Every point of the whole run, and no other value for any of them.
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    # And every checkpoint of the whole run, with the same random states. (One more at each stop.)
    for name, record in states(tmp_path / "whole").items():
        assert states(tmp_path / "cut")[name] == record, name


def states(run_dir: Path) -> dict[str, Any]:
    """What the checkpoints hold that is no tensor."""
    checkpoints = run_dir / "run" / "checkpoints"
    return {
        name: json.loads((checkpoints / name / "trainer_state.json").read_text())
        for name, _ in list_checkpoints(checkpoints)
    }


def test_nothing_is_trained_when_the_run_was_complete(tmp_path: Path) -> None:
    first, _ = train_to_the_end(tmp_path, Setting())
    again, _ = train_to_the_end(tmp_path, Setting())
    assert again.seen == []
    assert torch.equal(first.weights, again.weights)


@pytest.mark.parametrize("damage", ["a tensor", "the manifest"])
def test_the_one_before_is_taken_when_the_newest_checkpoint_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    expected, _ = train_to_the_end(tmp_path / "whole", Setting())
    with pytest.raises(Crash):
        train(tmp_path / "cut", Setting(crash_at=(10,)), set())
    checkpoints = tmp_path / "cut" / "run" / "checkpoints"
    path = (
        checkpoints / "step-00000008" / {"a tensor": "optimizer.safetensors", "the manifest": "manifest.json"}[damage]
    )
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    found = train(tmp_path / "cut", Setting(), set())
    assert torch.equal(found.weights, expected.weights)
    told = capsys.readouterr().err
    if damage == "a tensor":
        assert "step-00000008 cannot be used, trying the previous one" in told
    assert "step-00000008/manifest.json: is damaged" in told or damage == "a tensor"
    assert "resumed from epoch-0001" in told
    # Its name is free for the one that the run has come to again, and nothing of it is lost.
    assert not verify(checkpoints / "step-00000008").problems
    (aside,) = checkpoints.glob("damaged-step-00000008-*")
    assert f"step-00000008 is damaged; it was renamed to {aside.name}" in told
    assert (aside / path.name).read_bytes() == content
    assert aside.name not in [name for name, _ in list_checkpoints(checkpoints)]


def test_nothing_is_renamed_when_the_damaged_checkpoint_is_another_runs(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path, Setting(crash_at=(10,)), set())
    (tmp_path / "run").rename(tmp_path / "other")
    checkpoints = tmp_path / "other" / "checkpoints"
    path = checkpoints / "step-00000008" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = sorted(checkpoints.iterdir())
    train(tmp_path, Setting(resume_from=str(tmp_path / "other")), set())
    assert sorted(checkpoints.iterdir()) == before


def test_error_has_the_reason_when_no_checkpoint_holds(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path, Setting(crash_at=(7,)), set())
    for path in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be used; the newest: .*model") as e:
        train(tmp_path, Setting(), set())
    assert "give another run_name, with initial_weights" in str(e.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("disk", r"model\.safetensors: cannot be read: .*symbolic links"),
        ("disk at the manifest", r"manifest\.json: cannot be read: .*symbolic links"),
        ("scheduler", "the run had a scheduler; resume with what it had"),
        ("model", r"the optimizer's parameter group 0 has 4\.bias, 4\.weight, which it had not, and no"),
        ("optimizer", r"SGD keeps momentum_buffer \(torch\.optim\.adamw\.AdamW was saved\); resume with the optimizer"),
    ],
)
def test_start_ends_at_once_when_it_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    with pytest.raises(Crash):
        train(tmp_path, Setting(crash_at=(10,)), set())
    newest = tmp_path / "run" / "checkpoints" / "step-00000008"
    setting = Setting()
    if change.startswith("disk"):
        # What opens it goes round in a circle: an error of the file system that is not "no such file".
        path = newest / ("manifest.json" if "manifest" in change else "model.safetensors")
        path.unlink()
        path.symlink_to(path.name)
    else:
        # Were the tensors read before, this would be told first.
        path = newest / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        setting = Setting(**{f"other_{change}": True})
    with pytest.raises(CheckpointError, match=said) as caught:
        train(tmp_path, setting, set())
    assert not isinstance(caught.value, DamagedError)
    assert "trying the previous one" not in capsys.readouterr().err
    assert newest.exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            "cut off",
            r"epoch-0001/manifest\.json: is damaged: .*; .*step-00000004/manifest\.json: is damaged.*another run",
        ),
        (
            "weights alone",
            r"epoch-0001, step-00000004: only weights were saved.*initial_weights: \S+/checkpoints/epoch-0001",
        ),
    ],
)
def test_run_does_not_begin_again_when_it_has_checkpoints_and_none_can_be_used(
    tmp_path: Path, damage: str, said: str
) -> None:
    with pytest.raises(Crash):
        train(tmp_path, Setting(crash_at=(7,), save_weights_only=damage == "weights alone"), set())
    for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        if damage == "cut off":
            path.write_bytes(path.read_bytes()[:-1])
    before = points(tmp_path)
    with pytest.raises(CheckpointError, match=f"none of the 2 checkpoints in .*{said}"):
        train(tmp_path, Setting(), set())
    assert points(tmp_path) == before
    assert not list((tmp_path / "run" / "checkpoints").glob("damaged-*"))


def test_run_does_not_pass_by_a_checkpoint_of_a_newer_format(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path, Setting(crash_at=(7,)), set())
    newest = tmp_path / "run" / "checkpoints" / "epoch-0001"
    record = json.loads((newest / "manifest.json").read_text())
    record = {key: value for key, value in record.items() if key != "checksum"} | {"version": VERSION + 1}
    (newest / "manifest.json").write_text(sealed(record))
    said = rf"epoch-0001/manifest\.json: has format version {VERSION + 1}, this harness reads 2 to {VERSION}; update"
    with pytest.raises(CheckpointError, match=said):
        train(tmp_path, Setting(), set())
    assert newest.exists()


def test_run_begins_when_there_is_nothing_but_what_a_save_has_left(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path, Setting(crash_at=(3,)), set())
    left = tmp_path / "run" / "checkpoints" / ".tmp-step-00000004-1"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    downloaded = tmp_path / "run" / "downloads" / "models-m-1" / "model.safetensors"
    downloaded.parent.mkdir(parents=True)
    downloaded.write_bytes(b"what the run has begun with")
    expected, _ = train_to_the_end(tmp_path / "whole", Setting())
    assert torch.equal(train(tmp_path, Setting(), set()).weights, expected.weights)
    # It has checkpoints of its own now.
    assert not (tmp_path / "run" / "downloads").exists()
