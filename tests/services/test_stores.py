"""The same run in each kind of store: sqlite, servers on PostgreSQL with S3, servers that ask who one is.

No secret that a store asks for is found afterwards: on disk, in MLflow, on the terminal, in the list of processes.
"""

from __future__ import annotations

import base64
import json
import math
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from safetensors.torch import load_file

import harness
from harness.config.schema import TrackingConfig
from harness.errors import TrackingError
from harness.tasks import Digits
from harness.tracking.mlflow.store import MlflowStore
from harness.tracking.mlflow.store_protocol import WantedRun
from harness.tracking.tracker import Tracker
from tests.launching import ROOT, run, started
from tests.launching import harness as harness_command
from tests.mlflow_reader import history, models
from tests.services.mlflow_server import MlflowServer
from tests.services.postgres import Postgres
from tests.services.proxy import Fault, Proxy
from tests.services.s3 import BUCKET, S3
from tests.services.test_server import sent_points, wait_for

pytestmark = pytest.mark.services
DIGITS = ROOT / "configs" / "digits.yaml"
PASSWORD, TOKEN = (f"auth-{secrets.token_hex(12)}" for _ in range(2))


@pytest.fixture(scope="module")
def s3_beside(s3: S3, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server on PostgreSQL that leaves artifacts alone: its clients bring them to S3 themselves."""
    running = MlflowServer(
        tmp_path_factory.mktemp("s3-beside") / "mlflow",
        store=postgres.database("beside"),
        artifacts=("--no-serve-artifacts", "--default-artifact-root", f"s3://{BUCKET}/beside"),
    )
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that asks for a user and a password, or a token."""
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{directory}/auth.db\n"
        "authorization_function = tests.services.bearer:authenticate\n"
        "auth_cache_ttl_seconds = 60\n"
    )
    running = MlflowServer(
        directory / "mlflow",
        options=("--app-name", "basic-auth"),
        extra={
            "MLFLOW_AUTH_CONFIG_PATH": str(directory / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(8),
            "HARNESS_TEST_TOKEN": TOKEN,
        },
    )
    try:
        running.start()
        yield running
    finally:
        running.stop()


def environment_of(kind: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """What a user of a store sets."""
    if kind == "sqlite":
        return {}
    server: MlflowServer = request.getfixturevalue(kind)
    s3: S3 = request.getfixturevalue("s3")
    return {"MLFLOW_TRACKING_URI": server.uri} | (s3.environment if kind == "s3_beside" else {})


@contextmanager
def as_user(environment: Mapping[str, str], default_uri: str = "") -> Iterator[MlflowClient]:
    """MLflow for a user who has set these variables."""
    uri = environment.get("MLFLOW_TRACKING_URI", default_uri)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        mlflow.set_tracking_uri(uri)
        yield MlflowClient(uri)


def run_in(reader: MlflowClient, experiment: str) -> Run:
    (found,) = reader.search_runs([reader.get_experiment_by_name(experiment).experiment_id])
    return found


# ------------------------------------------------------------------------- each store


@pytest.mark.parametrize("kind", ["sqlite", "s3_server", "s3_beside"])
def test_run_and_its_models_are_whole_when_they_go_to(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = environment_of(kind, request)
    words = ("train", "--config", DIGITS, "--trainer.max_epochs", "2", "--run_name", "it")
    saving = ("--checkpoint.every_n_epochs", "1", "--checkpoint.when_busy", "wait")
    tracking = ("--tracking.experiment_name", kind, "--tracking.log_resume_state", "last")
    done = run(harness_command(*words, *saving, *tracking), tmp_path, extra=environment)
    assert done.code == 0, done.output
    assert "warning" not in done.output
    monkeypatch.chdir(tmp_path)
    with as_user(environment, f"sqlite:///{tmp_path}/mlflow.db") as reader:
        before = assert_all_is_there(reader, kind, tmp_path)
        if kind == "s3_beside":
            # Repeated deliveries are idempotent, also on PostgreSQL.
            (tmp_path / "runs/it/outbox/delivered.json").unlink()
            again = run(harness_command("sync", "runs/it"), tmp_path, extra=environment)
            assert again.code == 0, again.output
            assert assert_all_is_there(reader, kind, tmp_path) == before


def assert_all_is_there(reader: MlflowClient, experiment: str, cwd: Path) -> list[str]:
    """Each point once, each model loads and has its checkpoint's bytes; returns the models' ids."""
    run_dir = cwd / "runs/it"
    mlflow_run = run_in(reader, experiment)
    assert mlflow_run.info.status == "FINISHED"
    points = sent_points(run_dir)
    assert "eval/loss" in points
    for key, sent in points.items():
        assert [(point.step, point.value) for point in history(reader, mlflow_run, key)] == sent, key
    found = models(reader, mlflow_run)
    assert [(model.name, str(model.status)) for model in found] == [("epoch-0001", "READY"), ("epoch-0002", "READY")]
    # The store lets single files be deleted.
    assert [model.tags["harness.resume_state"] for model in found] == ["removed", "here"]
    for model in found:
        assert_has_its_checkpoint(model, run_dir / "checkpoints" / model.name)
    images = Digits().input_example()
    weights = Digits().model()
    weights.load_state_dict(load_file(run_dir / "checkpoints/epoch-0002/model.safetensors"))
    with torch.inference_mode():
        expected = weights.eval()(images).numpy()
        assert np.array_equal(harness.load_model(f"models:/{found[1].model_id}")(images).numpy(), expected)
    served = mlflow.pyfunc.load_model(f"models:/{found[1].model_id}", model_config={"device": "cpu"})
    assert np.array_equal(served.predict(images.numpy()), expected)
    return [model.model_id for model in found]


def assert_has_its_checkpoint(model: LoggedModel, checkpoint: Path) -> None:
    repository = get_artifact_repository(model.artifact_location, tracking_uri=mlflow.get_tracking_uri())
    there = {file.path: file.file_size for file in repository.list_artifacts()}
    on_disk = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    resume = {"trainer_state.json", "optimizer.safetensors"}
    if model.tags["harness.resume_state"] == "here":
        assert there.items() >= on_disk.items()
    else:
        assert there.keys() & on_disk.keys() == on_disk.keys() - resume
    for name in there.keys() & on_disk.keys():
        assert Path(repository.download_artifacts(name)).read_bytes() == (checkpoint / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["s3_server", "through its database"])
def test_point_is_there_once_when_it_comes_again_to_postgresql(
    kind: str, s3_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = s3_server.uri if kind == "s3_server" else s3_server.store
    store = MlflowStore(uri)
    store.open_run(WantedRun("key", "it", f"again {kind}"))
    points = [("loss", 0.1, 1, 1), ("loss", math.nan, 2, 2), ("loss", math.inf, 3, 3), ("loss", -0.0, 4, 4)]
    for _ in range(3):
        store.log_metrics(points)
    found = MlflowClient(uri).get_metric_history(store.run_id, "loss")
    assert sorted(point.step for point in found) == [1, 2, 3, 4]


@pytest.mark.parametrize("how", ["by user and password", "by token"])
def test_server_that_asks_who_one_is_takes_points_and_files(
    how: str, guarded: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "by token":
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    tracker = make_tracker(tmp_path, guarded.uri, how, start_timeout_s=30.0)
    tracker.start("it", {})
    tracker.log_metrics({"loss": 0.5}, 1)
    tracker.log_text("note.txt", "hello")
    assert tracker.finish("FINISHED", "done", 60.0, lambda left: True)
    reader = MlflowClient(guarded.uri)
    found = run_in(reader, how)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 0.5})
    assert "note.txt" in [file.path for file in reader.list_artifacts(found.info.run_id)]
    assert_nowhere([PASSWORD, TOKEN], [path for path in tmp_path.rglob("*") if path.is_file()])


def make_tracker(run_dir: Path, uri: str, experiment: str, start_timeout_s: float) -> Tracker:
    (run_dir / "run.json").write_text(json.dumps({"run_name": "it", "run_key": f"key-{experiment}"}))
    return Tracker(
        run_dir, TrackingConfig(tracking_uri=uri, experiment_name=experiment, start_timeout_s=start_timeout_s)
    )


# ------------------------------------------------------------------------- secrets


def forms(secret: str) -> list[bytes]:
    """As it is, in an address, and in a request's header."""
    texts = [secret, quote(secret, safe=""), base64.b64encode(f"admin:{secret}".encode()).decode()]
    return [text.encode() for text in texts]


def assert_nowhere(hidden: Sequence[str], files: Sequence[Path]) -> None:
    assert files
    for path in files:
        content = path.read_bytes()
        for secret in hidden:
            for form in forms(secret):
                assert form not in content, f"{form!r} in {path}: {around(content, form)!r}"


def around(content: bytes, form: bytes) -> bytes:
    at = content.index(form)
    return content[max(0, at - 200) : at + 100]


class CommandLines:
    """Collects the command lines of all processes of this machine, from start to end."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:
                    continue  # it has ended

    def assert_without(self, hidden: Sequence[str], having: Sequence[bytes]) -> None:
        for part in having:
            assert any(part in line for line in self.seen), part
        for line in self.seen:
            assert not any(form in line for secret in hidden for form in forms(secret)), line


def fails_at_first(*wanted: tuple[str, str]) -> Callable[[str, str], Fault | None]:
    """A store that refuses the first request of each kind: a method, and a part of the path."""
    left = list(wanted)

    def fault(method: str, path: str) -> Fault | None:
        for each in left:
            if method == each[0] and each[1] in path:
                left.remove(each)
                return "503"
        return None

    return fault


def write_config(cwd: Path, tracking_uri: str | None, **task: Any) -> Path:
    """A configuration that only its owner reads; not in the directory of runs."""
    sealed = {"class_path": "tests.services.tasks.Sealed", "init_args": {"directory": str(cwd), **task}}
    path = cwd / "own.yaml"
    path.write_text(
        yaml.safe_dump({"task": sealed, "tracking": {} if tracking_uri is None else {"tracking_uri": tracking_uri}})
    )
    return path


def test_secrets_are_redacted_when_a_run_with_a_database_fails(
    s3: S3, s3_server: MlflowServer, postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_password, plain = (f"data-{secrets.token_hex(8)}{end}" for end in ("", "@/:"))
    data_uri = f"postgresql://reader:{data_password}@127.0.0.1:9/data?sslpassword={quote(plain, safe='')}"
    own = write_config(tmp_path, s3_server.store, uri=data_uri, password=plain, fails=True)
    hidden = [postgres.password, s3.secret, data_password, plain]
    with as_user({**s3.environment, "MLFLOW_TRACKING_URI": s3_server.uri}) as reader:
        reader.create_experiment("sealed", artifact_location=f"s3://{BUCKET}/sealed")
    words = ("launch", "--num_processes", "2", "--config", own, "--run_name", "it", "--trainer.max_epochs", "3")
    saving = ("--checkpoint.every_n_epochs", "1", "--checkpoint.when_busy", "wait")
    tracking = ("--tracking.experiment_name", "sealed")
    monkeypatch.setattr(s3.proxy, "fault", fails_at_first(("PUT", "model.safetensors"), ("GET", "")))
    with (
        CommandLines() as lines,
        started(harness_command(*words, *saving, *tracking), tmp_path, extra=s3.environment) as process,
    ):
        wait_for(tmp_path / "arrived")
        (tmp_path / "go").touch()
        assert process.wait(120) != 0
    lines.assert_without(hidden, [b"harness.tracking.publisher.process", b"own.yaml"])
    output = (tmp_path / "output.txt").read_text()
    assert "ConnectionError: cannot connect to postgresql://reader:***@127.0.0.1:9/data" in output
    assert_nowhere(hidden, [path for path in tmp_path.rglob("*") if path.is_file() and path != own])
    with as_user({**s3.environment, "MLFLOW_TRACKING_URI": s3_server.uri}) as reader:
        found = run_in(reader, "sealed")
        assert found.info.status == "FAILED"
        assert "cannot connect to postgresql://reader:***@" in found.data.tags["harness.end_reason"]
        assert models(reader, found)
        assert found.data.params["task.init_args.password"] == "***"
        fetched = tmp_path / "fetched"
        for name in s3.objects("sealed/"):
            (fetched / name).parent.mkdir(parents=True, exist_ok=True)
            s3.client().download_file(BUCKET, name, str(fetched / name))
    (tmp_path / "dump").write_bytes(postgres.dump("through"))
    assert b"harness.end_reason" in (tmp_path / "dump").read_bytes()
    assert_nowhere(hidden, [tmp_path / "dump", *[path for path in fetched.rglob("*") if path.is_file()]])


def test_secrets_are_redacted_when_the_servers_address_has_them(guarded: MlflowServer, tmp_path: Path) -> None:
    proxy = Proxy(guarded.port)
    uri = proxy.uri.replace("//", f"//admin:{PASSWORD}@")
    own = write_config(tmp_path, None, uri="sqlite://", password="none")
    words = ("train", "--config", own, "--run_name", "it", "--trainer.max_epochs", "2")
    saving = ("--checkpoint.every_n_epochs", "1", "--checkpoint.when_busy", "wait")
    tracking = ("--tracking.experiment_name", "address")
    proxy.fault = fails_at_first(("POST", "runs/log-batch"), ("PUT", "model.safetensors"))
    with (
        CommandLines() as lines,
        started(harness_command(*words, *saving, *tracking), tmp_path, extra={"MLFLOW_TRACKING_URI": uri}) as process,
    ):
        wait_for(tmp_path / "arrived")
        (tmp_path / "go").touch()
        assert process.wait(120) == 0, (tmp_path / "output.txt").read_text()
    proxy.close()
    lines.assert_without([PASSWORD], [b"harness.tracking.publisher.process", b"own.yaml"])
    assert "cannot deliver yet" in (tmp_path / "runs/it/outbox/publisher.log").read_text()
    assert (
        f"View run it at: {proxy.uri.replace('//', '//admin:***@')}"
        in (tmp_path / "runs/it/outbox/publisher.log").read_text()
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    in_mlflow = [path for path in guarded.directory.rglob("*") if path.is_file() and path.suffix != ".log"]
    assert guarded.directory / "mlflow.db" in in_mlflow
    assert_nowhere([PASSWORD], [*files, *in_mlflow])
    user = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    with as_user({"MLFLOW_TRACKING_URI": guarded.uri, **user}) as reader:
        found = run_in(reader, "address")
        assert found.info.status == "FINISHED"
        assert [model.name for model in models(reader, found)] == ["epoch-0001", "epoch-0002"]


@pytest.mark.parametrize("kind", ["server", "database"])
def test_error_is_without_the_password_when_the_store_refuses_it(
    kind: str, guarded: MlflowServer, postgres: Postgres, tmp_path: Path
) -> None:
    wrong = f"wrong-{secrets.token_hex(8)}@"
    address = {"server": guarded.uri.partition("//")[2], "database": f"127.0.0.1:{postgres.port}/postgres"}[kind]
    scheme = {"server": "http", "database": "postgresql+psycopg2"}[kind]
    tracker = make_tracker(tmp_path, f"{scheme}://admin:{quote(wrong)}@{address}", "refused", start_timeout_s=1.0)
    with pytest.raises(TrackingError, match=rf"no MLflow run could be made at .*://admin:\*\*\*@{address}: ") as caught:
        tracker.start("it", {})
    assert not any(form in str(caught.value).encode() for form in forms(wrong))
    assert tracker._publisher is not None and tracker._publisher.process is not None
    assert tracker._publisher.process.wait(30) == 1
    assert_nowhere([wrong], [path for path in tmp_path.rglob("*") if path.is_file()])
