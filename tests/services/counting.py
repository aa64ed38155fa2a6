"""Compares what was sent with what MLflow has: sent, stored, stored twice, lost."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from harness.checkpoint.format.commit import list_checkpoints
from harness.tracking.mlflow.registry import CHECKPOINT_TAG
from tests.mlflow_reader import models


@dataclass(frozen=True)
class Count:
    """The counts of one kind of entry.

    Args:
        sent: that the tracker has taken, each once.
        there: that MLflow has of those, each once.
        twice: that MLflow has beyond one of each.
        lost: that were sent and are not there.
        other: that are there and were not sent, or are otherwise than they were sent.
    """

    sent: int
    there: int
    twice: int
    lost: int
    other: int

    @property
    def is_whole(self) -> bool:
        """Whether each is there once."""
        return self.sent == self.there and not (self.twice or self.lost or self.other)


def count_of(sent: Iterable[Hashable], there: Iterable[Hashable]) -> Count:
    """Compare two collections, of which the first may name a thing more than once."""
    wanted, found = set(sent), Counter(there)
    return Count(
        len(wanted),
        len(wanted & found.keys()),
        sum(found.values()) - len(found),
        len(wanted - found.keys()),
        len(found.keys() - wanted),
    )


def read_sent(path: Path) -> list[dict[str, Any]]:
    """What `tracking_load` has written; a line that was cut off by a kill was not."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def count(uri: str, experiment: str, sent_path: Path, run_dir: Path | None) -> dict[str, Count]:
    """Count everything of the one run of an experiment; several runs are counted too, and the oldest is looked at.

    Args:
        uri: of the store itself, not by way of a proxy.
        experiment: its name.
        sent_path: see `tracking_load`.
        run_dir: where the checkpoints are; None: there are none.
    """
    reader = MlflowClient(uri)
    runs = _runs(reader, experiment)
    run = runs[-1]
    sent = read_sent(sent_path)
    counts = {
        "runs": Count(1, 1, len(runs) - 1, 0, 0),
        "points": count_of(sent_points(sent), there := points(reader, run)),
        "order": _order(there),
        "params": count_of(_values(sent, "params"), _starting(run.data.params, "param.")),
        "tags": count_of(_values(sent, "tags"), _starting(run.data.tags, "load.")),
        "texts": _texts(uri, run, sent),
    }
    if run_dir is not None:
        counts |= _models(uri, reader, run, run_dir, sent)
    return counts


