from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from harness.agreement import Agreement
from harness.checkpoint.commit import Manifest, list_checkpoints, read_manifest
from harness.checkpoint.saver import Moment, Saver, Watched
from harness.config import CheckpointConfig
from harness.errors import CheckpointError

Make = Callable[..., Saver]


@pytest.fixture
def watched() -> Watched:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return Watched(model, optimizer, scheduler)


@pytest.fixture
def make(accelerator: Accelerator, tmp_path: Path) -> Make:
    def make_saver(committed: Callable[[str, Manifest], None] = lambda name, manifest: None, **values: Any) -> Saver:
        facts = {"strategy": "single"}
        return Saver(
            accelerator, Agreement(0, 1), CheckpointConfig(**values), tmp_path, facts, {"torch": "2"}, committed
        )

    return make_saver


def moment(step: int) -> Moment:
    return Moment(f"step-{step:08d}", epoch=1, step=step, batches_in_epoch=4, metrics={"eval/loss": 0.5})


def test_checkpoint_is_whole_and_told_when_saved(make: Make, watched: Watched, tmp_path: Path) -> None:
    told: list[tuple[str, Manifest]] = []
    saver = make(lambda name, manifest: told.append((name, manifest)))
    assert saver.save(moment(10), watched)
    saver.close()
    path = tmp_path / "step-00000010"
    manifest = read_manifest(path)
    assert told == [("step-00000010", manifest)]
    assert (manifest.epoch, manifest.step, manifest.metrics) == (1, 10, {"eval/loss": 0.5})
    assert {file.name for file in manifest.files} | {"manifest.json"} == {p.name for p in path.iterdir()}
    record = json.loads((path / "trainer_state.json").read_text())
    assert record["position"] == {"epoch": 1, "batches": 4}
    assert record["scheduler"]["last_epoch"] == 1
    assert record["optimizer"]["param_groups"][0]["params"] == ["weight", "bias"]
    assert len(record["random_states"]) == 1


def test_state_is_of_the_moment_when_training_goes_on(make: Make, watched: Watched, tmp_path: Path) -> None:
    expected = watched.model.weight.detach().clone()
    saver = make()
    saver.save(moment(10), watched)
    with torch.no_grad():
        watched.model.weight.fill_(7)
    saver.close()
    assert torch.equal(load_file(tmp_path / "step-00000010" / "model.safetensors")["weight"], expected)


def test_weights_alone_are_there_when_configured_so(make: Make, watched: Watched, tmp_path: Path) -> None:
    saver = make(save_weights_only=True, dtype="bfloat16")
    saver.save(moment(10), watched)
    saver.close()
    assert {p.name for p in (tmp_path / "step-00000010").iterdir()} == {"model.safetensors", "manifest.json"}
    assert load_file(tmp_path / "step-00000010" / "model.safetensors")["weight"].dtype == torch.bfloat16


def test_checkpoint_is_skipped_when_the_one_before_is_being_written(
    make: Make, watched: Watched, tmp_path: Path
) -> None:
    may_end = threading.Event()
    saver = make(lambda name, manifest: may_end.wait(60) and None)
    try:
        assert saver.save(moment(10), watched)
        assert not saver.save(moment(20), watched)
        assert saver.num_skipped == 1
        assert "skipped" in saver.status
    finally:
        may_end.set()
    saver.close()
    assert [manifest.step for _, manifest in list_checkpoints(tmp_path)] == [10]


def test_checkpoint_waits_when_the_one_before_is_being_written_and_configured_so(
    make: Make, watched: Watched, tmp_path: Path
) -> None:
    may_end = threading.Event()
    saver = make(lambda name, manifest: may_end.wait(60) and None, when_busy="wait")
    assert saver.save(moment(10), watched)
    threading.Timer(0.2, may_end.set).start()
    assert saver.save(moment(20), watched)
    assert may_end.is_set()
    saver.close()
    assert [manifest.step for _, manifest in list_checkpoints(tmp_path)] == [10, 20]
    assert saver.num_skipped == 0


def test_earlier_checkpoint_stays_and_the_error_is_told_when_a_write_fails(
    make: Make, watched: Watched, tmp_path: Path
) -> None:
    told: list[str] = []
    saver = make(lambda name, manifest: told.append(name), when_busy="wait")
    saver.save(moment(10), watched)
    (tmp_path / "step-00000020").mkdir()  # in the way
    assert saver.save(moment(20), watched)
    with pytest.raises(CheckpointError, match=r"the last checkpoint could not be written: .*step-00000020"):
        saver.close()
    assert told == ["step-00000010"]
    assert "step-00000020 FAILED" in saver.status
    assert [name for name, _ in list_checkpoints(tmp_path)] == ["step-00000010"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_run_goes_on_when_a_later_write_works(make: Make, watched: Watched, tmp_path: Path) -> None:
    saver = make(when_busy="wait")
    (tmp_path / "step-00000010").mkdir()
    saver.save(moment(10), watched)
    saver.save(moment(20), watched)
    saver.close()
    assert [name for name, _ in list_checkpoints(tmp_path)] == ["step-00000020"]


def test_error_names_the_scheduler_when_its_state_is_no_json(make: Make, watched: Watched, tmp_path: Path) -> None:
    class Odd(torch.optim.lr_scheduler.StepLR):
        def state_dict(self) -> dict[str, Any]:
            return {"history": {1, 2}}

    assert watched.optimizer is not None
    saver = make()
    with pytest.raises(CheckpointError, match="the state of Odd cannot be written as JSON"):
        saver.check(Watched(watched.model, watched.optimizer, Odd(watched.optimizer, 1)))
    saver.close()
    assert list(tmp_path.iterdir()) == []


def test_unfinished_write_is_told_when_abandoned(make: Make, watched: Watched) -> None:
    may_end = threading.Event()
    saver = make(lambda name, manifest: may_end.wait(60) and None)
    try:
        saver.save(moment(10), watched)
        saver.abandon(timeout_s=0.01)
        assert saver.status == "the last checkpoint was not finished"
    finally:
        may_end.set()
