"""Whatever goes wrong on one rank: all ranks stop within seconds, the reason is told once, MLflow has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.checkpoint.format.commit import list_checkpoints
from tests.distributed.resuming_ranks import train_words
from tests.distributed.test_saver import ranks
from tests.launching import ROOT, Done, error_lines, harness, run
from tests.mlflow_reader import only_run

pytestmark = pytest.mark.usefixtures("empty_database")

DIGITS = ROOT / "configs" / "digits.yaml"
# Start (imports, rendezvous, the MLflow database) takes most of it; the failure itself seconds.
LIMIT_S = 75


def train(cwd: Path, *words: str, extra: Mapping[str, str] | None = None, num_starts: int = 1) -> Done:
    return run(
        harness("launch", "--num_processes", "2", "--config", DIGITS, "--trainer.max_epochs", "3", *words),
        cwd,
        timeout_s=num_starts * LIMIT_S,
        extra=extra,
    )


CASES = [
    ("raise", 1, "rank 1 failed: RuntimeError: the disk of this rank fell out", "FAILED"),
    ("raise", 0, "RuntimeError: the disk of this rank fell out", "FAILED"),
    ("stuck", 1, "rank 1 failed: RuntimeError: the disk of this rank fell out", "FAILED"),
    ("kill", 1, "the connection to another rank broke", "FAILED"),
    ("kill", 0, "the trainer ended without saying how", "FAILED"),
    ("term", 1, "stopped by SIGTERM", "KILLED"),
]


@pytest.mark.parametrize(("how", "rank", "reason", "status"), CASES, ids=[f"{c[0]}-rank{c[1]}" for c in CASES])
def test_all_ranks_stop_and_mlflow_has_the_reason_when_one_rank(
    tmp_path: Path, how: str, rank: int, reason: str, status: str
) -> None:
    task = (
        "--task.class_path",
        "tests.distributed.tasks.Breaks",
        "--task.init_args",
        f'{{"how": "{how}", "rank": {rank}}}',
    )
    # What was stopped in good order stays so, though torch's agent starts the ranks again.
    num_restarts = int(how == "term")
    done = train(tmp_path, *task, "--max_restarts", str(num_restarts), num_starts=1 + num_restarts)
    assert done.code != 0
    # A rank zero that is killed says nothing: then another says that a connection broke.
    said = "the connection to another rank broke" if (how, rank) == ("kill", 0) else reason
    assert [line for line in done.error_lines if said in line], done.output
    assert len(done.error_lines) == 1 + num_restarts, done.output
    run_ = only_run(tmp_path, wait_for_end_s=40)
    assert (run_.info.status, reason in run_.data.tags["harness.end_reason"]) == (status, True)
    assert_nothing_half_written(tmp_path)


def assert_nothing_half_written(cwd: Path) -> None:
    """No directory without a manifest stands under a checkpoint's name."""
    for checkpoint in cwd.glob("runs/*/checkpoints/[!.]*"):
        assert (checkpoint / "manifest.json").exists()


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("BecomesNaN", "train/loss: must be finite, is nan"),
        ("OneSample", "the training data set has 1 samples for 2 ranks"),
        ("CannotLoad", "rank 1 failed: FileNotFoundError: no such file: images.zip"),
    ],
)
def test_run_is_failed_with_one_line_when_the_task(tmp_path: Path, task: str, reason: str) -> None:
    # No launcher has a part in these.
    words = ("--config", DIGITS, "--trainer.max_epochs", "3", "--task.class_path", f"tests.distributed.tasks.{task}")
    with ranks(2, train_words, "ddp", tmp_path, [str(word) for word in words], "output.txt") as processes:
        for process in processes:
            process.join(LIMIT_S)
        assert all(process.exitcode for process in processes)
    output = (tmp_path / "output.txt").read_text()
    (line,) = error_lines(output)
    assert reason in line
    run_ = only_run(tmp_path, wait_for_end_s=40)
    assert run_.info.status == "FAILED"
    assert reason.removeprefix("rank 1 failed: ") in run_.data.tags["harness.end_reason"]


def test_all_ranks_stop_with_the_address_when_the_server_is_unreachable(tmp_path: Path) -> None:
    address = {"MLFLOW_TRACKING_URI": "http://user:secret@127.0.0.1:9"}
    done = train(tmp_path, "--tracking.start_timeout_s", "2", extra=address)
    assert done.code != 0
    assert len(done.error_lines) == 1, done.output
    assert "tracking.tracking_uri: no MLflow run could be made at http://user:***@127.0.0.1:9" in done.error_lines[0]
    assert "secret" not in done.output
    # The end of a run that there is not is not waited for with another publisher, and another.
    (log,) = tmp_path.glob("runs/*/outbox/publisher.log")
    assert log.read_text().count("no run:") == 1, log.read_text()
    for path in tmp_path.glob("runs/**/*"):
        assert path.is_dir() or "secret" not in path.read_text(), path


def test_run_goes_on_by_itself_when_the_launcher_starts_the_ranks_again(tmp_path: Path) -> None:
    words = ("launch", "--num_processes", "2", "--max_restarts", "1", "--config", DIGITS)
    # Nobody has named the run: the ranks of the second start find it by who has started them.
    done = run(
        harness(
            *words,
            *("--trainer.max_epochs", "2", "--checkpoint.every_n_steps", "4"),
            # Twenty steps may be over before the first save is: it must be there when the rank is killed.
            *("--checkpoint.when_busy", "wait"),
            *("--task.class_path", "tests.distributed.tasks.Breaks"),
            *("--task.init_args", '{"how": "kill once", "at": 20}'),
        ),
        tmp_path,
        timeout_s=LIMIT_S,
    )
    assert done.code == 0, done.output
    assert "resumed from step-000000" in done.output
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert only_run(tmp_path, wait_for_end_s=40).info.status == "FINISHED"
    assert list_checkpoints(run_dir / "checkpoints")[-1][1].epoch == 2
