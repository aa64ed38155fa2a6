"""What the publisher says, in MLflow's terms: the run and its records. Its models are `mlflow_models`'.

Every method can be called again with the same arguments and leaves what one call would have left:
runs and models are looked up by a tag of ours before they are made, and a metric point with equal
key, step, time and value is stored once by MLflow itself (measured: sqlite, PostgreSQL).
"""

from __future__ import annotations

import json
import math
import posixpath
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, INVALID_STATE
from mlflow.utils import rest_utils
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from harness.tracking.mlflow.client import connect, despite_conflicts, give_longer, server_of
from harness.tracking.mlflow.models import PublishedModels
from harness.tracking.mlflow.names import clean_key, clean_path, in_quotes, searchable
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store_protocol import WantedRun
from harness.tracking.mlflow.uploads import Pace, UploadError

RUN_TAG = "harness.run"
PARENT_TAG = "harness.parent"
_ENDED = ("FINISHED", "FAILED", "KILLED")
# Two jobs that make the same run at the same moment see each other after so long.
_TWIN_PAUSE_S = 1.0

# MLflow's limits on one request and one value.
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_TAGS_PER_BATCH = 100
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_DATASET_NAME_CHARS = 500
_LOG_BATCH = "/api/2.0/mlflow/runs/log-batch"


