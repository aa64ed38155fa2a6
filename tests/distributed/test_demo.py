"""What `make demo` promises."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from harness.diagnostics.report import checkpoint_records
from tests.launching import BIN, ROOT, harness, run
from tests.mlflow_reader import client, models, only_run


def processor_s() -> float:
    """Seconds of processor time that all children have had that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_demo_reaches_97_percent_in_a_minute_and_ends_with_table_and_command(tmp_path: Path) -> None:
    words = ("launch", "--strategy", "ddp", "--num_processes", "2", "--config", ROOT / "configs/digits.yaml")
    before_s = processor_s()
    done = run(harness(*words, "--checkpoint.every_n_epochs", "2"), tmp_path)
    assert done.code == 0, done.output
    # A minute of two cores: other tests run beside this one, so the clock says nothing.
    assert processor_s() - before_s < 120
    (run_dir,) = (tmp_path / "runs").iterdir()
    records = checkpoint_records(run_dir)
    assert [record["epoch"] for record in records] == list(range(2, 21, 2))
    assert records[-1]["metrics"]["eval/accuracy"] >= 0.97
    table = done.output[done.output.index("epoch  step") :].splitlines()
    assert table[0].split() == ["epoch", "step", "bytes", "eval/accuracy", "eval/loss", "on", "disk", "MLflow", "model"]
    for line, record in zip(table[1:], records, strict=False):
        assert line.split()[-1] == record["mlflow_model_id"]
    command = table[-1].partition(":  ")[2]
    assert command.endswith(f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db")
    assert shutil.which(command.split()[0], path=f"{BIN}:{os.environ['PATH']}") is not None
    found = models(client(tmp_path), only_run(tmp_path))
    assert [model.model_id for model in found] == [record["mlflow_model_id"] for record in records]
