"""Write one run's metrics, parameters, tags, inputs and artifacts to an MLflow store.

All methods are idempotent. Runs and models are searched by a tag before they are created. MLflow stores a point with
equal key, step, time and value once (measured with sqlite and PostgreSQL).
"""

from __future__ import annotations

import json
import math
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, INVALID_STATE
from mlflow.utils import rest_utils
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from harness.tracking.mlflow.client import (
    MAX_DATASET_NAME_CHARS,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_CHARS,
    MAX_PARAMS_PER_BATCH,
    MAX_TAG_CHARS,
    MAX_TAGS_PER_BATCH,
    connect,
    extend_timeout,
    is_permanent,
    rest_store_of,
    retry_conflicts,
)
from harness.tracking.mlflow.models import PublishedModels
from harness.tracking.mlflow.names import clean_key, clean_path, quotable, quoted
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store_protocol import WantedRun
from harness.tracking.mlflow.uploads import UploadError, UploadMeter

RUN_TAG = "harness.run"
PARENT_TAG = "harness.parent"
_ENDED = ("FINISHED", "FAILED", "KILLED")
# After this pause, two jobs that create the same parent run concurrently find each other's.
_DUPLICATE_PAUSE_S = 1.0
_LOG_BATCH = "/api/2.0/mlflow/runs/log-batch"


