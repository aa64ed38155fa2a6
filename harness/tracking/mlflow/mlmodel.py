"""Create the files that make a directory of weights an MLflow model. Imports neither torch nor mlflow.

The format is MLflow's ``MLmodel`` (since 1.0) with the keys of mlflow 3. The files are deterministic, so that a second
upload equals the first. The journal and the files on disk call a model spec a recipe.
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
_MODEL_SPEC = "recipe-{}.json"


def write_model_spec(outbox_dir: Path, attempt: int, model_spec: Mapping[str, Any]) -> str:
    """Write a model spec for the publisher, unless it is unchanged, and return the file's name.

    Effects: not collective; rank 0's trainer; blocks on fsync; leaves ``<outbox_dir>/recipe-<attempt>.json``.

    Raises:
        TrackingError: if the file cannot be written.
    """
    newest = newest_model_spec(outbox_dir)
    if newest is not None and read_model_spec(outbox_dir, newest) == model_spec:
        return newest
    name = _MODEL_SPEC.format(attempt)
    try:
        replace_file(outbox_dir / name, json.dumps(model_spec) + "\n", is_private=True)
    except OSError as error:
        raise TrackingError(f"{outbox_dir / name}: cannot be written: {error.strerror}; free space there") from error
    return name


def newest_model_spec(outbox_dir: Path) -> str | None:
    """Return the file name of the newest attempt's model spec; None if there is no file."""
    numbers = [path.stem.partition("-")[2] for path in outbox_dir.glob(_MODEL_SPEC.format("*"))]
    return _MODEL_SPEC.format(max(map(int, numbers))) if numbers else None


def read_model_spec(outbox_dir: Path, name: str) -> dict[str, Any]:
    """Read a file that `write_model_spec` has written."""
    model_spec: dict[str, Any] = json.loads((outbox_dir / name).read_text())
    return model_spec


def model_files(model_spec: Mapping[str, Any], record: Mapping[str, Any], model_id: str, run_id: str) -> dict[str, str]:
    """Return name -> text of all files other than the weights.

    Without a class there is no ``python_function`` flavor, so MLflow cannot build the model, but `harness.load_model`
    can load the weights into a given one.
    """
    requirements: Sequence[str] = model_spec["requirements"]
    notes = "".join(f"# {line}\n" for line in model_spec["requirement_notes"])
    files = {
        "requirements.txt": notes + "".join(f"{line}\n" for line in requirements),
        "python_env.yaml": _yaml(
            {
                "python": model_spec["python"],
                "build_dependencies": ["pip", "setuptools", "wheel"],
                "dependencies": ["-r requirements.txt"],
            }
        ),
        "conda.yaml": _yaml(
            {
                "name": "mlflow-env",
                "channels": ["conda-forge"],
                "dependencies": [f"python={model_spec['python']}", "pip", {"pip": list(requirements)}],
            }
        ),
    }
    mlmodel = _mlmodel(model_spec, record, model_id, run_id)
    if model_spec.get("example") is not None:
        mlmodel["saved_input_example_info"] = {
            "artifact_path": "input_example.json",
            "type": "ndarray",
            "serving_input_path": "serving_input_example.json",
        }
        files["input_example.json"] = json.dumps(model_spec["example"])
        files["serving_input_example.json"] = json.dumps({"inputs": model_spec["example"]})
    return {**model_spec.get("files", {}), **files, MLMODEL: _yaml(mlmodel)}


def _mlmodel(model_spec: Mapping[str, Any], record: Mapping[str, Any], model_id: str, run_id: str) -> dict[str, Any]:
    weights = [name for name in record["files"] if name.startswith("model")]
    flavors: dict[str, Any] = {
        FLAVOR: {
            "class_path": model_spec["class_path"],
            "init_args": model_spec["init_args"],
            "model_class": model_spec["model_class"],
            "weights": weights,
        }
    }
    if model_spec["class_path"] is not None:
        flavors["python_function"] = {
            "loader_module": LOADER_MODULE,
            "python_version": model_spec["python"],
            "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            # `mlflow.pyfunc.load_model(model_config=...)` accepts only these keys.
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
    if (pinned := _version("mlflow", model_spec["requirements"])) is not None:
        mlmodel["mlflow_version"] = pinned
    if model_spec.get("signature") is not None:
        # Each schema is a JSON text, as in `ModelSignature.to_dict`.
        schemas = {name: json.dumps(specs) for name, specs in model_spec["signature"].items()}
        mlmodel["signature"] = {**schemas, "params": None}
    return mlmodel


def _version(name: str, requirements: Sequence[str]) -> str | None:
    start = f"{name}=="
    return next((line.removeprefix(start) for line in requirements if line.startswith(start)), None)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=True)
