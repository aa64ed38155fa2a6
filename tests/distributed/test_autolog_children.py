"""Scripts that train in processes of their own making: a run ends as the child does that trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.checkpoint.format.commit import list_checkpoints
from tests.launching import BIN, ROOT, run
from tests.mlflow_reader import all_runs, client, only_run

pytestmark = pytest.mark.usefixtures("empty_database")

SCRIPT = ROOT / "tests" / "autologged" / "children.py"


def names_of_checkpoints(cwd: Path, run_name: str | None) -> list[str]:
    return [name for name, _ in list_checkpoints(cwd / "runs" / str(run_name) / "checkpoints")]


def test_last_checkpoint_is_there_and_run_finished_when_debug_launcher_has_two_processes(tmp_path: Path) -> None:
    done = run([BIN / "python", SCRIPT, "debug_launcher"], tmp_path)
    assert done.code == 0, done.output
    assert done.output.count("1 checkpoint in") == 1
    mlflow_run = only_run(tmp_path)
    assert mlflow_run.info.status == "FINISHED"
    assert names_of_checkpoints(tmp_path, mlflow_run.info.run_name) == ["epoch-0002"]


def test_run_is_failed_with_the_reason_when_a_function_of_notebook_launcher_raises(tmp_path: Path) -> None:
    done = run([BIN / "python", SCRIPT, "notebook_launcher"], tmp_path)
    assert done.code == 1, done.output
    mlflow_run = only_run(tmp_path, wait_for_end_s=20)
    assert mlflow_run.info.status == "FAILED"
    assert mlflow_run.data.tags["harness.end_reason"] == "ValueError: no such luck"


def test_each_run_ends_as_its_process_when_children_are_forked_and_spawned(tmp_path: Path) -> None:
    done = run([BIN / "python", SCRIPT, "children"], tmp_path)
    assert done.code == 0, done.output
    assert "exit codes [0, 1, 3]" in done.output
    runs = sorted(all_runs(client(tmp_path)), key=lambda each: each.info.start_time)
    assert [(each.info.status, each.data.tags["harness.end_reason"]) for each in runs] == [
        ("FINISHED", "training is complete"),
        ("FAILED", "ValueError: no such luck"),
        ("FAILED", "ExitCodeError: exit code 3"),
    ]
    assert [names_of_checkpoints(tmp_path, each.info.run_name) for each in runs] == [["epoch-0002"], [], []]
