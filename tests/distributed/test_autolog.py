"""`harness run` with scripts that know nothing of it: one MLflow run, each epoch as the script had it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from statistics import mean

import mlflow
import pytest
import torch
from mlflow.entities import LoggedModel
from safetensors.torch import load_file
from torch import nn

from harness import load_model
from harness.checkpoint.format.commit import list_checkpoints
from tests.autologged.local_sgd import train_apart
from tests.autologged.recording import VARIABLE
from tests.distributed.test_saver import ranks
from tests.launching import BIN, ROOT, accelerate, fsdp1_config, harness, run
from tests.mlflow_reader import all_runs, client, history, models, only_run
from tests.services.mlflow_server import make_database

pytestmark = pytest.mark.usefixtures("empty_database")

SCRIPTS = ROOT / "tests" / "autologged"


def require_recorded_states(run_dir: Path, states: Path) -> None:
    names = [name for name, _ in list_checkpoints(run_dir / "checkpoints")]
    assert names == sorted(path.stem for path in states.glob("*.pt"))
    for name in names:
        require_state(run_dir / "checkpoints" / name, states / f"{name}.pt")


def require_state(checkpoint: Path, record: Path) -> None:
    recorded = torch.load(record, weights_only=True)
    for part in ("model", "optimizer"):
        saved = load_file(checkpoint / f"{part}.safetensors")
        assert saved.keys() == recorded[part].keys()
        assert all(torch.equal(saved[key], recorded[part][key]) for key in saved), (checkpoint, part)


@pytest.mark.parametrize(
    ("strategy", "num_processes"), [("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("zero2", 2)]
)
def test_checkpoints_are_the_scripts_own_state_when_it_runs_as(
    tmp_path: Path, strategy: str, num_processes: int
) -> None:
    states = tmp_path / "states"
    states.mkdir()
    launcher = (
        [] if strategy in ("single", "fsdp1") else ["--strategy", strategy, "--num_processes", str(num_processes)]
    )
    own = ("--every_n_epochs", "1", "--run_name", "it", *launcher)
    words = harness("run", *own, SCRIPTS / "by_epoch.py", "--num_epochs", "2", "--lr", "0.01")
    if strategy == "fsdp1":  # which `harness launch` does not have, and accelerate's configuration files do
        config = ("--config_file", fsdp1_config(tmp_path), "--main_process_port", "0")
        words = [BIN / "accelerate", "launch", *config, "--no_python", *words]
    done = run(words, tmp_path, extra={VARIABLE: str(states)})
    assert done.code == 0, done.output
    require_recorded_states(tmp_path / "runs" / "it", states)

    reader, mlflow_run = client(tmp_path), only_run(tmp_path)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.tags["harness.strategy"] == strategy
    assert mlflow_run.data.tags["mlflow.source.name"] == str(SCRIPTS / "by_epoch.py")
    params = mlflow_run.data.params
    assert params["args.lr"] == params["optimizer.lr"] == "0.01"
    assert params["scheduler.class"] == "OneCycleLR"
    assert params["config.hidden"] == "32"
    assert params["training.batch_size"] == str(16 * num_processes)
    # The script logs by epochs, and each of its values once; what is ours is by optimizer steps.
    recorded = [torch.load(path, weights_only=True)["accuracy"] for path in sorted(states.glob("*.pt"))]
    points = history(reader, mlflow_run, "accuracy")
    assert [(point.step, point.value) for point in points] == list(enumerate(recorded))
    steps = 13 if num_processes == 1 else 7
    assert [point.step for point in history(reader, mlflow_run, "train/loss")] == [steps, 2 * steps]
    linked = [{metric.key: metric.value for metric in model.metrics} for model in models(reader, mlflow_run)]
    assert [each["accuracy"] for each in linked] == recorded
    if strategy == "single":
        require_loaded_as_the_run_says(tmp_path, done.output, models(reader, mlflow_run)[-1])
    if launcher:
        require_the_same_when_killed_within_an_epoch(tmp_path, states / "epoch-0002.pt", launcher)


def require_loaded_as_the_run_says(cwd: Path, output: str, logged: LoggedModel) -> None:
    """A script that builds its model itself can name no class of it, and is not told to."""
    (line,) = [line for line in output.splitlines() if "no class is named" in line]
    assert 'harness.load_model("models:/...", model=model)' in line
    assert "PeriodicLogger" not in line
    mlflow.set_tracking_uri(f"sqlite:///{cwd / 'mlflow.db'}")
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
    found = load_model(f"models:/{logged.model_id}", model=model).state_dict()
    saved = load_file(cwd / "runs" / "it" / "checkpoints" / "epoch-0002" / "model.safetensors")
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[key], found[key]) for key in saved)


def require_the_same_when_killed_within_an_epoch(whole: Path, recorded: Path, launcher: list[str]) -> None:
    cut = whole / "cut"
    cut.mkdir()
    make_database(cut / "mlflow.db")
    own = ("--resume", "auto", "--run_name", "it", "--every_n_epochs", "1", *launcher)
    words = ("--num_epochs", "2", "--lr", "0.01")
    killed = run(harness("run", *own, SCRIPTS / "killed.py", *words), cut)
    names = [name for name, _ in list_checkpoints(cut / "runs" / "it" / "checkpoints")]
    assert killed.code == -signal.SIGKILL, killed.output
    assert names == ["epoch-0001", "step-00000008"]
    resumed = run(harness("run", *own, SCRIPTS / "by_epoch.py", *words), cut)
    assert resumed.code == 0, resumed.output
    assert f"resumed from {names[-1]} (epoch 1, step 8)" in resumed.output
    require_state(cut / "runs" / "it" / "checkpoints" / "epoch-0002", recorded)
    before, after = only_run(whole), only_run(cut)
    assert after.info.status == "FINISHED"
    for name in ("train/loss", "train/lr", "accuracy"):
        points = [
            [(p.step, p.value) for p in history(client(at), r, name)] for at, r in ((whole, before), (cut, after))
        ]
        assert points[0] == points[1], name


def test_run_has_failed_and_script_ends_as_alone_when_it_raises(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(
        (SCRIPTS / "by_epoch.py").read_text().replace("        model.eval()", "        raise KeyError('x')")
    )
    alone = run([BIN / "python", script], tmp_path)
    done = run(harness("run", "--every_n_epochs", "1", script), tmp_path)
    assert done.code == alone.code == 1
    assert "no checkpoints; MLflow run" in done.output
    assert done.output[done.output.index("Traceback") :] == alone.output[alone.output.index("Traceback") :]
    mlflow_run = only_run(tmp_path, wait_for_end_s=20)
    assert mlflow_run.info.status == "FAILED"
    assert mlflow_run.data.tags["harness.end_reason"] == "KeyError: 'x'"


def test_everything_is_in_one_run_once_when_every_rank_of_a_script_tracks_with_mlflow_itself(tmp_path: Path) -> None:
    done = run(accelerate("ddp", "--num_processes", "2", SCRIPTS / "tracking.py"), tmp_path)
    assert done.code == 0, done.output
    assert "dropped this attribute" not in done.output
    told = json.loads((tmp_path / "told.json").read_text())
    reader, runs = client(tmp_path), all_runs(client(tmp_path))
    mlflow_run, apart = sorted(runs, key=lambda each: each.info.run_id != told["run_id"])
    assert mlflow_run.info.run_id == told["run_id"]
    assert mlflow_run.info.run_name == "of the script's"
    assert mlflow_run.info.status == "FINISHED"
    assert {"hidden", "args.num_epochs", "late"} <= mlflow_run.data.params.keys()
    assert mlflow_run.data.tags["team"] == "a"
    for name in ("by_mlflow", "by_accelerate"):
        points = history(reader, mlflow_run, name)
        assert [(point.step, point.value) for point in points] == [(0, 0.0), (1, 10.0)]
    assert [point.step for point in history(reader, mlflow_run, "train/loss")] == [3, 6]
    (model,) = models(reader, mlflow_run)
    assert {metric.key for metric in model.metrics} >= {"by_mlflow", "by_accelerate", "train/loss"}
    # The second training, with `exclusive`: the script's run has what the script says itself, and ours all else.
    assert mlflow_run.data.metrics["of_script_alone"] == 1.0
    assert "of_script_alone" not in apart.data.metrics
    assert apart.data.metrics["by_accelerate"] == 5.0
    assert [model.tags["step"] for model in models(reader, apart)] == ["3"]
    assert told["replaced_afterwards"] == []


def test_metrics_are_logged_and_no_checkpoint_is_made_when_ranks_train_apart(tmp_path: Path) -> None:
    with ranks(2, train_apart, tmp_path) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "said-0").read_text()
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert [text.count("under LocalSGD each rank has weights") for text in said] == [1, 0]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert list((run_dir / "checkpoints").iterdir()) == []
    reader, mlflow_run = client(tmp_path), only_run(tmp_path)
    assert mlflow_run.info.status == "FINISHED"
    assert models(reader, mlflow_run) == []
    of_ranks = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    means = [mean([*first, *second]) for first, second in zip(*of_ranks, strict=True)]
    points = history(reader, mlflow_run, "train/loss")
    assert [(point.step, point.value) for point in points] == [
        (4, pytest.approx(means[0])),
        (8, pytest.approx(means[1])),
    ]