class MlflowStore:
    """Writes one run to one MLflow store; implements `Store`.

    Effects: the publisher's threads only; each method blocks on the network or on sqlite.
    """

    def __init__(self, tracking_uri: str, client: Any = None, meter: UploadMeter | None = None) -> None:
        # Embedded stores find the model of a new version through the process's default address.
        mlflow.set_tracking_uri(tracking_uri)
        self._given_client = client
        self._tracking_uri = tracking_uri
        self._meter = meter or UploadMeter()
        self._key = ""
        self._parent_id: str | None = None
        self.run_id = ""
        self.experiment_id = ""
        self.experiment_name: str | None = None
        # Status and end time of a run that had ended before `open_run`.
        self._status_before: tuple[str, int] | None = None

    @cached_property
    def _client(self) -> mlflow.MlflowClient:
        # On first use, so that a failure is retried.
        return self._given_client or connect(self._tracking_uri)

    @cached_property
    def _rest_store(self) -> Any:
        return rest_store_of(self._client)

    @cached_property
    def _models(self) -> PublishedModels:
        # On first use, because it needs the open run.
        return PublishedModels(self._client, self._tracking_uri, self.run_id, self.experiment_id, self._meter)

    def open_run(self, wanted: WantedRun) -> None:
        """Find the run by its id or its key, or create it, and set it RUNNING."""
        self._key = wanted.key
        if wanted.run_id is not None:
            self._open_known(wanted.run_id)
            return
        if wanted.given_run_id is not None:
            self._open_known(wanted.given_run_id)
            self.experiment_name = self._client.get_experiment(self.experiment_id).name
            return
        if wanted.experiment_id is not None:
            self.experiment_id, self.experiment_name = self._experiment_by_id(wanted.experiment_id)
        else:
            self.experiment_id = self._experiment(wanted.experiment_name)
        found = self._runs_with(RUN_TAG, wanted.key)
        parent = None if wanted.parent is None else self._parent(wanted.parent, wanted.created_ms)
        if found:
            self._parent_id = self._own_parent(found[0])
            self.run_id = found[0].info.run_id
            self.reopen()
            return
        tags = {RUN_TAG: wanted.key} | ({} if parent is None else {MLFLOW_PARENT_RUN_ID: parent})
        run = self._client.create_run(self.experiment_id, start_time=wanted.created_ms, tags=tags, run_name=wanted.name)
        self._parent_id = self._own_parent(run)
        self.run_id = run.info.run_id

    def _experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                made: str = self._client.create_experiment(name)
                return made
            except MlflowException:
                # Another job may have created it concurrently.
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise MlflowException(
                f"the experiment {name!r} is deleted; restore it or name another", error_code=INVALID_STATE
            )
        found: str = experiment.experiment_id
        return found

    def _experiment_by_id(self, experiment_id: str) -> tuple[str, str]:
        """Return id and name of the experiment in MLFLOW_EXPERIMENT_ID, which is never created."""
        experiment = None
        try:
            experiment = self._client.get_experiment(experiment_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        if experiment is None:
            # Raised outside the handler: `root_cause` would show MLflow's error, which does not name the variable.
            raise MlflowException(
                f"there is no experiment {experiment_id!r}, which MLFLOW_EXPERIMENT_ID names", error_code=INVALID_STATE
            )
        if experiment.lifecycle_stage == "deleted":
            raise MlflowException(
                f"the experiment {experiment.name!r}, which MLFLOW_EXPERIMENT_ID={experiment_id} names, is deleted; "
                "restore it or name another",
                error_code=INVALID_STATE,
            )
        return experiment.experiment_id, experiment.name

    def _runs_with(self, tag: str, value: str) -> list[Run]:
        return list(
            self._client.search_runs(
                [self.experiment_id], f"tags.`{tag}` = {quoted(value)}", order_by=["attributes.start_time ASC"]
            )
        )

    def _parent(self, wanted: str, created_ms: int | None) -> str:
        """Find the parent run by its id or its name, or create it; set it RUNNING and return its id."""
        if re.fullmatch(r"[0-9a-f]{32}", wanted):
            self._client.get_run(wanted)
            return wanted
        name = quotable(wanted)
        found = self._runs_with(PARENT_TAG, name)
        if not found:
            self._client.create_run(self.experiment_id, start_time=created_ms, tags={PARENT_TAG: name}, run_name=wanted)
            # Search again, because jobs that created two parents concurrently must choose the same one.
            time.sleep(_DUPLICATE_PAUSE_S)
            found = self._runs_with(PARENT_TAG, name)
        parent: str = min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id
        for duplicate in found:
            if duplicate.info.run_id != parent and not self._runs_with(MLFLOW_PARENT_RUN_ID, duplicate.info.run_id):
                self._client.delete_run(duplicate.info.run_id)
        self._client.update_run(parent, status="RUNNING")
        return parent

    def _own_parent(self, run: Run) -> str | None:
        """Return the id of the run's parent if this class created it; the user ends any other parent."""
        parent_id: str | None = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        if parent_id is None:
            return None
        try:
            tags = self._client.get_run(parent_id).data.tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return parent_id if PARENT_TAG in tags else None

    def _open_known(self, run_id: str) -> None:
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise MlflowException(
                f"the MLflow run {run_id} does not exist at this address; give the run's address, or another run_name",
                error_code=INVALID_STATE,
            ) from error
        if run.info.lifecycle_stage == "deleted":
            raise MlflowException(
                f"the MLflow run {run_id} is deleted; restore it (`mlflow runs restore`), or give another run_name",
                error_code=INVALID_STATE,
            )
        self.run_id, self.experiment_id = run_id, run.info.experiment_id
        if run.info.status in _ENDED:
            self._status_before = run.info.status, run.info.end_time
        self._parent_id = self._own_parent(run)
        self.reopen()

    def reopen(self) -> None:
        """Set the run RUNNING again. MLflow cannot clear its earlier end time."""
        self._client.update_run(self.run_id, status="RUNNING")
        if self._parent_id is not None:
            self._client.update_run(self._parent_id, status="RUNNING")

    def tags(self) -> Mapping[str, str]:
        """Return the run's tags."""
        tags: dict[str, str] = self._client.get_run(self.run_id).data.tags
        return tags

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log any number of (key, value, time in ms, step) points."""
        points = [_storable_point(*point) for point in points]
        for start in range(0, len(points), MAX_METRICS_PER_BATCH):
            batch = points[start : start + MAX_METRICS_PER_BATCH]
            retry_conflicts(partial(self._log_batch_of_points, batch))

    def _log_batch_of_points(self, batch: Sequence[tuple[str, float, int, int]]) -> None:
        if self._rest_store is None:
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
        else:
            # The client would create three objects for each point and convert the JSON twice, a quarter of the
            # delivery's time.
            rest_utils.http_request_safe(
                self._rest_store.get_host_creds(),
                _LOG_BATCH,
                "POST",
                extra_headers={"Content-Type": "application/json"},
                data=_log_batch_body(self.run_id, batch).encode(),
            )

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters; long values are cut."""
        params = [Param(key, _storable(value)[:MAX_PARAM_CHARS]) for key, value in _clean_keys(values).items()]
        for start in range(0, len(params), MAX_PARAMS_PER_BATCH):
            batch = params[start : start + MAX_PARAMS_PER_BATCH]
            retry_conflicts(partial(self._client.log_batch, self.run_id, params=batch))

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags; long values are cut."""
        tags = [RunTag(key, _storable(value)[:MAX_TAG_CHARS]) for key, value in _clean_keys(values).items()]
        for start in range(0, len(tags), MAX_TAGS_PER_BATCH):
            retry_conflicts(partial(self._client.log_batch, self.run_id, tags=tags[start : start + MAX_TAGS_PER_BATCH]))

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        """Log a data set as an input of the run."""
        dataset = Dataset(
            name=_storable(record["name"])[:MAX_DATASET_NAME_CHARS],
            digest=record["digest"],
            source_type=record["source_type"],
            source=record["source"],
            profile=record["profile"],
        )
        tags = [InputTag("mlflow.data.context", record["context"])]
        retry_conflicts(partial(self._client.log_inputs, self.run_id, [DatasetInput(dataset, tags)]))

    def log_text(self, name: str, content: str) -> None:
        """Upload a text file to the run's artifacts.

        Raises:
            UploadError: if the file is missing or incomplete afterwards, which the upload's response does not show.
        """
        path, content = clean_path(name), _storable(content)
        self._client.log_text(self.run_id, content, path)
        listed = self._client.list_artifacts(self.run_id, posixpath.dirname(path) or None)
        num_bytes = next((found.file_size for found in listed if found.path == posixpath.normpath(path)), None)
        if num_bytes != len(content.encode()):
            raise UploadError(f"{path} has {num_bytes} bytes in the artifact store and not {len(content.encode())}")

    def log_checkpoint(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        model_spec: Mapping[str, Any] | None = None,
    ) -> str:
        """Publish a committed checkpoint; see `PublishedModels.publish`."""
        return self._models.publish(record, directory, registration, model_spec)

    def drop_resume_state(self, key: str) -> Sequence[str]:
        """See `PublishedModels.drop_resume_state`."""
        return self._models.drop_resume_state(key)

    def retire_checkpoint(self, key: str, registration: Registration | None) -> bool:
        """Delete the model of a pruned checkpoint; see `PublishedModels.retire`."""
        return self._models.retire(key, registration)

    def is_permanent(self, error: Exception) -> bool:
        """See `harness.tracking.mlflow.client.is_permanent`."""
        return is_permanent(error)

    def handle_transient_error(self, error: Exception) -> None:
        """Extend the request timeout if the server did not respond in time."""
        extend_timeout(error)

    def set_terminated(self, status: str | None, end_time_ms: int, *, is_user_run: bool = False) -> None:
        """Delete duplicates and set the run's final status, and its parent's after the last child.

        Args:
            status: FINISHED, FAILED or KILLED; None if the user's code ends its own run.
            end_time_ms: milliseconds since the epoch.
            is_user_run: whether the user created the run. A run that has ended is not changed, and one that had ended
                before `open_run` gets its earlier status and end time again.
        """
        self._delete_duplicates()
        if status is None or (is_user_run and self._client.get_run(self.run_id).info.status in _ENDED):
            return
        if is_user_run and self._status_before is not None:
            status, end_time_ms = self._status_before
        self._client.set_terminated(self.run_id, status, end_time_ms)
        if self._parent_id is None:
            return
        states = {child.info.status for child in self._runs_with(MLFLOW_PARENT_RUN_ID, self._parent_id)}
        if not states & {"RUNNING", "SCHEDULED"}:
            worst = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
            self._client.set_terminated(self._parent_id, worst, end_time_ms)

    def _delete_duplicates(self) -> None:
        """Delete duplicate runs and models, which a server creates if it executes a request after its timeout."""
        for run in self._runs_with(RUN_TAG, self._key):
            if run.info.run_id != self.run_id:
                self._client.delete_run(run.info.run_id)
        self._models.delete_duplicates()


def _log_batch_body(run_id: str, points: Sequence[tuple[str, float, int, int]]) -> str:
    """Return the body of a log-batch request, in the JSON form of its protocol buffer."""
    metrics = [
        {"key": key, "value": _json_number(value), "timestamp": time_ms, "step": step}
        for key, value, time_ms, step in points
    ]
    return json.dumps({"run_id": run_id, "metrics": metrics})


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _storable_point(key: str, value: float, time_ms: int, step: int) -> tuple[str, float, int, int]:
    """Clean a point's name, and reject numbers without a 64-bit form, for which MLflow's error would look transient."""
    try:
        number, whole_step = float(value), int(step)
        if -(2**63) <= whole_step < 2**63:
            return clean_key(key), number, time_ms, whole_step
    except (TypeError, ValueError, OverflowError):
        pass
    raise MlflowException(
        f"step {step!r:.40} or value {value!r:.40} is not a 64-bit number", error_code=INVALID_PARAMETER_VALUE
    )


def _storable(text: str) -> str:
    """Replace characters that a database refuses: lone surrogates, and NUL in PostgreSQL."""
    return text.encode(errors="replace").decode().replace("\0", "?")


def _clean_keys(values: Mapping[str, str]) -> dict[str, str]:
    # Journals of earlier versions hold unchecked names.
    return {clean_key(name): value for name, value in values.items()}
