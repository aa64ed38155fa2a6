"""Loops of other shapes than one loader and one evaluation: cut off, they go on as if they had not been."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.format.commit import list_checkpoints
from harness.data import rng_state
from harness.data.dataloaders import close_iteration
from harness.data.resumable_loader import DataState, ResumableLoader, ResumePoint
from harness.errors import CheckpointError, HarnessError
from tests.unit.training.test_resume_manager import Crash, Noisy, Stream, points

NUM_EPOCHS = 3


@dataclass
class Loop:
    """A training with dropout and noise in its data, and what happens to it.

    Attributes:
        crash_at: an error after this step, and before it is counted.
        seen: each batch: epoch, which loader, samples.
    """

    run_dir: Path
    crash_at: int | None = None
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every_n_steps=4, when_busy="wait"))
    log_every: int = 3
    accumulation: GradientAccumulationPlugin | None = None
    generator: bool = False
    batch_size: int = 4
    seen: list[tuple[int, str, list[int]]] = field(default_factory=list)

    def run(self, body: Callable[[Loop, int], None], before: Callable[[Loop], None] | None = None) -> Loop:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        set_seed(1)
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_plugin=self.accumulation,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        )
        self.model: Any = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.3), nn.Linear(6, 1))
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(5) if self.generator else None
        loaders: Any = (
            DataLoader(Noisy(), self.batch_size, shuffle=True, generator=generator),
            DataLoader(Noisy(), self.batch_size, shuffle=True),
            DataLoader(Noisy(), 8),
            DataLoader(Noisy(), 8),
        )
        self.model, self.optimizer, self.a, self.b, self.evaluation, self.other_evaluation = self.accelerator.prepare(
            self.model, self.optimizer, *loaders
        )
        try:
            with PeriodicLogger(
                self.accelerator,
                every_n_epochs=1,
                run_name="run",
                run_dir=self.run_dir,
                checkpoint=self.checkpoint,
                tracking=TrackingConfig(enabled=False, log_every_n_steps=self.log_every),
            ) as self.logger:
                if before is not None:
                    before(self)
                self.logger.watch(self.model, self.optimizer)
                for epoch in self.logger.epochs(NUM_EPOCHS):
                    body(self, epoch)
        except Crash:
            pass
        except SystemExit:
            pass
        return self

    def train(self, epoch: int, which: str = "a", limit: int | None = None) -> Iterator[int]:
        """A pass over a loader, step by step."""
        for indices, inputs, targets in self.logger.batches(getattr(self, which), limit):
            with self.accelerator.accumulate(self.model):
                loss = (self.model(inputs).squeeze(-1) - targets).square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.logger.log({"train/loss": loss}, weight=len(targets))
            self.seen.append((epoch, which, indices.tolist()))
            if self.accelerator.sync_gradients and self.crash_at == self.logger.step + 1:
                raise Crash
            yield self.logger.step + 1

    def evaluate(self, loader: Any, name: str = "eval/x") -> Iterator[int]:
        """An evaluation that draws random numbers, batch by batch."""
        for position, (_, inputs, _) in enumerate(self.logger.eval_batches(loader)):
            self.logger.log({name: inputs.mean() + torch.rand(())}, weight=len(inputs))
            yield position

    @property
    def weights(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self.model.state_dict().values()])

    @property
    def names(self) -> list[str]:
        return [name for name, _ in list_checkpoints(self.run_dir / "run" / "checkpoints")]


def exhaust(iterator: Iterator[int]) -> None:
    for _ in iterator:
        pass


def a_then_b(loop: Loop, epoch: int) -> None:
    exhaust(loop.train(epoch, "a"))
    exhaust(loop.train(epoch, "b"))


def a_twice_with_b_between(loop: Loop, epoch: int) -> None:
    exhaust(loop.train(epoch, "a", limit=3))
    exhaust(loop.train(epoch, "b", limit=3))
    exhaust(loop.train(epoch, "a"))


def a_alone(loop: Loop, epoch: int) -> None:
    exhaust(loop.train(epoch))


def a_and_evaluation_of_it(loop: Loop, epoch: int) -> None:
    exhaust(loop.train(epoch))
    assert len(list(loop.evaluate(loop.a))) == 6


@pytest.mark.parametrize(
    ("body", "crash_at", "generator"),
    [
        # In the first loader, in the second, between the two, behind an epoch.
        (a_then_b, 6, True),
        (a_then_b, 10, False),
        (a_then_b, 10, True),
        (a_then_b, 14, True),
        (a_twice_with_b_between, 6, False),
        (a_twice_with_b_between, 10, True),
        (a_twice_with_b_between, 17, True),
        (a_alone, 3, True),
        (a_alone, 6, True),
        (a_alone, 14, True),
        (a_and_evaluation_of_it, 10, False),
        (a_and_evaluation_of_it, 14, True),
    ],
)
def test_result_is_equal_when_resumed_within_an_epoch(
    tmp_path: Path, body: Callable[[Loop, int], None], crash_at: int, generator: bool
) -> None:
    whole = Loop(tmp_path / "whole", generator=generator).run(body)
    Loop(tmp_path / "cut", crash_at=crash_at, generator=generator).run(body)
    found = Loop(tmp_path / "cut", generator=generator).run(body)
    assert found.seen == whole.seen[-len(found.seen) :]
    assert len(found.seen) < len(whole.seen) or crash_at == 3
    assert torch.equal(found.weights, whole.weights)
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    assert found.names == whole.names


def test_no_point_is_lost_when_saved_between_windows(tmp_path: Path) -> None:
    def body(loop: Loop, epoch: int) -> None:
        for step in loop.train(epoch):
            if step == 5:
                loop.logger.save()

    config = CheckpointConfig(when_busy="wait")
    whole = Loop(tmp_path / "whole", checkpoint=config, log_every=4).run(body)
    Loop(tmp_path / "cut", checkpoint=config, log_every=4, crash_at=6).run(body)
    found = Loop(tmp_path / "cut", checkpoint=config, log_every=4).run(body)
    assert found.seen[0] == whole.seen[5]
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    assert torch.equal(found.weights, whole.weights)


def test_epoch_is_saved_when_its_last_step_was_saved(tmp_path: Path) -> None:
    def body(loop: Loop, epoch: int) -> None:
        for step in loop.train(epoch):
            if step == 6:
                loop.logger.save()

    config = CheckpointConfig(when_busy="wait")
    assert Loop(tmp_path, checkpoint=config).run(body).names == ["epoch-0001", "epoch-0002", "epoch-0003"]


def test_epoch_is_saved_when_its_evaluation_was_interrupted(tmp_path: Path) -> None:
    signals = [2]

    def body(loop: Loop, epoch: int) -> None:
        exhaust(loop.train(epoch))
        for _ in loop.evaluate(loop.evaluation):
            if epoch in signals:
                signals.remove(epoch)
                os.kill(os.getpid(), signal.SIGTERM)

    config = CheckpointConfig(when_busy="wait")
    assert Loop(tmp_path / "cut", checkpoint=config).run(body).names[-1] == "step-00000018"
    found = Loop(tmp_path / "cut", checkpoint=config).run(body)
    assert found.names[-2:] == ["step-00000018", "epoch-0003"]
    manifest = json.loads((tmp_path / "cut/run/checkpoints/epoch-0003/manifest.json").read_text())
    assert (manifest["epoch"], manifest["metrics"]["eval/x"]) == (3, found.logger.latest["eval/x"])


def test_draws_are_equal_when_the_second_evaluation_is_interrupted(tmp_path: Path) -> None:
    def body_with(signals: list[int]) -> Callable[[Loop, int], None]:
        def body(loop: Loop, epoch: int) -> None:
            exhaust(loop.train(epoch))
            exhaust(loop.evaluate(loop.evaluation))
            for _ in loop.evaluate(loop.other_evaluation, "eval/y"):
                if epoch in signals:
                    signals.remove(epoch)
                    os.kill(os.getpid(), signal.SIGTERM)

        return body

    config = CheckpointConfig(when_busy="wait")
    whole = Loop(tmp_path / "whole", checkpoint=config).run(body_with([]))
    body = body_with([1])
    Loop(tmp_path / "cut", checkpoint=config).run(body)
    found = Loop(tmp_path / "cut", checkpoint=config).run(body)
    assert torch.equal(found.weights, whole.weights)
    assert points(tmp_path / "cut") == points(tmp_path / "whole")


def test_step_is_counted_when_stopped_in_an_evaluation_within_it(tmp_path: Path) -> None:
    def body_with(signals: list[int]) -> Callable[[Loop, int], None]:
        def body(loop: Loop, epoch: int) -> None:
            for step in loop.train(epoch):
                if step in (3, 9, 12):
                    for _ in loop.evaluate(loop.evaluation):
                        if step in signals:
                            signals.remove(step)
                            os.kill(os.getpid(), signal.SIGTERM)

        return body

    config = CheckpointConfig(when_busy="wait")
    whole = Loop(tmp_path / "whole", checkpoint=config).run(body_with([]))
    body = body_with([9])
    assert Loop(tmp_path / "cut", checkpoint=config).run(body).names[-1] in ("step-00000009", "step-00000010")
    found = Loop(tmp_path / "cut", checkpoint=config).run(body)
    assert found.seen == whole.seen[-len(found.seen) :]
    assert torch.equal(found.weights, whole.weights)


def test_epoch_is_saved_when_an_accumulation_is_open_at_its_end(tmp_path: Path) -> None:
    def plugin() -> GradientAccumulationPlugin:
        return GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)

    config = CheckpointConfig(when_busy="wait")
    whole = Loop(tmp_path / "whole", checkpoint=config, accumulation=plugin()).run(a_alone)
    assert [name for name in whole.names if name.startswith("epoch")] == ["epoch-0001", "epoch-0002", "epoch-0003"]
    Loop(tmp_path / "cut", checkpoint=config, accumulation=plugin(), crash_at=4).run(a_alone)
    found = Loop(tmp_path / "cut", checkpoint=config, accumulation=plugin()).run(a_alone)
    assert 0 < len(found.seen) < len(whole.seen)
    assert found.seen == whole.seen[-len(found.seen) :]
    assert torch.equal(found.weights, whole.weights)


def test_error_when_two_loaders_are_iterated_at_once(tmp_path: Path) -> None:
    def body(loop: Loop, epoch: int) -> None:
        for _ in zip(loop.train(epoch, "a"), loop.train(epoch, "b"), strict=True):
            pass

    with pytest.raises(HarnessError, match="two training loaders are iterated over at the same time"):
        Loop(tmp_path).run(body)


def test_message_when_the_run_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path).run(a_alone)
    assert Loop(tmp_path).run(a_alone).seen == []
    assert "the run is complete: epoch 3, step 18; to train on, raise the limits" in capsys.readouterr().err


class Counter:
    """Something of the user's that goes on, and keeps the tensors that it is given."""

    def __init__(self) -> None:
        self.count = 0
        self.counts = torch.zeros(3, dtype=torch.bfloat16)

    def add(self) -> None:
        self.count += 1
        self.counts += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.counts = state["count"], state["counts"]


