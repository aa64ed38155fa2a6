from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.checkpoint.format.commit import FileRecord, Manifest, commit, set_aside, temporary_of
from harness.checkpoint.format.ranges import Range, Ranges
from harness.diagnostics.report import checkpoint_records, checkpoint_table, how_to_open
from harness.tracking.journal.delivery_state import Delivered, write_delivered


def save(run_dir: Path, name: str, step: int, metrics: dict[str, float], ranking: dict[str, str] | None = None) -> None:
    final = run_dir / "checkpoints" / name
    files = (FileRecord("model.safetensors", 1_234_567, Ranges.of([Range(0, 1_234_567, 0, "ab" * 16)])),)
    temporary = temporary_of(final, "test")
    temporary.mkdir(parents=True)
    commit(temporary, final, Manifest(f"key-{step}", step // 10, step, step, metrics, files, {}, {}, ranking or {}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save(tmp_path, "epoch-0002", 20, {"eval/loss": 0.25, "train/loss": 0.5})
    save(tmp_path, "epoch-0001", 10, {"eval/loss": 0.75, "eval/accuracy": 0.5})
    (tmp_path / "outbox").mkdir()
    write_delivered(tmp_path / "outbox", Delivered(9, {"epoch-0001": "m-123"}, ()))
    return tmp_path


def test_records_are_in_the_order_of_steps_when_read(run_dir: Path) -> None:
    records = checkpoint_records(run_dir)
    assert [(r["name"], r["step"], r["mlflow_model_id"]) for r in records] == [
        ("epoch-0001", 10, "m-123"),
        ("epoch-0002", 20, None),
    ]
    assert records[0]["bytes"] == 1_234_567
    assert json.loads(json.dumps(records)) == records


def test_table_has_evaluation_metrics_alone_when_there_are_some(run_dir: Path) -> None:
    header, first, second = checkpoint_table(run_dir).splitlines()
    assert header.split() == ["epoch", "step", "bytes", "eval/accuracy", "eval/loss", "on", "disk", "MLflow", "model"]
    assert first.split() == ["1", "10", "1,234,567", "0.5000", "0.7500", "epoch-0001", "m-123"]
    assert second.split() == ["2", "20", "1,234,567", "-", "0.2500", "epoch-0002", "not", "yet"]


def test_table_has_training_metrics_when_nothing_was_evaluated(tmp_path: Path) -> None:
    save(tmp_path, "step-00000010", 10, {"train/loss": 0.5})
    assert "train/loss" in checkpoint_table(tmp_path).splitlines()[0]


def test_columns_are_aligned_when_widths_differ(run_dir: Path) -> None:
    header, *rows = checkpoint_table(run_dir).splitlines()
    assert {row.index("epoch-") for row in rows} == {header.index("on disk")}


def test_one_that_was_set_aside_is_no_row_when_listed(run_dir: Path) -> None:
    aside = set_aside(run_dir / "checkpoints" / "epoch-0002")
    assert [record["name"] for record in checkpoint_records(run_dir)] == ["epoch-0001"]
    assert checkpoint_table(run_dir).splitlines()[2:] == [f"{aside.name}: set aside, as it was found damaged"]


def test_damaged_one_is_shown_with_its_reason_when_its_manifest_cannot_be_read(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "epoch-0001" / "manifest.json").write_text("{")
    good, bad = checkpoint_records(run_dir)
    assert (good["name"], good["damaged"]) == ("epoch-0002", None)
    assert (bad["name"], bad["step"], bad["mlflow_model_id"]) == ("epoch-0001", None, "m-123")
    header, first, second, reason = checkpoint_table(run_dir).splitlines()
    assert header.split() == ["epoch", "step", "bytes", "eval/loss", "on", "disk", "MLflow", "model"]
    assert first.split() == ["2", "20", "1,234,567", "0.2500", "epoch-0002", "not", "yet"]
    assert second.split() == ["-", "-", "-", "-", "epoch-0001", "(damaged)", "m-123"]
    assert reason == bad["damaged"]
    assert f"{run_dir}/checkpoints/epoch-0001/manifest.json: is damaged" in reason


def test_best_and_removed_ones_are_shown_when_checkpoints_are_ranked(run_dir: Path) -> None:
    save(run_dir, "epoch-0003", 30, {"eval/loss": 0.5}, {"monitor": "eval/loss", "mode": "min"})
    write_delivered(run_dir / "outbox", Delivered(9, {"epoch-0000": "m-0", "epoch-0003": "m-3"}, ()))
    records = checkpoint_records(run_dir)
    assert [(r["name"], r["best"], r["on_disk"], r["mlflow_model_id"]) for r in records] == [
        ("epoch-0001", False, True, None),
        ("epoch-0002", True, True, None),
        ("epoch-0003", False, True, "m-3"),
        ("epoch-0000", False, False, "m-0"),
    ]
    lines = checkpoint_table(run_dir).splitlines()
    assert lines[2].split()[5:] == ["epoch-0002", "(best)", "not", "yet"]
    assert lines[4].split()[5:] == ["epoch-0000", "(removed)", "m-0"]


def test_table_says_so_when_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_table(tmp_path) == f"no checkpoints in {tmp_path}"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, "no MLflow run"),
        (
            {"run_id": "r", "experiment_id": "7", "tracking_uri": "http://host:5000"},
            "http://host:5000/#/experiments/7/runs/r",
        ),
        (
            {"run_id": "r", "experiment_id": "7", "tracking_uri": "sqlite:////a b/mlflow.db"},
            "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'",
        ),
    ],
)
def test_line_opens_the_page_when_there_is_a_run(tmp_path: Path, record: dict[str, str], expected: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run_name": "it", "run_key": "key-1", **record}))
    assert expected in how_to_open(tmp_path)