class MlflowStore:
    """One run in one MLflow store.

    Effects: not collective; the publisher's thread only; each method blocks on the network or on
    sqlite; leaves nothing on disk but what a ``sqlite:`` store keeps.

    Args:
        tracking_uri: where the store is.
        client: what to reach it by; None: MLflow's own client.
        pace: the limit of the rate at which files go.
        sent: told of the bytes of files that went; from any thread.
    """

    def __init__(
        self,
        tracking_uri: str,
        client: Any = None,
        pace: Pace | None = None,
        sent: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        # Embedded stores look the model of a new version up through the process's default.
        mlflow.set_tracking_uri(tracking_uri)
        self._given_client = client
        self._tracking_uri = tracking_uri
        self._pace = pace or Pace(None)
        self._sent = sent
        self._key = ""
        self._parent_id: str | None = None
        self.run_id = ""
        self.experiment_id = ""
        self.experiment_name: str | None = None
        self._ended_before: tuple[str, int] | None = None

    @cached_property
    def _client(self) -> mlflow.MlflowClient:
        # Not before it is needed: where it cannot be made now, it is tried again.
        return self._given_client or connect(self._tracking_uri)

    @cached_property
    def _server(self) -> Any:
        return server_of(self._client)

    @cached_property
    def _models(self) -> PublishedModels:
        # Not before there is a run.
        return PublishedModels(
            self._client, self._tracking_uri, self.run_id, self.experiment_id, self._pace, self._sent
        )

    def open_run(self, wanted: WantedRun) -> None:
        """Find the run by its id, or find or make the one that carries its key; it is RUNNING then.

        By its id it is found in an experiment that has another name by now.
        """
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
                # Another job made it at the same moment.
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
        """Id and name of an experiment that MLFLOW_EXPERIMENT_ID names, which is never made."""
        experiment = None
        try:
            experiment = self._client.get_experiment(experiment_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        if experiment is None:
            # Not in place of MLflow's error, which does not name the variable and is the root of a chain.
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
        """Runs of the experiment that carry a tag, the oldest first."""
        return list(
            self._client.search_runs(
                [self.experiment_id], f"tags.`{tag}` = {in_quotes(value)}", order_by=["attributes.start_time ASC"]
            )
        )

    def _parent(self, wanted: str, created_ms: int | None) -> str:
        """The id of the run to nest under, by its id or its name; made where there is none, and RUNNING."""
        if re.fullmatch(r"[0-9a-f]{32}", wanted):
            self._client.get_run(wanted)
            return wanted
        name = searchable(wanted)
        found = self._runs_with(PARENT_TAG, name)
        if not found:
            self._client.create_run(self.experiment_id, start_time=created_ms, tags={PARENT_TAG: name}, run_name=wanted)
            # Looked for again: of two that were made at the same moment all take the same one.
            time.sleep(_TWIN_PAUSE_S)
            found = self._runs_with(PARENT_TAG, name)
        parent: str = min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id
        for twin in found:
            if twin.info.run_id != parent and not self._runs_with(MLFLOW_PARENT_RUN_ID, twin.info.run_id):
                self._client.delete_run(twin.info.run_id)
        self._client.update_run(parent, status="RUNNING")
        return parent

    def _own_parent(self, run: Run) -> str | None:
        """The id of the run's parent, if it was made here by its name: any other one is ended by whoever made it."""
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
                f"the MLflow run {run_id} is no longer there; give the address that it is at, or another run_name",
                error_code=INVALID_STATE,
            ) from error
        if run.info.lifecycle_stage == "deleted":
            raise MlflowException(
                f"the MLflow run {run_id} is deleted; restore it (`mlflow runs restore`), or give another run_name",
                error_code=INVALID_STATE,
            )
        self.run_id, self.experiment_id = run_id, run.info.experiment_id
        if run.info.status in _ENDED:
            self._ended_before = run.info.status, run.info.end_time
        self._parent_id = self._own_parent(run)
        self.reopen()

    def reopen(self) -> None:
        """Let the run be RUNNING again.

        Its earlier end time stays until it ends again: MLflow has no way to clear it, and keeps it likewise where
        a run is started again with `mlflow.start_run`.
        """
        self._client.update_run(self.run_id, status="RUNNING")
        if self._parent_id is not None:
            self._client.update_run(self._parent_id, status="RUNNING")

    def tags(self) -> Mapping[str, str]:
        """The tags that the run has."""
        tags: dict[str, str] = self._client.get_run(self.run_id).data.tags
        return tags

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log (key, value, time in ms, step) points, any number."""
        points = [_as_mlflow_has_it(*point) for point in points]
        for start in range(0, len(points), MAX_METRICS_PER_BATCH):
            batch = points[start : start + MAX_METRICS_PER_BATCH]
            despite_conflicts(partial(self._log_batch_of_points, batch))

    def _log_batch_of_points(self, batch: Sequence[tuple[str, float, int, int]]) -> None:
        if self._server is None:
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
        else:
            # The client would make three objects of each point first, and read and write the JSON a second time: a
            # quarter of the time until it is there.
            rest_utils.http_request_safe(
                self._server.get_host_creds(),
                _LOG_BATCH,
                "POST",
                extra_headers={"Content-Type": "application/json"},
                data=_log_batch_body(self.run_id, batch).encode(),
            )

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters; a value that is too long is cut."""
        params = [Param(key, _storable(value)[:MAX_PARAM_CHARS]) for key, value in _clean_keys(values).items()]
        for start in range(0, len(params), MAX_PARAMS_PER_BATCH):
            batch = params[start : start + MAX_PARAMS_PER_BATCH]
            despite_conflicts(partial(self._client.log_batch, self.run_id, params=batch))

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a value that is too long is cut."""
        tags = [RunTag(key, _storable(value)[:MAX_TAG_CHARS]) for key, value in _clean_keys(values).items()]
        for start in range(0, len(tags), MAX_TAGS_PER_BATCH):
            despite_conflicts(
                partial(self._client.log_batch, self.run_id, tags=tags[start : start + MAX_TAGS_PER_BATCH])
            )

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        """Record a data set as an input of the run."""
        dataset = Dataset(
            name=_storable(record["name"])[:MAX_DATASET_NAME_CHARS],
            digest=record["digest"],
            source_type=record["source_type"],
            source=record["source"],
            profile=record["profile"],
        )
        tags = [InputTag("mlflow.data.context", record["context"])]
        despite_conflicts(partial(self._client.log_inputs, self.run_id, [DatasetInput(dataset, tags)]))

    def log_text(self, name: str, content: str) -> None:
        """Put a text file among the run's artifacts.

        Raises:
            UploadError: if it is not there in its size afterwards: an upload's answer does not tell.
        """
        path, content = clean_path(name), _storable(content)
        self._client.log_text(self.run_id, content, path)
        there = self._client.list_artifacts(self.run_id, posixpath.dirname(path) or None)
        num_bytes = next((found.file_size for found in there if found.path == posixpath.normpath(path)), None)
        if num_bytes != len(content.encode()):
            raise UploadError(f"{path} has {num_bytes} bytes in the artifact store and not {len(content.encode())}")

    def log_checkpoint(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        recipe: Mapping[str, Any] | None = None,
    ) -> str:
        """Publish a committed checkpoint; see `PublishedModels.publish`."""
        return self._models.publish(record, directory, registration, recipe)

    def drop_resume_state(self, key: str) -> Sequence[str]:
        """See `PublishedModels.drop_resume_state`."""
        return self._models.drop_resume_state(key)

    def retire_checkpoint(self, key: str, registration: Registration | None) -> bool:
        """Take back a pruned checkpoint; see `PublishedModels.retire`."""
        return self._models.retire(key, registration)

    def failed(self, error: Exception) -> None:
        """Give a server that did not answer in time longer from now on."""
        give_longer(error)

    def end(self, status: str | None, end_time_ms: int, *, is_users: bool = False) -> None:
        """Set the run's final status: FINISHED, FAILED or KILLED; and its parent's with the last of its children.

        Args:
            status: None: the run is the user's own, whose code ends it.
            end_time_ms: when, in milliseconds since the epoch.
            is_users: it is the user's own, whose process is gone: it is as it was before this opened it, or ends now.
        """
        self._remove_twins()
        if status is None or (is_users and self._client.get_run(self.run_id).info.status in _ENDED):
            return
        if is_users and self._ended_before is not None:
            status, end_time_ms = self._ended_before
        self._client.set_terminated(self.run_id, status, end_time_ms)
        if self._parent_id is None:
            return
        states = {child.info.status for child in self._runs_with(MLFLOW_PARENT_RUN_ID, self._parent_id)}
        if not states & {"RUNNING", "SCHEDULED"}:
            worst = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
            self._client.set_terminated(self._parent_id, worst, end_time_ms)

    def _remove_twins(self) -> None:
        """What was made twice: a server may carry out late what it was thought to have lost."""
        for run in self._runs_with(RUN_TAG, self._key):
            if run.info.run_id != self.run_id:
                self._client.delete_run(run.info.run_id)
        self._models.remove_twins()


def _log_batch_body(run_id: str, points: Sequence[tuple[str, float, int, int]]) -> str:
    """A request to log points, as JSON of its protocol buffers has it."""
    metrics = [
        {"key": key, "value": _json_number(value), "timestamp": time_ms, "step": step}
        for key, value, time_ms, step in points
    ]
    return json.dumps({"run_id": run_id, "metrics": metrics})


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _as_mlflow_has_it(key: str, value: float, time_ms: int, step: int) -> tuple[str, float, int, int]:
    """A point of any journal, with a name and numbers that a database can hold.

    Raises:
        MlflowException: if it has a number that none can, for which MLflow's own error would be taken for a failure.
    """
    try:
        number, whole_step = float(value), int(step)
        if -(2**63) <= whole_step < 2**63:
            return clean_key(key), number, time_ms, whole_step
    except (TypeError, ValueError, OverflowError):
        pass
    raise MlflowException(
        f"step {step!r:.40} or value {value!r:.40} is no number of 64 bits", error_code=INVALID_PARAMETER_VALUE
    )


def _storable(text: str) -> str:
    """A text with what a database refuses replaced.

    An argument that is no UTF-8 has half of a surrogate pair in Python, and PostgreSQL takes no NUL.
    """
    return text.encode(errors="replace").decode().replace("\0", "?")


def _clean_keys(values: Mapping[str, str]) -> dict[str, str]:
    """Parameters or tags of any journal by names that MLflow accepts; the trainer has said which are changed."""
    return {clean_key(name): value for name, value in values.items()}
