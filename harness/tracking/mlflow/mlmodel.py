"""The files that make a directory of weights a model as MLflow means it. Importing this imports no torch, no mlflow.

The format is MLflow's own (``MLmodel``, since 1.0; the keys as mlflow 3 writes them). The same checkpoint gives the
same bytes each time, so that a second upload is the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from harness.errors import TrackingError
from harness.io.durable_files import replace_file

MLMODEL = "MLmodel"
FLAVOR = "harness"
LOADER_MODULE = "harness.flavor"
_RECIPE = "recipe-{}.json"


def write_recipe(outbox_dir: Path, attempt: int, recipe: Mapping[str, Any]) -> str:
    """Keep a recipe for the publisher; returns its file's name. One that is there already is not written again.

    Effects: not collective, rank zero's trainer; blocks on fsync; leaves ``<outbox_dir>/recipe-<attempt>.json``.

    Raises:
        TrackingError: if the disk refuses it.
    """
    newest = newest_recipe(outbox_dir)
    if newest is not None and read_recipe(outbox_dir, newest) == recipe:
        return newest
    name = _RECIPE.format(attempt)
    try:
        replace_file(outbox_dir / name, json.dumps(recipe) + "\n", is_private=True)
    except OSError as error:
        raise TrackingError(f"{outbox_dir / name}: cannot be written: {error.strerror}; free space there") from error
    return name


def newest_recipe(outbox_dir: Path) -> str | None:
    """Name of the newest attempt's; None where there is none."""
    numbers = [path.stem.partition("-")[2] for path in outbox_dir.glob(_RECIPE.format("*"))]
    return _RECIPE.format(max(map(int, numbers))) if numbers else None


def read_recipe(outbox_dir: Path, name: str) -> dict[str, Any]:
    """What `write_recipe` has kept."""
    recipe: dict[str, Any] = json.loads((outbox_dir / name).read_text())
    return recipe


def model_files(recipe: Mapping[str, Any], record: Mapping[str, Any], model_id: str, run_id: str) -> dict[str, str]:
    """Name -> text of all that goes beside the weights.

    Without a class there is no ``python_function`` flavor: MLflow itself cannot build the model then, and
    `harness.load_model` can with one that it is given.

    Args:
        recipe: see `harness.models.model_spec`.
        record: of the checkpoint, as the tracker has written it.
        model_id: of the LoggedModel.
        run_id: of the MLflow run.
    """
    requirements: Sequence[str] = recipe["requirements"]
    notes = "".join(f"# {line}\n" for line in recipe["requirement_notes"])
    files = {
        "requirements.txt": notes + "".join(f"{line}\n" for line in requirements),
        "python_env.yaml": _yaml(
            {
                "python": recipe["python"],
                "build_dependencies": ["pip", "setuptools", "wheel"],
                "dependencies": ["-r requirements.txt"],
            }
        ),
        "conda.yaml": _yaml(
            {
                "name": "mlflow-env",
                "channels": ["conda-forge"],
                "dependencies": [f"python={recipe['python']}", "pip", {"pip": list(requirements)}],
            }
        ),
    }
    mlmodel = _mlmodel(recipe, record, model_id, run_id)
    if recipe.get("example") is not None:
        mlmodel["saved_input_example_info"] = {
            "artifact_path": "input_example.json",
            "type": "ndarray",
            "serving_input_path": "serving_input_example.json",
        }
        files["input_example.json"] = json.dumps(recipe["example"])
        files["serving_input_example.json"] = json.dumps({"inputs": recipe["example"]})
    return {**recipe.get("files", {}), **files, MLMODEL: _yaml(mlmodel)}


def _mlmodel(recipe: Mapping[str, Any], record: Mapping[str, Any], model_id: str, run_id: str) -> dict[str, Any]:
    weights = [name for name in record["files"] if name.startswith("model")]
    flavors: dict[str, Any] = {
        FLAVOR: {
            "class_path": recipe["class_path"],
            "init_args": recipe["init_args"],
            "model_class": recipe["model_class"],
            "weights": weights,
        }
    }
    if recipe["class_path"] is not None:
        flavors["python_function"] = {
            "loader_module": LOADER_MODULE,
            "python_version": recipe["python"],
            "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            # What `mlflow.pyfunc.load_model(model_config=...)` may say: only keys that are here.
            "config": {"device": None},
        }
    created = datetime.fromtimestamp(record.get("time_ms", 0) / 1000, UTC).replace(tzinfo=None)
    mlmodel = {
        "artifact_path": f"models:/{model_id}",
        "flavors": flavors,
        "metadata": {"checkpoint": record["key"], "epoch": record["epoch"], "step": record["step"]},
        "model_id": model_id,
        "model_size_bytes": record.get("size_bytes"),
        "model_uuid": model_id,
        "run_id": run_id,
        "utc_time_created": str(created),
    }
    if (pinned := _version("mlflow", recipe["requirements"])) is not None:
        mlmodel["mlflow_version"] = pinned
    if recipe.get("signature") is not None:
        # Each schema is JSON in a text of its own, as `ModelSignature.to_dict` has it.
        schemas = {name: json.dumps(specs) for name, specs in recipe["signature"].items()}
        mlmodel["signature"] = {**schemas, "params": None}
    return mlmodel


def _version(name: str, requirements: Sequence[str]) -> str | None:
    start = f"{name}=="
    return next((line.removeprefix(start) for line in requirements if line.startswith(start)), None)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=True)