def _runs(reader: MlflowClient, experiment: str) -> list[Run]:
    found = reader.get_experiment_by_name(experiment)
    assert found is not None, f"no experiment {experiment}"
    runs = list(reader.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"]))
    assert runs, f"no run in {experiment}"
    return runs


def sent_points(sent: Iterable[Mapping[str, Any]]) -> set[Hashable]:
    """Each point: key, step, value."""
    return {
        (key, record["step"], _comparable(value))
        for record in sent
        if record["kind"] == "metrics"
        for key, value in record["values"].items()
    }


def points(reader: MlflowClient, run: Run) -> list[Hashable]:
    """Each point of the run, as often as it is there."""
    return [
        (key, point.step, _comparable(point.value))
        for key in run.data.metrics
        for point in reader.get_metric_history(run.info.run_id, key)
    ]


def _order(there: Iterable[Hashable]) -> Count:
    """Each metric, which is there where its points are in the order of its steps."""
    steps: dict[str, list[int]] = {}
    for key, step, _ in there:  # type: ignore[misc]
        steps.setdefault(key, []).append(step)
    return count_of(steps, [key for key, found in steps.items() if found == sorted(found)])


def _comparable(value: float) -> float | str:
    return "nan" if math.isnan(value) else value


def _values(sent: Iterable[Mapping[str, Any]], kind: str) -> set[Hashable]:
    """Name and value of each, the last value of each name."""
    last: dict[str, str] = {}
    for record in sent:
        if record["kind"] == kind:
            last |= record["values"]
    return set(last.items())


def _starting(values: Mapping[str, str], prefix: str) -> list[Hashable]:
    return [(key, value) for key, value in values.items() if key.startswith(prefix)]


def _texts(uri: str, run: Run, sent: Iterable[Mapping[str, Any]]) -> Count:
    wanted = {(record["name"], record["content"]) for record in sent if record["kind"] == "text"}
    if not wanted:
        return Count(0, 0, 0, 0, 0)
    return count_of(wanted, _files(uri, f"runs:/{run.info.run_id}/texts", "texts/"))


def _files(uri: str, where: str, prefix: str = "") -> list[Hashable]:
    with tempfile.TemporaryDirectory(prefix="harness-count-") as directory:
        try:
            # By the place itself: MLflow resolves ``models:/`` through the process's own server.
            repository = get_artifact_repository(where, tracking_uri=uri)
            found = Path(repository.download_artifacts("", dst_path=directory))
        except Exception as error:
            return [("not downloaded", str(error))]
        return [
            (f"{prefix}{path.relative_to(found)}", path.read_text() if prefix else path.read_bytes())
            for path in found.rglob("*")
            if path.is_file()
        ]


def _models(
    uri: str, reader: MlflowClient, run: Run, run_dir: Path, sent: Iterable[Mapping[str, Any]]
) -> dict[str, Count]:
    on_disk = {manifest.key: name for name, manifest in list_checkpoints(run_dir / "checkpoints")}
    wanted = {record["key"] for record in sent if record["kind"] == "checkpoint"}
    assert wanted <= on_disk.keys(), "a checkpoint was published that is not on disk"
    found = models(reader, run)
    outputs = run.outputs.model_outputs if run.outputs else []
    # MLflow keeps the link to a deleted model, for example a duplicate, and cannot remove it.
    keys = {model.model_id: model.tags[CHECKPOINT_TAG] for model in found}
    links = [keys[output.model_id] for output in outputs if output.model_id in keys]
    files_sent: set[Hashable] = set()
    files_there: list[Hashable] = []
    points_sent: set[Hashable] = set()
    points_there: list[Hashable] = []
    for key, name in on_disk.items():
        directory = run_dir / "checkpoints" / name
        files_sent |= {(key, path.name, path.read_bytes()) for path in directory.iterdir()}
        step = json.loads((directory / "manifest.json").read_text())["step"]
        points_sent |= {(key, *point) for point in sent_points(sent) if point[1] == step}  # type: ignore[index, misc]
    for model in found:
        key = model.tags[CHECKPOINT_TAG]
        files_there += [(key, *file) for file in _files(uri, model.artifact_location)]  # type: ignore[misc]
        points_there += [
            (key, point.key, point.step, _comparable(point.value)) for point in model.metrics or [] if point.step > 0
        ]
    return {
        # Include the status: a model that is not READY is incomplete.
        "models": count_of([(key, "READY") for key in on_disk], [_state(model) for model in found]),
        "links": count_of(on_disk, links),
        "model points": count_of(points_sent, points_there),
        "model files": count_of(files_sent, files_there),
    }


def _state(model: LoggedModel) -> tuple[str, str]:
    return model.tags[CHECKPOINT_TAG], str(model.status)


def table(counts: Mapping[str, Count]) -> str:
    """For a terminal."""
    lines = [f"{'':14}{'sent':>8}{'there':>8}{'twice':>8}{'lost':>8}{'other':>8}"]
    lines += [f"{kind:14}{c.sent:8}{c.there:8}{c.twice:8}{c.lost:8}{c.other:8}" for kind, c in counts.items()]
    return "\n".join(lines)


def problems(counts: Mapping[str, Count]) -> list[str]:
    """One line for each kind that is not there once; empty: all is well."""
    return [f"{kind}: {count}" for kind, count in counts.items() if not count.is_whole]
