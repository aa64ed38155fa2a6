"""Publish a run's checkpoints as MLflow LoggedModels, and delete the models of pruned checkpoints."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from harness.io.redact import redact_message
from harness.tracking.mlflow.client import MAX_METRICS_PER_BATCH, MAX_TAG_CHARS, is_permanent, retry_conflicts
from harness.tracking.mlflow.mlmodel import model_files
from harness.tracking.mlflow.names import clean_key, clean_path
from harness.tracking.mlflow.registry import CHECKPOINT_TAG, Registration, Registry, is_in_use
from harness.tracking.mlflow.store_protocol import send_in_halves
from harness.tracking.mlflow.uploads import UploadMeter, Uploads

# Tags: whether a model has its resume files, and their names.
_RESUME_TAG, _RESUME_FILES_TAG = "harness.resume_state", "harness.resume_files"

# After this many failed deletions a model's files are kept.
_MAX_DELETIONS = 3


class PublishedModels:
    """Publishes and deletes the models of one run.

    Effects: one of the publisher's threads; each method is idempotent and blocks on the network or on sqlite.
    """

    def __init__(
        self,
        client: Any,
        tracking_uri: str,
        run_id: str,
        experiment_id: str,
        meter: UploadMeter,
    ) -> None:
        self._client = client
        self._registry = Registry(client)
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._experiment_id = experiment_id
        self._meter = meter
        self._num_failed_deletions: Counter[str] = Counter()

    def publish(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        model_spec: Mapping[str, Any] | None = None,
    ) -> str:
        """Publish a committed checkpoint as a LoggedModel and return the model's id.

        A READY model has all its files and metrics, so a second delivery uploads nothing.

        Args:
            record: name, key, epoch, step, files, and metrics as [key, value, time_ms, step].
            directory: directory of the files.
            registration: the registered model that gets a version; None creates no version.
            model_spec: how to build the model; None uploads only the checkpoint's files.
        """
        found = self.find(record["key"])
        model = found[0] if found else self._create_model(record)
        if str(model.status) != "READY":
            self._upload(model, record, directory, model_spec)
        retry_conflicts(partial(self._link_to_run, model.model_id, record["step"]))
        if registration is not None:
            self._registry.register(registration, model.model_id, self._run_id, record)
        model_id: str = model.model_id
        return model_id

    def _link_to_run(self, model_id: str, step: int) -> None:
        # MLflow's database refuses a second link with a permanent error.
        outputs = self._client.get_run(self._run_id).outputs
        if not any(output.model_id == model_id for output in (outputs.model_outputs if outputs else ())):
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])

    def _create_model(self, record: Mapping[str, Any]) -> LoggedModel:
        moment = {"epoch": str(record["epoch"]), "step": str(record["step"])}
        made: LoggedModel = self._client.create_logged_model(
            self._experiment_id,
            name=record["name"],
            source_run_id=self._run_id,
            # Include the run's parameters, as MLflow's `log_model` does.
            params={**self._client.get_run(self._run_id).data.params, **moment},
            tags={CHECKPOINT_TAG: record["key"], **moment, **_resume_tags(record)},
            model_type="checkpoint",
        )
        return made

    def _upload(
        self, model: LoggedModel, record: Mapping[str, Any], directory: Path, model_spec: Mapping[str, Any] | None
    ) -> None:
        model_id = model.model_id
        repository = get_artifact_repository(model.artifact_location, tracking_uri=self._tracking_uri)
        files = {name: directory / name for name in record["files"]}
        identity = _identity(directory)
        with tempfile.TemporaryDirectory(prefix="harness-model-") as temporary:
            texts = {} if model_spec is None else model_files(model_spec, record, model_id, self._run_id)
            for name, text in texts.items():
                # Model specs of earlier versions may have unclean paths.
                path = files[clean_path(name)] = Path(temporary, clean_path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text.encode(errors="replace"))
            Uploads(repository, self._meter).put(files)
        if _identity(directory) != identity:
            raise FileNotFoundError(f"{directory}: was replaced while it was uploaded")
        # With their original times, MLflow treats these as the run's points and links them to the model.
        linked = [
            Metric(clean_key(key), value, time_ms, step, model_id=model_id)
            for key, value, time_ms, step in record["metrics"]
        ]
        for start in range(0, len(linked), MAX_METRICS_PER_BATCH):
            # Refused points are omitted; their first refusal, as the run's points, was reported.
            for _ in send_in_halves(linked[start : start + MAX_METRICS_PER_BATCH], self._link, is_permanent):
                continue
        self._client.finalize_logged_model(model_id, "READY")

    def _link(self, metrics: Sequence[Metric]) -> None:
        retry_conflicts(partial(self._client.log_batch, self._run_id, metrics=list(metrics)))

    def drop_resume_state(self, key: str) -> Sequence[str]:
        """Delete the resume files of all models of the run that are older than a checkpoint's model.

        Newer models keep theirs, because this may be a repeated delivery. If the store cannot delete single files, they
        are kept, with the reason in the tag ``harness.resume_state``. Returns a line for each model that keeps them.
        """
        with_files = (
            f"source_run_id = '{self._run_id}' AND tags.`{_RESUME_TAG}` = 'here' AND tags.`{CHECKPOINT_TAG}` != '{key}'"
        )
        newest_ms = max((model.creation_timestamp for model in self.find(key)), default=0)
        lines = []
        for model in self._search(with_files):
            if model.creation_timestamp > newest_ms:
                continue
            reason = self._delete_files(model, json.loads(model.tags[_RESUME_FILES_TAG]))
            state = "removed" if reason is None else f"kept: {reason}"
            self._client.set_logged_model_tags(model.model_id, {_RESUME_TAG: state[:MAX_TAG_CHARS]})
            if reason is not None:
                lines.append(f"{model.name} keeps its resume files in MLflow: {reason}")
        return lines

    def retire(self, key: str, registration: Registration | None) -> bool:
        """Delete a pruned checkpoint's LoggedModel, its files and its versions; False if a version `is_in_use`."""
        for model in self.find(key):
            versions = self._registry.versions_of_model(model.model_id, self._run_id)
            if in_use := [version for version in versions if is_in_use(version, registration)]:
                names = ", ".join(f"{version.name} version {version.version}" for version in in_use)
                self._client.set_logged_model_tags(
                    model.model_id, {"harness.kept": f"pruned on disk; in use by {names}"}
                )
                return False
            # A crash after this line must not leave a model that looks complete.
            self._client.finalize_logged_model(model.model_id, "FAILED")
            if registration is not None:
                # Deleting a version deletes its aliases, so they move first and always refer to a version.
                self._registry.update_aliases(registration, excluded={version.version for version in versions})
            for version in versions:
                self._client.delete_model_version(version.name, version.version)
            if (reason := self._delete_files(model)) is not None:
                self._client.set_logged_model_tags(
                    model.model_id, {"harness.files": f"not deleted: {reason}"[:MAX_TAG_CHARS]}
                )
            self._client.delete_logged_model(model.model_id)
        return True

    def delete_duplicates(self) -> None:
        """Delete duplicate models, which a server creates if it executes a request after its timeout."""
        first: dict[str, str] = {}
        for model in self._search(f"source_run_id = '{self._run_id}'"):
            key = model.tags.get(CHECKPOINT_TAG)
            if key is not None and first.setdefault(key, model.model_id) != model.model_id:
                self._client.delete_logged_model(model.model_id)

    def find(self, key: str) -> Sequence[LoggedModel]:
        """Return a checkpoint's model and any duplicates, the oldest first."""
        return self._search(f"tags.`{CHECKPOINT_TAG}` = '{key}'")

    def _search(self, filter_string: str) -> list[LoggedModel]:
        found: list[LoggedModel] = []
        token = None
        while True:
            page = self._client.search_logged_models(
                [self._experiment_id],
                filter_string=filter_string,
                order_by=[{"field_name": "creation_timestamp", "ascending": True}],
                page_token=token,
            )
            found += page
            if not (token := page.token):
                return found

    def _delete_files(self, model: LoggedModel, names: Sequence[str] | None = None) -> str | None:
        """Delete a model's files, or only those in `names`; return the reason if the store does not allow it.

        When MLflow deletes a model, it keeps the files until `mlflow gc`.
        """
        try:
            files = get_artifact_repository(model.artifact_location, tracking_uri=self._tracking_uri)
            if names is None:
                files.delete_artifacts()
            else:
                # Some stores refuse the deletion of a missing file, and this may be a retry.
                for name in {file.path for file in files.list_artifacts()} & set(names):
                    files.delete_artifacts(name)
        except Exception as error:
            # Stores raise different errors for an empty or read-only directory. None of them may stop the publisher.
            self._num_failed_deletions[model.model_id] += 1
            if self._num_failed_deletions[model.model_id] < _MAX_DELETIONS:
                raise
            return redact_message(str(error)) or type(error).__name__
        return None


def _resume_tags(record: Mapping[str, Any]) -> dict[str, str]:
    names = record.get("resume_files")
    return {_RESUME_TAG: "here", _RESUME_FILES_TAG: json.dumps(names)} if names else {}


def _identity(directory: Path) -> tuple[int, int]:
    """Identify the checkpoint in a directory by the inode and time of its manifest."""
    found = os.stat(directory / "manifest.json")
    return found.st_ino, found.st_mtime_ns
