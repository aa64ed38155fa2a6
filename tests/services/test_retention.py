"""Pruning against a real MLflow: on a server, and on sqlite without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry, get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store import MlflowStore
from harness.tracking.mlflow.store_protocol import WantedRun
from tests.launching import ROOT, harness, run, started
from tests.mlflow_reader import models
from tests.services.mlflow_server import MlflowServer, make_database
from tests.services.test_server import wait_for

pytestmark = pytest.mark.services


@pytest.fixture(params=["server", "sqlite"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # sqlite keeps its artifacts here
    if request.param == "sqlite":
        return make_database(tmp_path / "mlflow.db")
    server: MlflowServer = request.getfixturevalue("server")
    return server.uri


@pytest.fixture
def store(uri: str, tmp_path: Path) -> MlflowStore:
    found = MlflowStore(uri)
    found.open_run(WantedRun(f"key-{tmp_path.name}", "it", f"retention-{tmp_path.name}"))
    return found


def publish(store: MlflowStore, tmp_path: Path, key: str, registered: Registration | None, **more: Any) -> LoggedModel:
    directory = tmp_path / key
    directory.mkdir()
    for name in more.get("files", ("model.safetensors", "manifest.json")):
        (directory / name).write_text(key)
    record = {"name": key, "key": key, "epoch": 1, "step": 1, "files": ["model.safetensors", "manifest.json"]}
    record |= {"metrics": [["loss", 0.5, 1, 1]], **more}
    model_id = store.log_checkpoint(record, directory, registered)
    return mlflow.MlflowClient().get_logged_model(model_id)


def files(model: LoggedModel, uri: str) -> list[str]:
    return [file.path for file in get_artifact_repository(model.artifact_location, tracking_uri=uri).list_artifacts()]


def found(store: MlflowStore, key: str) -> list[Any]:
    return list(store._models.find(key))


def test_model_version_and_files_are_gone_when_retired_even_twice(store: MlflowStore, uri: str, tmp_path: Path) -> None:
    name, reader = f"reg-{tmp_path.name}", MlflowClient(uri)
    first, second = (publish(store, tmp_path, key, Registration(name)) for key in ("first", "second"))
    assert len(files(first, uri)) == 2
    for _ in range(2):
        assert store.retire_checkpoint("first", Registration(name))
    assert (found(store, "first"), files(first, uri)) == ([], [])
    assert [v.source for v in reader.search_model_versions(f"name = '{name}'")] == [f"models:/{second.model_id}"]
    assert len(files(second, uri)) == 2
    assert store.retire_checkpoint("never there", Registration(name))
    assert reader.get_run(store.run_id).data.metrics == {"loss": 0.5}


@pytest.mark.parametrize("use", ["alias", "other name"])
def test_model_stays_whole_when_somebody_uses_a_version_of_it(
    store: MlflowStore, uri: str, tmp_path: Path, use: str
) -> None:
    name, reader = f"reg-{tmp_path.name}", MlflowClient(uri)
    model = publish(store, tmp_path, "first", Registration(name))
    if use == "alias":
        reader.set_registered_model_alias(name, "champion", "1")
    else:
        mlflow.register_model(f"models:/{model.model_id}", f"other-{tmp_path.name}")
    assert not store.retire_checkpoint("first", Registration(name))
    (kept,) = found(store, "first")
    assert (str(kept.status), len(files(model, uri))) == ("READY", 2)
    assert "in use by" in kept.tags["harness.kept"]
    assert len(reader.search_model_versions(f"name = '{name}'")) == 1


def aliases(uri: str, name: str) -> dict[str, str]:
    """Alias -> the checkpoint whose version it is on."""
    reader = MlflowClient(uri)
    on = reader.get_registered_model(name).aliases
    return {alias: reader.get_model_version(name, version).tags["harness.checkpoint"] for alias, version in on.items()}


def test_aliases_are_moved_when_versions_are_added_and_deleted(store: MlflowStore, uri: str, tmp_path: Path) -> None:
    ranked = Registration(f"reg-{tmp_path.name}", aliases=True, monitor="loss", mode="min")
    seen = []
    for key, loss in (("first", 0.5), ("second", 0.2), ("third", 0.4), ("fourth", None), ("fifth", 0.2)):
        publish(store, tmp_path, key, ranked, monitored=loss)
        seen.append(aliases(uri, ranked.name))
    # Without the metric it is no best; of two that are as good the newer is the better.
    assert [each["best"] for each in seen] == ["first", "second", "second", "second", "fifth"]
    assert [each["last"] for each in seen] == ["first", "second", "third", "fourth", "fifth"]
    # Ours keep nothing from being pruned, and move on.
    for _ in range(2):
        assert store.retire_checkpoint("fifth", ranked)
    assert aliases(uri, ranked.name) == {"best": "second", "last": "fourth"}
    MlflowClient(uri).set_registered_model_alias(ranked.name, "champion", "2")
    assert not store.retire_checkpoint("second", ranked)
    # Without our aliases, an alias of that name is the user's own.
    assert not store.retire_checkpoint("fourth", Registration(ranked.name))
    assert aliases(uri, ranked.name) == {"best": "second", "last": "fourth", "champion": "second"}


def test_more_is_better_when_the_mode_is_max(store: MlflowStore, uri: str, tmp_path: Path) -> None:
    ranked = Registration(f"reg-{tmp_path.name}", aliases=True, monitor="accuracy", mode="max")
    for key, accuracy in (("first", 0.5), ("second", 0.25)):
        publish(store, tmp_path, key, ranked, monitored=accuracy)
    assert aliases(uri, ranked.name) == {"best": "first", "last": "second"}


class Cut(BaseException):
    """The publisher is killed at this moment."""


class CutClient:
    """MLflow's client, killed behind its n-th call that changes something.

    Args:
        client: the real one.
        num_calls: after so many.
    """

    READS = ("get_", "search_")

    def __init__(self, client: MlflowClient, num_calls: int) -> None:
        self._client, self.num_left = client, num_calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if not name.startswith(self.READS):
                self.num_left -= 1
                if self.num_left == 0:
                    raise Cut(name)
            return result

        return call


def test_model_exists_once_when_publication_is_interrupted(store: MlflowStore, uri: str, tmp_path: Path) -> None:
    ranked = Registration(f"reg-{tmp_path.name}", aliases=True, monitor="loss")
    publish(store, tmp_path, "first", ranked, monitored=0.5)
    cut_at = []
    for num_calls in range(1, 20):
        key = f"cut-{num_calls:02d}"
        cut_off = MlflowStore(uri, CutClient(MlflowClient(uri), num_calls))
        cut_off.run_id, cut_off.experiment_id = store.run_id, store.experiment_id
        try:
            publish(cut_off, tmp_path, key, ranked, monitored=0.5 - num_calls / 100)
            break
        except Cut as cut:
            cut_at.append(str(cut))
        for path in (tmp_path / key).iterdir():
            path.unlink()
        (tmp_path / key).rmdir()
        model = publish(store, tmp_path, key, ranked, monitored=0.5 - num_calls / 100)
        assert [each.model_id for each in found(store, key)] == [model.model_id]
        assert len(model.metrics or []) == 1
        assert aliases(uri, ranked.name) == {"best": key, "last": key}
    assert {"create_logged_model", "log_batch", "create_model_version", "set_registered_model_alias"} <= {*cut_at}
    reader = MlflowClient(uri)
    sources = [version.source for version in reader.search_model_versions(f"name = '{ranked.name}'")]
    assert len(sources) == len({*sources}) == len(cut_at) + 2
    assert len(reader.get_run(store.run_id).outputs.model_outputs) == len(cut_at) + 2


STATE = ["optimizer.safetensors", "trainer_state.json"]


def publish_with_state(store: MlflowStore, tmp_path: Path, key: str) -> LoggedModel:
    files = ["model.safetensors", *STATE, "manifest.json"]
    return publish(store, tmp_path, key, None, files=files, resume_files=STATE)


def test_only_the_newest_keeps_its_resume_files_when_dropped(store: MlflowStore, uri: str, tmp_path: Path) -> None:
    first, second, third = (publish_with_state(store, tmp_path, key) for key in ("first", "second", "third"))
    plain = publish(store, tmp_path, "plain", None)
    # Interrupted: one of its files is already deleted.
    get_artifact_repository(first.artifact_location, tracking_uri=uri).delete_artifacts(STATE[0])
    for _ in range(2):
        assert store.drop_resume_state("third") == []
    assert files(first, uri) == files(second, uri) == files(plain, uri) == ["manifest.json", "model.safetensors"]
    assert files(third, uri) == ["manifest.json", "model.safetensors", *STATE]
    tags = [mlflow.MlflowClient().get_logged_model(each.model_id).tags for each in (first, third, plain)]
    assert [each.get("harness.resume_state") for each in tags] == ["removed", "here", None]
    # Each of the other files is still there to be loaded from, and the newest is all there is to resume from.
    assert store.retire_checkpoint("first", None)


class WriteOnce(LocalArtifactRepository):
    """An artifact store that refuses deletions."""

    def __init__(self, artifact_uri: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(f"file:{artifact_uri.removeprefix('write-once:')}")

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        raise PermissionError("retention policy")


def test_resume_files_are_kept_when_the_store_refuses_deletion(tmp_path: Path) -> None:
    # MLflow's own way to add a kind of store.
    _artifact_repository_registry.register("write-once", WriteOnce)
    uri = make_database(tmp_path / "mlflow.db")
    MlflowClient(uri).create_experiment("kept", artifact_location=f"write-once:{tmp_path / 'files'}")
    store = MlflowStore(uri)
    store.open_run(WantedRun("key", "it", "kept"))
    first, _ = (publish_with_state(store, tmp_path, key) for key in ("first", "second"))
    for _ in range(2):
        with pytest.raises(PermissionError):
            store.drop_resume_state("second")
    assert store.drop_resume_state("second") == ["first keeps its resume files in MLflow: retention policy"]
    assert store.drop_resume_state("second") == []
    assert files(first, uri) == ["manifest.json", "model.safetensors", *STATE]
    assert (
        mlflow.MlflowClient().get_logged_model(first.model_id).tags["harness.resume_state"] == "kept: retention policy"
    )


def test_incomplete_model_is_deleted_when_pruned_during_upload(store: MlflowStore, uri: str, tmp_path: Path) -> None:
    directory = tmp_path / "first"
    directory.mkdir()
    (directory / "manifest.json").write_text("{}")
    record = {"name": "first", "key": "first", "epoch": 1, "step": 1, "files": ["manifest.json", "model.safetensors"]}
    with pytest.raises(FileNotFoundError):
        store.log_checkpoint({**record, "metrics": []}, directory, None)
    (half,) = found(store, "first")
    assert str(half.status) == "PENDING"
    assert store.retire_checkpoint("first", None)
    assert (found(store, "first"), files(half, uri)) == ([], [])


def test_mlflow_has_what_the_disk_has_when_a_run_keeps_the_best(tmp_path: Path, server: MlflowServer) -> None:
    words = ("train", "--config", ROOT / "configs" / "digits.yaml", "--trainer.max_epochs", "6", "--run_name", "it")
    keeping = ("--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "1", "--checkpoint.when_busy", "wait")
    ranking = ("--checkpoint.monitor", "eval/loss", "--tracking.experiment_name", "kept")
    tracking = ("--tracking.tracking_uri", server.uri, "--tracking.registered_model_name", "kept")
    aliased = ("--tracking.registered_model_aliases", "true")
    done = run(harness(*words, *keeping, *ranking, *tracking, *aliased), tmp_path)
    assert done.code == 0, done.output
    listed = run(harness("checkpoints", tmp_path / "runs/it", "--json"), tmp_path)
    records = json.loads(listed.output)
    names = [record["name"] for record in records]
    assert names == sorted(path.name for path in (tmp_path / "runs/it/checkpoints").iterdir())
    assert names[-1] == "epoch-0006"
    assert len(names) <= 2
    assert sum(record["best"] for record in records) == 1
    reader = MlflowClient(server.uri)
    (mlflow_run,) = reader.search_runs([reader.get_experiment_by_name("kept").experiment_id])
    left = models(reader, mlflow_run)
    assert [(m.name, m.model_id, str(m.status)) for m in left] == [
        (record["name"], record["mlflow_model_id"], "READY") for record in records
    ]
    assert len(reader.search_model_versions("name = 'kept'")) == len(names)
    by_alias = {
        alias: reader.get_model_version_by_alias("kept", alias).source.removeprefix("models:/")
        for alias in ("best", "last")
    }
    assert by_alias == {
        "best": next(record["mlflow_model_id"] for record in records if record["best"]),
        "last": records[-1]["mlflow_model_id"],
    }


def test_pruned_ones_are_never_published_when_the_server_was_away(tmp_path: Path, server: MlflowServer) -> None:
    task = ("--task.class_path", "tests.services.tasks.Waits", "--task.init_args.directory", tmp_path)
    words = ("train", "--config", ROOT / "configs" / "digits.yaml", *task, "--trainer.max_epochs", "4")
    keeping = ("--run_name", "it", "--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "0")
    tracking = ("--tracking.tracking_uri", server.uri, "--tracking.experiment_name", "away")
    with started(harness(*words, *keeping, "--checkpoint.when_busy", "wait", *tracking), tmp_path) as process:
        wait_for(tmp_path / "arrived")
        server.stop()
        (tmp_path / "go").touch()
        wait_for(tmp_path / "output.txt", "epoch   4")
        server.start()
        assert process.wait(90) == 0, (tmp_path / "output.txt").read_text()
    assert "warning" not in (tmp_path / "output.txt").read_text()
    assert [path.name for path in (tmp_path / "runs/it/checkpoints").iterdir()] == ["epoch-0004"]
    reader = MlflowClient(server.uri)
    (mlflow_run,) = reader.search_runs([reader.get_experiment_by_name("away").experiment_id])
    assert [(m.name, str(m.status)) for m in models(reader, mlflow_run)] == [("epoch-0004", "READY")]
