"""A run's checkpoints as LoggedModels: made, uploaded, linked, and taken back when they are pruned."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from harness.io.redact import redact_message
from harness.tracking.mlflow.client import despite_conflicts, is_permanent
from harness.tracking.mlflow.halving import send_in_halves
from harness.tracking.mlflow.mlmodel import model_files
from harness.tracking.mlflow.names import clean_key, clean_path
from harness.tracking.mlflow.registry import CHECKPOINT_TAG, Registration, Registry, is_in_use
from harness.tracking.mlflow.uploads import Pace, Uploads

# Whether what resuming needs is with a model, and in which files.
_RESUME_TAG, _RESUME_FILES_TAG = "harness.resume_state", "harness.resume_files"

# MLflow's limits on one request and one value.
_MAX_METRICS_PER_BATCH = 1000
_MAX_TAG_CHARS = 8000

# How often files are tried to be deleted.
_MAX_DELETIONS = 3


class PublishedModels:
    """The models of one run.

    Effects: not collective; the publisher's threads; each method blocks on the network or on sqlite, and can be
    called again with the same arguments; leaves nothing on disk but what a ``sqlite:`` store keeps.

    Args:
        client: MLflow's client.
        tracking_uri: where it leads.
        run_id: of the run.
        experiment_id: of its experiment.
        pace: the limit of the rate at which files go.
        sent: told of the bytes of files that went; from any thread.
    """

    def __init__(
        self,
        client: Any,
        tracking_uri: str,
        run_id: str,
        experiment_id: str,
        pace: Pace,
        sent: Callable[[int], None],
    ) -> None:
        self._client = client
        self._registry = Registry(client)
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._experiment_id = experiment_id
        self._pace = pace
        self._sent = sent
        self._num_failed_deletions: Counter[str] = Counter()

    def publish(
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
        found = self.of_checkpoint(record["key"])
        model = found[0] if found else self._create_model(record)
        if str(model.status) != "READY":
            self._upload(model, record, directory, recipe)
        despite_conflicts(partial(self._link_to_run, model.model_id, record["step"]))
        if registration is not None:
            self._registry.register(registration, model.model_id, self._run_id, record)
        model_id: str = model.model_id
        return model_id

    def _link_to_run(self, model_id: str, step: int) -> None:
        # A second time it would be refused, for good (a constraint of MLflow's database).
        outputs = self._client.get_run(self._run_id).outputs
        if not any(output.model_id == model_id for output in (outputs.model_outputs if outputs else ())):
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])

    def _create_model(self, record: Mapping[str, Any]) -> LoggedModel:
        moment = {"epoch": str(record["epoch"]), "step": str(record["step"])}
        made: LoggedModel = self._client.create_logged_model(
            self._experiment_id,
            name=record["name"],
            source_run_id=self._run_id,
            # The run's own too, as MLflow's `log_model` has it.
            params={**self._client.get_run(self._run_id).data.params, **moment},
            tags={CHECKPOINT_TAG: record["key"], **moment, **_resume_tags(record)},
            model_type="checkpoint",
        )
        return made

    def _upload(
        self, model: LoggedModel, record: Mapping[str, Any], directory: Path, recipe: Mapping[str, Any] | None
    ) -> None:
        model_id = model.model_id
        repository = get_artifact_repository(model.artifact_location, tracking_uri=self._tracking_uri)
        files = {name: directory / name for name in record["files"]}
        begun_as = _identity(directory)
        with tempfile.TemporaryDirectory(prefix="harness-model-") as made:
            texts = {} if recipe is None else model_files(recipe, record, model_id, self._run_id)
            for name, text in texts.items():
                # Within the directory, whatever a recipe of an earlier version says.
                path = files[clean_path(name)] = Path(made, clean_path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text.encode(errors="replace"))
            Uploads(repository, self._pace, self._sent).put(files)
        if _identity(directory) != begun_as:
            raise FileNotFoundError(f"{directory}: was replaced while it was read")
        # With the time of the original points: they are the same points, now linked to the model too.
        linked = [
            Metric(clean_key(key), value, time_ms, step, model_id=model_id)
            for key, value, time_ms, step in record["metrics"]
        ]
        for start in range(0, len(linked), _MAX_METRICS_PER_BATCH):
            send_in_halves(linked[start : start + _MAX_METRICS_PER_BATCH], self._link, is_permanent, _is_known)
        self._client.finalize_logged_model(model_id, "READY")

    def _link(self, metrics: Sequence[Metric]) -> None:
        despite_conflicts(partial(self._client.log_batch, self._run_id, metrics=list(metrics)))

    def drop_resume_state(self, key: str) -> Sequence[str]:
        """Delete the files that only resuming needs from the run's models that are older than that of a checkpoint.

        One that is newer keeps them: this may be the second delivery of the older one.

        A store that lets nobody delete single files keeps them: the tag ``harness.resume_state`` says so.

        Returns:
            A line for each model that keeps them.
        """
        having = (
            f"source_run_id = '{self._run_id}' AND tags.`{_RESUME_TAG}` = 'here' AND tags.`{CHECKPOINT_TAG}` != '{key}'"
        )
        newest_ms = max((model.creation_timestamp for model in self.of_checkpoint(key)), default=0)
        lines = []
        for model in self._search(having):
            if model.creation_timestamp > newest_ms:
                continue
            reason = self._delete_files(model, json.loads(model.tags[_RESUME_FILES_TAG]))
            state = "removed" if reason is None else f"kept: {reason}"
            self._client.set_logged_model_tags(model.model_id, {_RESUME_TAG: state[:_MAX_TAG_CHARS]})
            if reason is not None:
                lines.append(f"{model.name} keeps its state for resuming in MLflow: {reason}")
        return lines

    def retire(self, key: str, registration: Registration | None) -> bool:
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
        for model in self.of_checkpoint(key):
            versions = self._registry.of_model(model.model_id, self._run_id)
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
                    model.model_id, {"harness.files": f"not deleted: {reason}"[:_MAX_TAG_CHARS]}
                )
            self._client.delete_logged_model(model.model_id)
        return True

    def remove_twins(self) -> None:
        """Delete what was made twice: a server may carry out late what it was thought to have lost."""
        first: dict[str, str] = {}
        for model in self._search(f"source_run_id = '{self._run_id}'"):
            key = model.tags.get(CHECKPOINT_TAG)
            if key is not None and first.setdefault(key, model.model_id) != model.model_id:
                self._client.delete_logged_model(model.model_id)

    def of_checkpoint(self, key: str) -> Sequence[LoggedModel]:
        """Those of a checkpoint: one, unless it was made twice; the oldest first."""
        return self._search(f"tags.`{CHECKPOINT_TAG}` = '{key}'")

    def _search(self, filter_string: str) -> list[LoggedModel]:
        """The oldest first."""
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


def _is_known(metric: Metric, error: Exception) -> None:
    """Leave a point out that is refused: it was refused as the run's before, and reported."""


def _resume_tags(record: Mapping[str, Any]) -> dict[str, str]:
    names = record.get("resume_files")
    return {_RESUME_TAG: "here", _RESUME_FILES_TAG: json.dumps(names)} if names else {}


def _identity(directory: Path) -> tuple[int, int]:
    """Which checkpoint a directory holds: another one in its place has another manifest."""
    found = os.stat(directory / "manifest.json")
    return found.st_ino, found.st_mtime_ns