@pytest.mark.parametrize("is_before", [True, False])
def test_registered_state_resumes_when_before_or_after_watch(tmp_path: Path, is_before: bool) -> None:
    def run(crash_at: int | None) -> int:
        counter = Counter()

        def before(loop: Loop) -> None:
            if is_before:
                loop.logger.register("harness", counter)

        def body(loop: Loop, epoch: int) -> None:
            if not is_before and not loop.seen:
                loop.logger.register("harness", counter)
            for _ in loop.train(epoch):
                counter.add()

        Loop(tmp_path, crash_at=crash_at).run(body, before)
        assert counter.counts.tolist() == [counter.count] * 3
        return counter.count

    assert run(crash_at=10) == 9
    assert run(crash_at=None) == 18


def test_error_when_registered_state_cannot_be_saved(tmp_path: Path) -> None:
    class Sparse(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"values": torch.eye(3).to_sparse()}

    def before(loop: Loop) -> None:
        with pytest.raises(CheckpointError, match=r"register\('sparse'\): its state cannot be saved: a sparse tensor"):
            loop.logger.register("sparse", Sparse())

    Loop(tmp_path, crash_at=1).run(a_alone, before)


def test_error_or_warning_when_registered_names_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def before(loop: Loop) -> None:
        loop.logger.register("mine", Counter())
        with pytest.raises(CheckpointError, match="this name is registered already"):
            loop.logger.register("mine", Counter())

    Loop(tmp_path, crash_at=10).run(a_alone, before)

    def late(loop: Loop, epoch: int) -> None:
        a_alone(loop, epoch)
        with pytest.raises(CheckpointError, match="training has begun"):
            loop.logger.register("late", Counter())

    Loop(tmp_path, crash_at=16).run(late, lambda loop: loop.logger.register("yours", Counter()))
    told = capsys.readouterr().err
    assert "the checkpoint has a state of 'mine', and no object of that name is registered" in told
    assert "'yours' is not in the checkpoint: it starts from its initial state" in told


