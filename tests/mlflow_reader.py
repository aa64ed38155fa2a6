"""What MLflow has, read the way its users do."""

from __future__ import annotations

import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Metric, Run


def client(cwd: Path) -> MlflowClient:
    """A client of the default store of runs that were started in `cwd`."""
    return MlflowClient(f"sqlite:///{cwd / 'mlflow.db'}")


def only_run(cwd: Path, *, wait_for_end_s: float = 0) -> Run:
    """The one run there is; fails if there are several, as there would be with a run for each rank."""
    deadline_s = time.monotonic() + wait_for_end_s
    while True:
        runs = all_runs(client(cwd))
        assert len(runs) == 1, [run.info.run_name for run in runs]
        if runs[0].info.status != "RUNNING" or time.monotonic() > deadline_s:
            return runs[0]
        time.sleep(0.2)  # the publisher outlives a trainer that was killed; there is nothing else to wait on


def all_runs(reader: MlflowClient) -> list[Run]:
    """Every run of every experiment."""
    return list(reader.search_runs([e.experiment_id for e in reader.search_experiments()]))


def history(reader: MlflowClient, run: Run, key: str) -> list[Metric]:
    """All points of a metric, by step."""
    return sorted(reader.get_metric_history(run.info.run_id, key), key=lambda point: point.step)


def models(reader: MlflowClient, run: Run) -> list[LoggedModel]:
    """The run's LoggedModels, oldest first."""
    found: list[LoggedModel] = []
    token = None
    while True:
        page = reader.search_logged_models(
            [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'", page_token=token
        )
        found += page
        if not (token := page.token):
            break
    return sorted(found, key=lambda model: int(model.tags["step"]))
