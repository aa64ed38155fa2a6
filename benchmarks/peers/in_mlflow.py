"""What a peer of `compare_autolog` stored in MLflow: status of runs, metrics, and models with their completeness."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.peers import task
from tests.mlflow_reader import all_runs

# What the value of a metric says of how it came about; see `task.py`.
MEANS = {1.0: "rank zero's", 1.25: "mean over samples", 1.5: "mean of means", 2.0: "the last batch's"}
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def ended_runs(client: MlflowClient) -> list[Run]:
    """Return all runs, once none is running any more, or after ten seconds."""
    deadline_s = time.monotonic() + 10
    while True:
        runs = all_runs(client)
        if time.monotonic() > deadline_s or all(run.info.status != "RUNNING" for run in runs):
            return runs
        time.sleep(0.5)  # who ends a run of a script that was killed is another process, if anybody


def facts_of(client: MlflowClient, run: Run, cwd: Path) -> dict[str, Any]:
    """Return the status, metrics and models of one run."""
    points = {key: client.get_metric_history(run.info.run_id, key) for key in sorted(run.data.metrics)}
    logged = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    place = Path(tempfile.mkdtemp(dir=cwd))
    models = {}
    for model in logged:
        where = place / model.model_id
        where.mkdir()
        try:
            mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(where))
        except Exception as error:
            models[model.name] = {"status": str(model.status), "error": first_line(error)}
            continue
        models[f"{model.name} ({model.model_id[:6]})"] = {"status": str(model.status), **facts_of_files(where)}
    artifacts = {}
    for item in client.list_artifacts(run.info.run_id):
        where = place / "artifacts" / item.path
        where.mkdir(parents=True)
        client.download_artifacts(run.info.run_id, item.path, str(where))
        artifacts[item.path] = facts_of_files(where)
    return {
        "status": run.info.status,
        "reason": run.data.tags.get("harness.end_reason"),
        "losses": {
            key: {
                "points": len(found),
                "at_steps": len({point.step for point in found}),
                "value": found[-1].value,
                "is": MEANS.get(round(found[-1].value, 4), "another"),
            }
            for key, found in points.items()
            if "loss" in key
        },
        "odd_values": {key[4:]: points[key][-1].value for key in points if key.startswith("odd_")},
        "models": models,
        "artifacts": artifacts,
    }


def facts_of_files(directory: Path) -> dict[str, Any]:
    """Return the kinds of artifacts, and for those with weights whether they are complete."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    # A directory of `torch.distributed.checkpoint` counts as one artifact.
    sharded = {path.parent for path in paths if path.suffix == ".distcp"}
    candidates = [*sharded, *(path for path in paths if path.suffix in WEIGHTS)]
    weights = {str(path.relative_to(directory)): wholeness(path) for path in candidates}
    return {
        "kinds": sorted({path.suffix or path.name for path in paths}),
        "weights": {name: verdict for name, verdict in weights.items() if verdict},
    }


def wholeness(path: Path) -> str:
    """Return whether the model's four tensors are complete, or what is there instead; empty if there are no weights."""
    try:
        content = load(path)
    except Exception as error:
        return f"does not load: {first_line(error)}"
    found = tensors_of(content)
    wanted = task.Net().state_dict()
    found = {name: tensor for name in wanted for key, tensor in found.items() if f".{key}".endswith(f".{name}")}
    if not found:
        return ""
    if kinds := {type(tensor).__name__ for tensor in found.values()} - {"Tensor", "Parameter"}:
        return f"{', '.join(sorted(kinds))} of {[tuple(tensor.shape) for tensor in found.values()]}"
    is_whole = found.keys() == wanted.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    return "whole" if is_whole else f"other: {sorted(found)} of {[tuple(tensor.shape) for tensor in found.values()]}"


def load(path: Path) -> Any:
    if path.is_dir():
        whole = path / "whole.pt"
        dcp_to_torch_save(path, whole)
        return torch.load(whole, weights_only=False)
    return (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=False)
    )


def tensors_of(content: Any) -> dict[str, Any]:
    """Return all tensors in a nested structure, by name."""
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if not isinstance(content, dict):
        return {}
    found = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    for key in ("state_dict", "module", "model"):
        found |= tensors_of(content.get(key))
    return found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