def test_warning_when_the_samples_of_a_step_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path, crash_at=4, checkpoint=CheckpointConfig(every_n_steps=3, when_busy="wait")).run(a_alone)
    found = Loop(tmp_path, batch_size=6).run(a_alone)
    told = capsys.readouterr().err
    assert "an optimizer step now takes 6 samples; before the resume it took 4" in told
    assert "the epoch continues at batch 2" in told
    assert sum(len(samples) for epoch, _, samples in found.seen if epoch == 0) == 22 - 12


def test_batch_size_changes_when_the_data_set_is_iterable() -> None:
    from harness.data.dataloaders import with_batch_size

    assert [len(indices) for indices, *_ in with_batch_size(DataLoader(Stream(), 4), 6)] == [6, 6, 6, 4]


def test_even_batches_is_set_when_the_sampler_is_wrapped(accelerator: Accelerator) -> None:
    loader: Any = prepare_data_loader(
        DataLoader(TensorDataset(torch.arange(6)), 2), num_processes=2, process_index=1, put_on_device=False
    )
    batches = ResumableLoader(accelerator)
    for even_batches, num_batches in ((True, 2), (False, 1), (True, 2)):
        # As `join_uneven_inputs` does, and undoes.
        loader.batch_sampler.even_batches = even_batches
        _, iterator = batches.begin(loader, None)
        assert len(list(iterator)) == num_batches
        batches.end_loader()
        batches.release()


