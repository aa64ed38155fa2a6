"""What the publisher says, in MLflow's terms. Beside it only `artifacts` and `uploads` import mlflow.

Every method can be called again with the same arguments and leaves what one call would have left:
runs and models are looked up by a tag of ours before they are made, and a metric point with equal
key, step, time and value is stored once by MLflow itself (measured: sqlite,
PostgreSQL).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

# How long one request may take is our publisher's affair (it retries without end): with MLflow's own
# defaults a call to a dead server blocks for 246 s. Set before the import, since it reads them then.
# None at all: MLflow sends again what makes a run or a model without looking whether it was made.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault(_TIMEOUT_VARIABLE := "MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_STATE
from mlflow.protos.service_pb2 import LogBatch
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from urllib3.exceptions import ReadTimeoutError

from harness.redact import redact_message
from harness.tracking.mlmodel import model_files
from harness.tracking.registry import CHECKPOINT_TAG, Registration, Registry, is_in_use
from harness.tracking.store import WantedRun
from harness.tracking.uploads import Pace, Uploads

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"
RUN_TAG = "harness.run"
PARENT_TAG = "harness.parent"
# Two jobs that make the same run at the same moment see each other after so long.
_TWIN_PAUSE_S = 1.0
# Of a model: whether what resuming needs is with it, and in which files.
_RESUME_TAG, _RESUME_FILES_TAG = "harness.resume_state", "harness.resume_files"

# MLflow's limits on one request and one value.
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_TAGS_PER_BATCH = 100
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000

# A server that is too slow is given longer: a shorter wait for the same would end in the same way for ever.
LONGEST_TIMEOUT_S = 120

# A database that nobody answers at.
_CONNECT_S = 10

# How often files are tried to be deleted.
_MAX_DELETIONS = 3

# Refusals that another try cannot mend.
_PERMANENT_CODES = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "FEATURE_DISABLED"}
)


def has_run(tracking_uri: str, run_id: str) -> bool:
    """Whether the store at an address has the run. One that cannot be asked now has not; nothing is made there."""
    if tracking_uri.startswith(_SQLITE) and not Path(tracking_uri.removeprefix(_SQLITE)).exists():
        return False
    try:
        _require_database(tracking_uri)
        mlflow.MlflowClient(tracking_uri).get_run(run_id)
    except Exception:
        return False
    return True


def _require_database(tracking_uri: str) -> None:
    """Reach the database, where it is one that is written into directly.

    MLflow itself tries for a minute and a half, whatever is wrong, before it says so.

    Raises:
        Exception: the driver's own.
    """
    if "://" not in tracking_uri or tracking_uri.partition(":")[0].partition("+")[0] not in DATABASE_ENGINES:
        return
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.pool import NullPool

    url = make_url(tracking_uri)
    limits = {"connect_timeout": _CONNECT_S} if url.get_backend_name() in ("postgresql", "mysql") else {}
    create_engine(url, poolclass=NullPool, connect_args=limits).connect().close()


def is_permanent(error: Exception) -> bool:
    """Whether the store has said no for good, as against being away or slow."""
    return isinstance(error, MlflowException) and error.error_code in _PERMANENT_CODES


def resolve_tracking_uri(configured: str | None) -> str:
    """The configured URI, else ``MLFLOW_TRACKING_URI``, else the embedded default."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI


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
        self._num_failed_deletions: Counter[str] = Counter()
        self._key = ""
        self._parent_id: str | None = None
        self.run_id = ""
        self.experiment_id = ""

    @cached_property
    def _client(self) -> mlflow.MlflowClient:
        # Not before it is needed: where it cannot be made now, it is tried again.
        if self._given_client is None:
            _require_database(self._tracking_uri)
        return self._given_client or mlflow.MlflowClient(self._tracking_uri)

    @cached_property
    def _server(self) -> Any:
        return _server_of(self._client)

    @cached_property
    def _registry(self) -> Registry:
        return Registry(self._client)

    def open_run(self, wanted: WantedRun) -> None:
        """Find the run by its id, or find or make the one that carries its key; it is RUNNING then.

        By its id it is found in an experiment that has another name by now.
        """
        self._key = wanted.key
        if wanted.run_id is not None:
            self._open_known(wanted.run_id)
            return
        self.experiment_id = self._experiment(wanted.experiment_name)
        found = self._runs_with(RUN_TAG, wanted.key)
        parent = None if wanted.parent is None else self._parent(wanted.parent, wanted.created_ms)
        if found:
            self._parent_id = found[0].data.tags.get(MLFLOW_PARENT_RUN_ID)
            self.run_id = found[0].info.run_id
            self.reopen()
            return
        tags = {RUN_TAG: wanted.key} | ({} if parent is None else {MLFLOW_PARENT_RUN_ID: parent})
        run = self._client.create_run(self.experiment_id, start_time=wanted.created_ms, tags=tags, run_name=wanted.name)
        self._parent_id = parent
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

    def _runs_with(self, tag: str, value: str) -> list[Run]:
        """Runs of the experiment that carry a tag, the oldest first."""
        quoted = value.replace("'", "\\'")
        return list(
            self._client.search_runs(
                [self.experiment_id], f"tags.`{tag}` = '{quoted}'", order_by=["attributes.start_time ASC"]
            )
        )

    def _parent(self, wanted: str, created_ms: int | None) -> str:
        """The id of the run to nest under, by its id or its name; made where there is none, and RUNNING."""
        if re.fullmatch(r"[0-9a-f]{32}", wanted):
            self._client.get_run(wanted)
            return wanted
        found = self._runs_with(PARENT_TAG, wanted)
        if not found:
            self._client.create_run(
                self.experiment_id, start_time=created_ms, tags={PARENT_TAG: wanted}, run_name=wanted
            )
            # Looked for again: of two that were made at the same moment all take the same one.
            time.sleep(_TWIN_PAUSE_S)
            found = self._runs_with(PARENT_TAG, wanted)
        parent: str = min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id
        for twin in found:
            if twin.info.run_id != parent and not self._runs_with(MLFLOW_PARENT_RUN_ID, twin.info.run_id):
                self._client.delete_run(twin.info.run_id)
        self._client.update_run(parent, status="RUNNING")
        return parent

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
        self._parent_id = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        self.reopen()

    def reopen(self) -> None:
        """Let the run be RUNNING again.

        Its earlier end time stays until it ends again: MLflow has no way to clear it, and keeps it likewise where
        a run is started again with `mlflow.start_run`.
        """
        self._client.update_run(self.run_id, status="RUNNING")
        if self._parent_id is not None:
            self._client.update_run(self._parent_id, status="RUNNING")

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log (key, value, time in ms, step) points, any number."""
        for start in range(0, len(points), MAX_METRICS_PER_BATCH):
            batch = points[start : start + MAX_METRICS_PER_BATCH]
            if self._server is None:
                self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            else:
                # The client would make three objects of each point first: a quarter of the time until it is there.
                self._server._call_endpoint(LogBatch, _log_batch_body(self.run_id, batch))

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters; a value that is too long is cut."""
        params = [Param(_key(key), value[:MAX_PARAM_CHARS]) for key, value in values.items()]
        for start in range(0, len(params), MAX_PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS_PER_BATCH])

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a value that is too long is cut."""
        tags = [RunTag(_key(key), value[:MAX_TAG_CHARS]) for key, value in values.items()]
        for start in range(0, len(tags), MAX_TAGS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=tags[start : start + MAX_TAGS_PER_BATCH])

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        """Record a data set as an input of the run."""
        dataset = Dataset(
            name=record["name"],
            digest=record["digest"],
            source_type=record["source_type"],
            source=record["source"],
            profile=record["profile"],
        )
        tags = [InputTag("mlflow.data.context", record["context"])]
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def log_text(self, name: str, content: str) -> None:
        """Put a text file among the run's artifacts."""
        self._client.log_text(self.run_id, content, name)

    def log_checkpoint(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        recipe: Mapping[str, Any] | None = None,
    ) -> str:
        """Publish a committed checkpoint as a LoggedModel; returns the model's id.

        One that is READY has all its files and metrics: a second delivery uploads nothing.

        Args:
            record: name, key, epoch, step, files, and metrics as [key, value, time_ms, step].
            directory: where the files are.
            registration: where it becomes a version too, if anywhere.
            recipe: how its model is built again; None: that is not known, and it is files alone.
        """
        found = self._models_of(record["key"])
        model = found[0] if found else self._create_model(record)
        if str(model.status) != "READY":
            self._upload(model, record, directory, recipe)
        self._link_to_run(model.model_id, record["step"])
        if registration is not None:
            self._registry.register(registration, model.model_id, self.run_id, record)
        model_id: str = model.model_id
        return model_id

    def _link_to_run(self, model_id: str, step: int) -> None:
        # A second time it would be refused, for good (a constraint of MLflow's database).
        outputs = self._client.get_run(self.run_id).outputs
        if not any(output.model_id == model_id for output in (outputs.model_outputs if outputs else ())):
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])

    def _create_model(self, record: Mapping[str, Any]) -> LoggedModel:
        moment = {"epoch": str(record["epoch"]), "step": str(record["step"])}
        return self._client.create_logged_model(
            self.experiment_id,
            name=record["name"],
            source_run_id=self.run_id,
            # The run's own too, as MLflow's `log_model` has it.
            params={**self._client.get_run(self.run_id).data.params, **moment},
            tags={CHECKPOINT_TAG: record["key"], **moment, **_resume_tags(record)},
            model_type="checkpoint",
        )

    def _upload(
        self, model: LoggedModel, record: Mapping[str, Any], directory: Path, recipe: Mapping[str, Any] | None
    ) -> None:
        model_id = model.model_id
        repository = get_artifact_repository(model.artifact_location, tracking_uri=self._tracking_uri)
        files = {name: directory / name for name in record["files"]}
        begun_as = _identity(directory)
        with tempfile.TemporaryDirectory(prefix="harness-model-") as made:
            texts = {} if recipe is None else model_files(recipe, record, model_id, self.run_id)
            for name, text in texts.items():
                files[name] = Path(made, name)
                files[name].write_text(text)
            Uploads(repository, self._pace, self._sent).put(files)
        if _identity(directory) != begun_as:
            raise FileNotFoundError(f"{directory}: was replaced while it was read")
        # With the time of the original points: they are the same points, now linked to the model too.
        linked = [
            Metric(key, value, time_ms, step, model_id=model_id) for key, value, time_ms, step in record["metrics"]
        ]
        for start in range(0, len(linked), MAX_METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=linked[start : start + MAX_METRICS_PER_BATCH])
        self._client.finalize_logged_model(model_id, "READY")

    def drop_resume_state(self, key: str) -> Sequence[str]:
        """Delete the files that only resuming needs from the run's models that are older than that of a checkpoint.

        One that is newer keeps them: this may be the second delivery of the older one.

        A store that lets nobody delete single files keeps them: the tag ``harness.resume_state`` says so.

        Returns:
            A line for each model that keeps them.
        """
        having = (
            f"source_run_id = '{self.run_id}' AND tags.`{_RESUME_TAG}` = 'here' AND tags.`{CHECKPOINT_TAG}` != '{key}'"
        )
        newest_ms = max((model.creation_timestamp for model in self._models_of(key)), default=0)
        lines = []
        for model in self._models(having):
            if model.creation_timestamp > newest_ms:
                continue
            reason = self._delete_files(model, json.loads(model.tags[_RESUME_FILES_TAG]))
            state = "removed" if reason is None else f"kept: {reason}"
            self._client.set_logged_model_tags(model.model_id, {_RESUME_TAG: state[:MAX_TAG_CHARS]})
            if reason is not None:
                lines.append(f"{model.name} keeps its state for resuming in MLflow: {reason}")
        return lines

    def retire_checkpoint(self, key: str, registration: Registration | None) -> bool:
        """Take back a pruned checkpoint's LoggedModel, its files, and the versions that we have made of it.

        A model that somebody relies on stays as it is: one with a version in another registered model, or
        with a version that has a stage, or an alias that is not one of ours. Of one that is gone already, nothing is
        left to do.

        Args:
            key: of the checkpoint.
            registration: where its version was registered, if anywhere.

        Returns:
            Whether it is gone; False: it is kept.
        """
        for model in self._models_of(key):
            versions = self._registry.of_model(model.model_id, self.run_id)
            if in_use := [version for version in versions if is_in_use(version, registration)]:
                names = ", ".join(f"{version.name} version {version.version}" for version in in_use)
                self._client.set_logged_model_tags(
                    model.model_id, {"harness.kept": f"pruned on disk; in use by {names}"}
                )
                return False
            # From here on nobody shall take it for whole, should this be cut off.
            self._client.finalize_logged_model(model.model_id, "FAILED")
            if registration is not None:
                # With a version goes its alias: they move first, so that there is always one to load by.
                self._registry.place_aliases(registration, leaving={version.version for version in versions})
            for version in versions:
                self._client.delete_model_version(version.name, version.version)
            if (reason := self._delete_files(model)) is not None:
                self._client.set_logged_model_tags(
                    model.model_id, {"harness.files": f"not deleted: {reason}"[:MAX_TAG_CHARS]}
                )
            self._client.delete_logged_model(model.model_id)
        return True

    def _models_of(self, key: str) -> Sequence[LoggedModel]:
        return self._models(f"tags.`{CHECKPOINT_TAG}` = '{key}'")

    def _models(self, filter_string: str) -> list[LoggedModel]:
        """The oldest first."""
        found: list[LoggedModel] = []
        token = None
        while True:
            page = self._client.search_logged_models(
                [self.experiment_id],
                filter_string=filter_string,
                order_by=[{"field_name": "creation_timestamp", "ascending": True}],
                page_token=token,
            )
            found += page
            if not (token := page.token):
                return found

    def _delete_files(self, model: LoggedModel, names: Sequence[str] | None = None) -> str | None:
        """Delete some files of a model, or all; why the store does not let it, or None.

        MLflow's own deletion of a model leaves them for `mlflow gc`, which does so too where this cannot.
        """
        try:
            files = get_artifact_repository(model.artifact_location, tracking_uri=self._tracking_uri)
            if names is None:
                files.delete_artifacts()
            else:
                # Some stores refuse to delete what is not there, and this may be the second time.
                for name in {file.path for file in files.list_artifacts()} & set(names):
                    files.delete_artifacts(name)
        except Exception as error:
            # Stores differ in what they say to one that is empty, or may not be deleted from; none is worth a stop.
            self._num_failed_deletions[model.model_id] += 1
            if self._num_failed_deletions[model.model_id] < _MAX_DELETIONS:
                raise
            return redact_message(str(error)) or type(error).__name__
        return None

    def failed(self, error: Exception) -> None:
        """Give a server that did not answer in time longer from now on, up to `LONGEST_TIMEOUT_S`.

        In the process's environment, where MLflow looks at each request.
        """
        if _is_timeout(error):
            now_s = int(os.environ[_TIMEOUT_VARIABLE])
            os.environ[_TIMEOUT_VARIABLE] = str(max(now_s, min(2 * now_s, LONGEST_TIMEOUT_S)))

    def end(self, status: str, end_time_ms: int) -> None:
        """Set the run's final status: FINISHED, FAILED or KILLED; and its parent's with the last of its children."""
        self._remove_twins()
        self._client.set_terminated(self.run_id, status, end_time_ms)
        if self._parent_id is None:
            return
        states = {child.info.status for child in self._runs_with(MLFLOW_PARENT_RUN_ID, self._parent_id)}
        if not states & {"RUNNING", "SCHEDULED"}:
            worst = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
            self._client.set_terminated(self._parent_id, worst, end_time_ms)

    def _remove_twins(self) -> None:
        """Runs and models that were made twice: a server may carry out late what it was thought to have lost."""
        for run in self._runs_with(RUN_TAG, self._key):
            if run.info.run_id != self.run_id:
                self._client.delete_run(run.info.run_id)
        first: dict[str, str] = {}
        for model in self._models(f"source_run_id = '{self.run_id}'"):
            key = model.tags.get(CHECKPOINT_TAG)
            if key is not None and first.setdefault(key, model.model_id) != model.model_id:
                self._client.delete_logged_model(model.model_id)


def _is_timeout(error: BaseException | None) -> bool:
    while error is not None:
        # Of the server's answer, as against that of the connection: one that is away is not slow.
        if isinstance(error, ReadTimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _resume_tags(record: Mapping[str, Any]) -> dict[str, str]:
    names = record.get("resume_files")
    return {_RESUME_TAG: "here", _RESUME_FILES_TAG: json.dumps(names)} if names else {}


def _server_of(client: Any) -> Any:
    """What a client of MLflow's reaches a plain server by; None: it reaches something else, or is none of MLflow's."""
    store = getattr(getattr(client, "_tracking_client", None), "store", None)
    return store if type(store) is RestStore else None


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


def _key(name: str) -> str:
    """A parameter's or tag's name with what MLflow would refuse replaced: one bad name refuses the batch."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _identity(directory: Path) -> tuple[int, int]:
    """Which checkpoint a directory holds: another one in its place has another manifest."""
    found = os.stat(directory / "manifest.json")
    return found.st_ino, found.st_mtime_ns
