"""Loops of other people's, run with autologging on: each epoch's checkpoint is the state that the loop itself had."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import GeneralTracker
from mlflow.pytorch import _pytorch_autolog
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.autologging.settings import AutologSettings
from harness.errors import CheckpointError, RunDirError
from harness.tracking.journal.entries import read_entries
from harness.tracking.mlflow.names import clean_key
from tests.unit.autologging.loops import Loop, On, checkpoints, images, require_states


def test_checkpoints_equal_the_loops_state_when_it_evaluates(on: On, tmp_path: Path) -> None:
    switch = on()
    loop = Loop()
    loop.plain(3)
    switch.finish()
    require_states(tmp_path, loop.states)
    found = checkpoints(tmp_path)
    assert [manifest.step for manifest in found.values()] == [5, 10, 15]
    assert [manifest.metrics["train/lr"] for manifest in found.values()] == [1e-2, 5e-3, 2.5e-3]
    assert {"accuracy", "train/loss"} <= found["epoch-0003"].metrics.keys()
    assert found["epoch-0001"].metrics["train/loss"] == pytest.approx(sum(loop.losses[:5]) / 5)


def test_loss_is_of_one_batch_when_the_script_adds_in_place(on: On, tmp_path: Path) -> None:
    switch = on()
    loop = Loop()
    total: Tensor | None = None
    for batch in loop.train:
        loss = loop.loss(batch)
        loop.accelerator.backward(loss)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        total = loss.detach() if total is None else total.mul_(2).add_(loss.detach())
        loss.detach().mul_(10)
    switch.finish()
    assert checkpoints(tmp_path)["epoch-0001"].metrics["train/loss"] == pytest.approx(sum(loop.losses) / 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_script_computes_the_same_when_it_is_autologged(on: On, workers: int) -> None:
    plain = Loop(workers=workers)
    plain.plain(2)
    switch = on()
    logged = Loop(workers=workers)
    logged.plain(2)
    switch.finish()
    assert logged.losses == plain.losses
    assert all(torch.equal(a[k], b[k]) for a, b in zip(logged.states, plain.states, strict=True) for k in a)


def accumulates_by_hand(loop: Loop) -> None:
    for _ in range(2):
        loop.model.train()
        for number, batch in enumerate(loop.train):
            loop.accelerator.backward(loop.loss(batch) / 2)
            if number % 2 == 1:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
        loop.keep_state()


def evaluates_within_epochs(loop: Loop) -> None:
    for _ in range(2):
        for number, batch in enumerate(loop.train):
            loop.model.train()
            loop.step(batch)
            if number == 2:
                loop.evaluate(loop.evaluation)
                loop.evaluate(loop.other)
        loop.keep_state()


def never_leaves_train_mode(loop: Loop) -> None:
    for _ in range(2):
        for batch in loop.train:
            loop.step(batch)
        for inputs, _ in loop.evaluation:
            loop.model(inputs).argmax(-1)
        loop.keep_state()
        loop.optimizer.zero_grad()


def evaluates_first_and_on_what_it_trains_on(loop: Loop) -> None:
    loop.evaluate(loop.evaluation)
    loop.evaluate(loop.train)
    for _ in range(2):
        loop.model.train()
        for batch in loop.train:
            loop.step(batch)
        loop.keep_state()
        loop.evaluate(loop.train)


def leaves_epochs_early(loop: Loop) -> None:
    for _ in range(2):
        loop.model.train()
        for number, batch in enumerate(loop.train):
            loop.step(batch)
            if number == 2:
                break
        loop.keep_state()


def leaves_before_it_has_trained(loop: Loop) -> None:
    next(iter(loop.train))
    for _ in range(2):
        loop.model.train()
        for number, batch in enumerate(loop.train):
            if number == 3:
                break
            loop.step(batch)
        loop.keep_state()


def fetches_several_before_backward(loop: Loop) -> None:
    for _ in range(2):
        loop.model.train()
        iterator = iter(loop.train)
        while batches := list(itertools.islice(iterator, 2)):
            for batch in batches:
                loop.accelerator.backward(loop.loss(batch))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.keep_state()


def trains_in_eval_mode(loop: Loop) -> None:
    loop.model.eval()
    for _ in range(2):
        for batch in loop.train:
            loop.step(batch)
        with torch.no_grad():
            for inputs, _ in loop.evaluation:
                loop.model(inputs)
        loop.keep_state()


def holds_an_evaluation_open(loop: Loop) -> None:
    for _ in range(2):
        samples = iter(loop.evaluation)
        next(samples)
        loop.model.train()
        for batch in loop.train:
            loop.step(batch)
        loop.keep_state()
        next(samples)


def trains_on_two_loaders_together(loop: Loop) -> None:
    def for_ever() -> Iterator[Any]:
        while True:
            yield from loop.evaluation

    others = for_ever()
    for _ in range(2):
        loop.model.train()
        for batch in loop.train:
            loop.accelerator.backward(loop.loss(batch) + loop.loss(next(others)))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.keep_state()


def steps_again_behind_a_pass_it_leaves(loop: Loop) -> None:
    for _ in range(2):
        loop.model.train()
        for number, batch in enumerate(loop.train):
            loop.accelerator.backward(loop.loss(batch) / 2)
            if number == 2:
                break
            if number % 2 == 1:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.keep_state()


def evaluates_within_epochs_on_what_it_trains_on(loop: Loop) -> None:
    for _ in range(2):
        for number, batch in enumerate(loop.train):
            loop.model.train()
            loop.step(batch)
            if number == 2:
                loop.evaluate(loop.train)
        loop.keep_state()


def evaluates_before_it_first_trains_in_an_epoch(loop: Loop) -> None:
    for _ in range(3):
        for number, batch in enumerate(loop.train):
            if number == 0:
                loop.evaluate(loop.other)
            loop.model.train()
            loop.step(batch)
        loop.evaluate(loop.evaluation)
        loop.keep_state()


def trains_something_else_beside(loop: Loop) -> None:
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loop.accelerator.gradient_accumulation_steps = 2
    for _ in range(2):
        loop.model.train()
        for batch in loop.train:
            other(torch.ones(2)).sum().backward()
            optimizer.step()
            with loop.accelerator.accumulate(loop.model):
                loop.step(batch)
        loop.keep_state()


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        (accumulates_by_hand, [2, 4]),
        (evaluates_within_epochs, [5, 10]),
        (never_leaves_train_mode, [5, 10]),
        (evaluates_first_and_on_what_it_trains_on, [5, 10]),
        (leaves_epochs_early, [3, 6]),
        (leaves_before_it_has_trained, [3, 6]),
        (fetches_several_before_backward, [3, 6]),
        (trains_in_eval_mode, [5, 10]),
        (holds_an_evaluation_open, [5, 10]),
        (trains_on_two_loaders_together, [5, 10]),
        (steps_again_behind_a_pass_it_leaves, [2, 4]),
        (evaluates_within_epochs_on_what_it_trains_on, [5, 10]),
        (evaluates_before_it_first_trains_in_an_epoch, [5, 10, 15]),
        (trains_something_else_beside, [3, 6]),
    ],
)
def test_epochs_and_steps_equal_the_loops_when_it(
    on: On, tmp_path: Path, body: Callable[[Loop], None], steps: list[int]
) -> None:
    switch = on()
    loop = Loop()
    body(loop)
    switch.finish()
    require_states(tmp_path, loop.states)
    assert [manifest.step for manifest in checkpoints(tmp_path).values()] == steps


def test_steps_are_the_optimizers_when_accelerate_accumulates(on: On, tmp_path: Path) -> None:
    switch = on()
    loop = Loop(Accelerator(cpu=True, gradient_accumulation_steps=2))
    loop.model.train()
    for _ in range(2):
        for batch in loop.train:
            with loop.accelerator.accumulate(loop.model):
                loop.step(batch)
        loop.keep_state()
    switch.finish()
    require_states(tmp_path, loop.states)
    assert [manifest.step for manifest in checkpoints(tmp_path).values()] == [3, 6]


def test_last_checkpoint_exists_when_the_script_peeks_at_the_end(on: On, tmp_path: Path) -> None:
    switch = on(every_n_epochs=5)
    loop = Loop()
    loop.plain(2)
    next(iter(loop.train))
    switch.finish()
    assert {name: manifest.step for name, manifest in checkpoints(tmp_path).items()} == {"epoch-0002": 10}


def test_training_ends_within_an_epoch_when_its_iterator_is_open(on: On, tmp_path: Path) -> None:
    switch = on()
    loop = Loop()
    iterator = iter(loop.train)
    for _ in range(3):
        loop.step(next(iterator))
    switch.finish()
    (name, manifest), *others = checkpoints(tmp_path).items()
    assert (name, manifest.epoch, manifest.step, others) == ("step-00000003", 0, 3, [])


@pytest.mark.parametrize(
    ("stop_at", "done"), [((1, 2), "step-00000009"), ((1, 3), "step-00000010"), ((0, 0), "step-00000002")]
)
def test_script_ends_equal_when_it_is_resumed(on: On, tmp_path: Path, stop_at: tuple[int, int], done: str) -> None:
    switch = on("whole")
    whole = Loop()
    whole.plain(3)
    switch.finish()

    switch = on("cut")
    cut = Loop()

    def stops(epoch: int, batch: int) -> None:
        if (epoch, batch) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as exit:
        cut.plain(3, stops)
    assert exit.value.code == 75
    assert list(checkpoints(tmp_path, "cut"))[-1] == done
    switch.turn_off()

    switch = on("cut")
    resumed = Loop()
    resumed.plain(3)
    switch.finish()
    assert all(torch.equal(resumed.states[-1][key], whole.states[-1][key]) for key in whole.states[-1])
    last = checkpoints(tmp_path, "cut")["epoch-0003"]
    expected = checkpoints(tmp_path, "whole")["epoch-0003"].metrics
    assert {key: last.metrics[key] for key in expected} == expected
    assert resumed.scheduler.last_epoch == whole.scheduler.last_epoch
    # Random states, and the passes of each loader, by which accelerate seeds their order.
    for name in checkpoints(tmp_path, "whole"):
        states = [
            json.loads((tmp_path / run / "checkpoints" / name / "trainer_state.json").read_text())
            for run in ("whole", "cut")
        ]
        assert states[0] == states[1], name


def test_nothing_is_trained_when_all_epochs_are_done(on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    switch = on()
    loop = Loop()
    loop.plain(2)
    switch.finish()
    switch.turn_off()
    switch = on()
    again = Loop()
    again.plain(2)
    accuracy = again.evaluate(again.evaluation)
    # Behind the last epoch a script does what it did: it may have been cut off just here.
    again.accelerator.save({"of": "the end"}, tmp_path / "end.pt")
    assert (tmp_path / "end.pt").exists()
    switch.finish()
    assert len(again.losses) == 2  # one batch each, which has changed nothing
    assert all(torch.equal(again.states[-1][key], loop.states[-1][key]) for key in loop.states[-1])
    assert accuracy == loop.evaluate(loop.evaluation)
    assert "the script's first 2 epochs are complete" in capfd.readouterr().err
    assert list(checkpoints(tmp_path)) == ["epoch-0001", "epoch-0002"]


def test_checkpoints_are_ranked_when_the_script_logs_the_monitor(on: On, tmp_path: Path) -> None:
    switch = on(monitor="score", mode="max", save_top_k=1)
    loop = Loop()
    for score in (1.0, 3.0, 2.0, 0.0):
        loop.model.train()
        for batch in loop.train:
            loop.step(batch)
        loop.accelerator.log({"score": score, "note": "text"})
    switch.finish()
    assert {name: m.metrics["score"] for name, m in checkpoints(tmp_path).items()} == {
        "epoch-0002": 3.0,
        "epoch-0004": 0.0,
    }


@pytest.mark.parametrize("name", ["val/AR@100", "", "x" * 300, "a/../b"], ids=["at", "empty", "long", "path"])
def test_script_trains_when_it_logs_odd_names_at_odd_steps(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    switch = on()
    loop = Loop()
    steps = [torch.tensor(1), np.float32(2), 2.5, "3", 2**63, -1, True]
    loop.accelerator.log({name: 0.5}, step=2**70)
    for batch in loop.train:
        loop.step(batch)
    for step in steps:
        loop.accelerator.log({name: 0.5, "good": 0.25}, step=step)
    switch.finish()
    assert switch.session.logger is not None and switch.session.logger.run_path is not None
    entries = [entry for entry in read_entries(switch.session.logger.run_path / "outbox") if entry.kind == "metrics"]
    of_good = [entry.body for entry in entries if "good" in entry.body["values"]]
    assert [body["step"] for body in of_good] == [1, 2, 2, 3, 5, -1, 1]
    assert all(body["values"] == {"good": 0.25, clean_key(name): 0.5} for body in of_good)
    assert checkpoints(tmp_path)["epoch-0001"].metrics[name] == 0.5
    said = capfd.readouterr().err
    assert said.count(" in MLflow: names hold at most 250 letters") == 1
    assert said.count("no integer of 64 bits") == 1


def test_values_are_logged_or_reported_once_when_of_all_kinds(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    loop = Loop()
    loop.accelerator.log({"early": "text"})
    for _ in range(2):
        loop.model.train()
        for batch in loop.train:
            loop.step(batch)
        ones = {"array": np.array([4.0]), "tensor": torch.tensor([[3.0]]), "flag": True}
        loop.accelerator.log({**ones, "note": "text", "pair": torch.ones(2), "nothing": None})
    switch.finish()
    for manifest in checkpoints(tmp_path).values():
        assert {name: manifest.metrics[name] for name in ones} == {"array": 4.0, "tensor": 3.0, "flag": 1.0}
        assert not manifest.metrics.keys() & {"early", "note", "pair", "nothing"}
    told = capfd.readouterr().err
    for name, kind in {"early": "str", "note": "str", "pair": "Tensor of shape (2,)", "nothing": "NoneType"}.items():
        assert told.count(f"{name} is left out: a {kind} is no number") == 1


def test_script_trains_when_its_batches_are_of_no_one_size(on: On, tmp_path: Path) -> None:
    """Divided among two ranks, as accelerate does it: then it cannot say how large a batch of all ranks is."""
    switch = on()
    accelerator = Accelerator(cpu=True)
    own = DataLoader(images(16), batch_sampler=[list(range(6)), [6, 7], list(range(8, 14)), [14, 15]])  # type: ignore[arg-type]
    train = accelerator.prepare(prepare_data_loader(own, num_processes=2, process_index=0, even_batches=False))
    loop = Loop(accelerator)
    loop.train = train
    loop.plain(1)
    switch.finish()
    assert [manifest.step for manifest in checkpoints(tmp_path).values()] == [2]


def test_line_names_the_remedy_when_models_are_several(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    loop = Loop()
    loop.accelerator.prepare(nn.Linear(2, 2))
    loop.plain(1)
    switch.finish()
    told = capfd.readouterr().err
    assert "2 models were prepared that can be trained (Sequential, Linear)" in told
    assert "watch(model, optimizer)" in told
    assert checkpoints(tmp_path) == {}


def test_checkpoints_contain_the_new_optimizer_when_it_steps(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    loop = Loop()
    loop.plain(1)
    loop.optimizer = loop.accelerator.prepare(torch.optim.SGD(loop.model.parameters(), lr=0.5, momentum=0.9))
    stranger = nn.Linear(2, 2)  # never prepared
    other = loop.accelerator.prepare(torch.optim.SGD(stranger.parameters(), lr=1.0))
    loop.plain(2, lambda *_: other.step())
    switch.finish()
    require_states(tmp_path, loop.states)
    assert [m.metrics["train/lr"] for m in checkpoints(tmp_path).values()] == [1e-2, 0.5, 0.5]
    assert capfd.readouterr().err.count("another optimizer steps from here on (SGD)") == 1
    on()
    with pytest.raises(CheckpointError, match="contains the script's optimizer number 2"):
        Loop().plain(3)


def test_checkpoints_contain_the_model_alone_when_optimizers_are_two(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    loop = Loop()
    other = loop.accelerator.prepare(torch.optim.SGD(loop.model[0].parameters(), lr=1e-3))
    loop.plain(2, lambda *_: other.step())
    switch.finish()
    assert "2 optimizers were prepared for one model: checkpoints contain the model alone" in capfd.readouterr().err
    directories = [tmp_path / "run" / "checkpoints" / name for name in checkpoints(tmp_path)]
    assert len(directories) == 2
    for directory, state in zip(directories, loop.states, strict=True):
        saved = load_file(directory / "model.safetensors")
        assert all(torch.equal(saved[key], state[key]) for key in saved)
        assert not (directory / "optimizer.safetensors").exists()
    on()
    again = Loop()
    again.accelerator.prepare(torch.optim.SGD(again.model[0].parameters(), lr=1e-3))
    for _ in range(2):
        for batch in again.train:
            again.step(batch)
    assert all(torch.equal(again.model.state_dict()[key], loop.model.state_dict()[key]) for key in saved)


def test_schedulers_are_restored_when_one_optimizer_has_several(on: On, tmp_path: Path) -> None:
    def train(num_epochs: int) -> tuple[Loop, list[Any]]:
        loop = Loop()
        inner = loop.optimizer.optimizer
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(inner, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(inner, 4),
        ]
        for epoch in range(num_epochs):
            loop.model.train()
            for batch in loop.train:
                loop.step(batch)
                schedulers[epoch > 1].step()
            loop.keep_state()
        return loop, [each.state_dict() for each in schedulers]

    switch = on("whole")
    whole, states = train(4)
    switch.finish()
    require_states(tmp_path, whole.states, "whole")
    switch = on("cut")
    train(3)
    switch.finish()
    switch = on("cut")
    resumed, resumed_states = train(4)
    switch.finish()
    assert resumed_states == states
    assert all(torch.equal(resumed.states[-1][key], whole.states[-1][key]) for key in whole.states[-1])


def test_line_is_printed_when_no_training_is_observed(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    loop = Loop()
    for batch in DataLoader(images(), batch_size=8):
        loop.step(batch)
    switch.finish()
    told = capfd.readouterr().err
    assert "backward is called outside of any prepared loader" in told
    assert "nothing was logged" in told
    assert list(tmp_path.iterdir()) == []


def test_line_is_printed_when_backward_bypasses_accelerate(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    loop = Loop()
    for batch in loop.train:
        loop.loss(batch).backward()
        loop.optimizer.step()
    switch.finish()
    assert (
        "no iteration over a prepared loader with accelerator.backward was seen: the run has no loss, no epoch and no "
        "checkpoint" in capfd.readouterr().err
    )


def test_scripts_mlflow_run_fails_when_ours_cannot_open(on: On, tmp_path: Path) -> None:
    switch = on()
    Loop().plain(1)
    switch.finish()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        on(resume="never")
        run = mlflow.start_run()
        with pytest.raises(RunDirError, match="holds a run already"):
            Loop().plain(1)
        assert mlflow.active_run() is None
        assert mlflow.get_run(run.info.run_id).info.status == "FAILED"
    finally:
        mlflow.set_tracking_uri(before)


def test_next_training_has_a_run_of_its_own_when_memory_is_freed(on: On, tmp_path: Path) -> None:
    switch = on(resume="auto")
    first = Loop()
    first.plain(1)
    first.accelerator.free_memory()
    switch.change(AutologSettings(**{**vars(switch.settings), "run_name": "second"}))
    second = Loop(first.accelerator)
    second.plain(2)
    switch.finish()
    require_states(tmp_path, first.states)
    require_states(tmp_path, second.states, "second")


def test_skipped_batches_make_no_epoch_when_a_script_skips_some(on: On, tmp_path: Path) -> None:
    switch = on()
    loop = Loop()
    loop.model.train()
    for loader in (loop.accelerator.skip_first_batches(loop.train, 2), loop.train):
        for batch in loader:
            loop.step(batch)
        loop.keep_state()
    switch.finish()
    require_states(tmp_path, loop.states)
    assert [manifest.step for manifest in checkpoints(tmp_path).values()] == [3, 8]


def test_summary_writer_event_is_in_the_run_when_mlflow_autologs(on: On, tmp_path: Path) -> None:
    switch = on()
    loop = Loop()

    def event(value: float) -> None:
        # What MLflow does around one call of a SummaryWriter's where no run is active.
        mlflow.start_run(tags={"mlflow.autologging": "pytorch"})
        run = mlflow.active_run()
        assert run is not None
        _pytorch_autolog.add_to_metrics_queue("of_writer", value, 3, 0, run.info.run_id)
        mlflow.end_run("FINISHED")
        assert mlflow.active_run() is None

    event(1.0)
    loop.plain(1, lambda epoch, batch: event(float(batch)))
    switch.finish()
    assert checkpoints(tmp_path)["epoch-0001"].metrics["of_writer"] == 4.0
    assert not (tmp_path / "mlflow.db").exists()


class Keeps(GeneralTracker):  # type: ignore[misc]
    """A tracker of accelerate's kind, which keeps what it is given."""

    name = "keeps"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.given

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.given.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.given.append(values)


def test_tracker_of_accelerate_gets_no_secrets_when_some_are_logged(on: On) -> None:
    on()
    tracker = Keeps()
    accelerator = Accelerator(log_with=tracker)
    accelerator.init_trackers("project", config={"hub_token": "hf_abc", "lr": 0.1, "url": "s3://me:abc@host/x"})
    accelerator.log({"hub_token": "hf_abc", "loss/token": 0.5}, step=1)
    assert tracker.given == [
        {"hub_token": "***", "lr": 0.1, "url": "s3://me:***@host/x"},
        {"hub_token": "***", "loss/token": 0.5},
    ]


def test_mlflow_gets_no_secrets_when_logged_before_training(on: On, tmp_path: Path) -> None:
    on()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        with mlflow.start_run() as run:
            mlflow.log_params({"hub_token": "hf_abc", "lr": 0.1})
            assert mlflow.log_param("api_key", "abc") == "abc"
        assert mlflow.get_run(run.info.run_id).data.params == {"hub_token": "***", "lr": "0.1", "api_key": "***"}
    finally:
        mlflow.set_tracking_uri(before)