class NoisyStream(IterableDataset[Any]):
    """Samples that draw from every generator as they are read, without an index."""

    def __iter__(self) -> Iterator[Any]:
        return (Noisy()[index] for index in range(22))


class DrawingSampler:
    """Indices that are drawn one after another, from this process's random numbers."""

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(22) for _ in range(22))


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "distributed_sampler": lambda: DataLoader(Noisy(), 4, sampler=DistributedSampler(Noisy(), 1, 0)),
    "drawing_sampler": lambda: DataLoader(Noisy(), 4, sampler=DrawingSampler()),  # type: ignore[arg-type]
    "workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1),
    "persistent_workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "without_batches": lambda: DataLoader(Subset(Noisy(), range(6)), batch_size=None, shuffle=True),
    "stream": lambda: DataLoader(NoisyStream(), 4),
    "stream_with_workers": lambda: DataLoader(NoisyStream(), 4, num_workers=1),
}


def two_passes(batches: ResumableLoader, loader: Any, first: ResumePoint | None) -> Iterator[Any]:
    """Passes over a loader with steps that draw; of each step what is drawn, and how to go on after it."""
    device = torch.device("cpu")
    for epoch in range(2):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        over, iterator = batches.begin(loader, first)
        first = None
        for _, inputs, _ in iterator:
            drawn = (inputs.tolist(), random.random(), float(np.random.randn()), torch.rand(()).item())
            batches.batches_done += 1
            state = DataState.from_json(json.loads(json.dumps(batches.state.to_json())))
            yield (
                drawn,
                ResumePoint(batches.batches_done, state, rng_state.decode(rng_state.encode(rng_state.capture(device)))),
            )
        batches.end_loader()
        batches.release()
        close_iteration(over, iterator)
        batches.end_epoch()
    # Workers end now, and not at a garbage collection.
    getattr(loader, "base_dataloader", loader)._iterator = None


@pytest.mark.parametrize("is_prepared", [True, False], ids=["prepared", "not_prepared"])
@pytest.mark.parametrize("kind", LOADERS)
def test_draws_are_equal_when_resumed_within_an_iteration(
    accelerator: Accelerator, kind: str, is_prepared: bool
) -> None:
    def loader() -> Any:
        made = LOADERS[kind]()
        return prepare_data_loader(made, put_on_device=False) if is_prepared else made

    set_seed(1)
    whole = list(two_passes(ResumableLoader(accelerator), loader(), None))
    assert len(whole) == 12
    # After the first batch, in the middle, after the last one, which only a loader's end shows.
    for num_done in (1, 3, 6):
        set_seed(2)
        going_on = whole[num_done - 1][1]
        batches = ResumableLoader(accelerator)
        batches.restore(going_on.data, 0, going_on.batches_done)
        resumed = list(two_passes(batches, loader(), going_on))
        assert [drawn for drawn, _ in resumed] == [drawn for drawn, _ in whole[num_done:]], num_done


def test_draws_are_equal_when_the_loader_was_not_prepared(tmp_path: Path) -> None:
    def not_prepared(loop: Loop) -> None:
        loop.a = DataLoader(Noisy(), 4, sampler=DistributedSampler(Noisy(), 1, 0))

    whole = Loop(tmp_path / "whole").run(a_alone, not_prepared)
    Loop(tmp_path / "cut", crash_at=10).run(a_alone, not_prepared)
    found = Loop(tmp_path / "cut").run(a_alone, not_prepared)
    assert found.seen == whole.seen[-len(found.seen) :]
    assert torch.equal(found.weights, whole.weights)
