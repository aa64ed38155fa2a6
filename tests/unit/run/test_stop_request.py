"""A request to stop, and a job that gets nowhere."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from harness.checkpoint.format.commit import Manifest, commit, temporary_of
from harness.config.schema import TrackingConfig
from harness.errors import RunDirError, Stopped
from harness.io.durable_files import replace_file
from harness.run.lock import RunLock
from harness.run.requeue_limit import count_start
from harness.run.stop_request import StopLead, StopRequests, ask_to_stop
from harness.training.periodic_logger import PeriodicLogger

JOB = {"SLURM_JOB_ID": "17"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"run_name": "it", "run_key": "k", "attempt": 2}))
    return tmp_path


def test_attempt_at_work_is_asked_and_no_other(run_dir: Path) -> None:
    with pytest.raises(RunDirError, match="no job is at work on it"):
        ask_to_stop(run_dir, "why")
    lock = RunLock(run_dir)
    ask_to_stop(run_dir, "why")
    lock.release()
    assert StopRequests(run_dir, 2).look() == "why"
    assert StopRequests(run_dir, 3).look() is None


def test_attempt_is_asked_that_has_the_run_and_is_counted_a_moment_later(run_dir: Path) -> None:
    lock = RunLock(run_dir)

    def count() -> None:
        while not (run_dir / "stop.json").exists():
            time.sleep(0.001)
        replace_file(run_dir / "run.json", json.dumps({"run_name": "it", "run_key": "k", "attempt": 3}))

    beginning = threading.Thread(target=count)
    beginning.start()
    ask_to_stop(run_dir, "why")
    beginning.join()
    lock.release()
    assert StopRequests(run_dir, 3).look() == "why"


def test_error_is_told_when_it_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="is not the directory of a run"):
        ask_to_stop(tmp_path, "why")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempt": 2}', '{"attempt": "2", "reason": "x"}'])
def test_request_that_cannot_be_read_is_none(run_dir: Path, content: str) -> None:
    (run_dir / "stop.json").write_text(content)
    assert StopRequests(run_dir, 2).look() is None


def test_training_stops_after_the_step_when_it_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with (
        pytest.raises(Stopped, match="stopped by harness stop") as stopped,
        PeriodicLogger(
            Accelerator(cpu=True), run_name="it", run_dir=tmp_path, tracking=TrackingConfig(enabled=False)
        ) as logger,
    ):
        for _ in logger.epochs(1):
            for batch in logger.batches(range(3000)):
                if batch == 3:
                    ask_to_stop(tmp_path / "it", "the time limit is near")
                time.sleep(0.002)  # a step's work
    assert stopped.value.exit_code == 75
    assert 3 <= logger.step < 3000
    assert "harness stop: the time limit is near" in capsys.readouterr().err


def test_line_names_a_longer_lead_when_checkpoints_take_too_much_of_it() -> None:
    lead = StopLead({"HARNESS_STOP_LEAD_S": "100"})
    assert lead.check(25.0) is None
    line = lead.check(30.0)
    assert line is not None
    assert "--lead_s 120 or more" in line
    assert lead.check(30.0) is None  # once
    assert StopLead({}).check(1e9) is None


def test_run_says_so_when_its_checkpoints_take_too_much_of_the_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HARNESS_STOP_LEAD_S", "0")  # than which any is longer
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with PeriodicLogger(
        accelerator, every_n_epochs=1, run_name="it", run_dir=tmp_path, tracking=TrackingConfig(enabled=False)
    ) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(2):
            for _ in logger.batches([torch.ones(1, 1)]):
                loss = model(torch.ones(1, 1)).sum()
                accelerator.backward(loss)
                optimizer.step()
                logger.log({"train/loss": loss})
            # It is on the disk before the next window is told, which reports it.
            logger._checkpoints.saver.wait()
    assert capsys.readouterr().err.count("s to be on disk, and the job is asked to stop 0 s before its time limit") == 1


def restarted(times: int) -> dict[str, str]:
    return JOB | ({"SLURM_RESTART_COUNT": str(times)} if times else {})


def test_job_is_refused_when_its_starts_get_nowhere(tmp_path: Path) -> None:
    run_dir = tmp_path / "it"
    for times in range(3):
        count_start(run_dir, 3, restarted(times))
    with pytest.raises(RunDirError, match="3 starts in a row have begun at step 0"):
        count_start(run_dir, 3, restarted(3))
    # Submitted anew.
    count_start(run_dir, 3, {"SLURM_JOB_ID": "18"})
    count_start(run_dir, 3, {"SLURM_JOB_ID": "18", "SLURM_RESTART_COUNT": "1"})


def test_job_is_started_again_as_long_as_it_gets_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "it"
    for times in range(9):
        count_start(run_dir, 2, restarted(times))
        if times % 2:
            commit_empty(run_dir / "checkpoints" / f"step-{times:08}", times)


def commit_empty(final: Path, step: int) -> None:
    temporary = temporary_of(final, "it")
    temporary.mkdir(parents=True)
    commit(temporary, final, Manifest(f"key-{step}", 0, step, 1, {}, (), {"world_size": 1}, {}))
