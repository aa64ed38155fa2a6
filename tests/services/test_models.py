"""Published checkpoints as MLflow's own tools have them: found, loaded, served, registered."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from safetensors.torch import load_file

import harness
from harness.tasks import Digits
from tests.launching import BIN, ROOT, descendants, environment, run
from tests.launching import harness as harness_command
from tests.mlflow_reader import models
from tests.services.mlflow_server import MlflowServer

pytestmark = pytest.mark.services
_START_LIMIT_S = 90


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, server: MlflowServer) -> Path:
    """A run of 3 epochs with a model of each in MLflow, the best and the last known by their aliases."""
    cwd = tmp_path_factory.mktemp("trained")
    words = ("train", "--config", ROOT / "configs" / "digits.yaml", "--trainer.max_epochs", "3", "--run_name", "it")
    saving = ("--checkpoint.every_n_epochs", "1", "--checkpoint.when_busy", "wait")
    tracking = ("--tracking.tracking_uri", server.uri, "--tracking.experiment_name", "models")
    done = run(harness_command(*words, *saving, *tracking), cwd)
    assert done.code == 0, done.output
    assert "warning" not in done.output
    return cwd


@pytest.fixture
def published(trained: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> list[LoggedModel]:
    """Its models, oldest first; MLflow looks at the server."""
    mlflow.set_tracking_uri(server.uri)
    monkeypatch.chdir(trained)
    reader = MlflowClient(server.uri)
    (mlflow_run,) = reader.search_runs([reader.get_experiment_by_name("models").experiment_id])
    return models(reader, mlflow_run)


def expected(trained: Path, name: str, images: torch.Tensor) -> np.ndarray[Any, Any]:
    """What the weights on disk give, by plain torch."""
    model = Digits().model()
    model.load_state_dict(load_file(trained / "runs/it/checkpoints" / name / "model.safetensors"))
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model.eval()(images).numpy()
    return found


def example_of_the_documentation() -> str:
    """The code of `docs/guides/models.md` that finds the best checkpoint, and loads it."""
    text = (ROOT / "docs" / "guides" / "models.md").read_text()
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "search_logged_models" in block
    )
    return code.replace('device="cuda"', 'device="cpu"')


def test_best_checkpoint_is_loaded_when_the_documentation_is_run(trained: Path, published: list[LoggedModel]) -> None:
    manifests = {
        path.parent.name: json.loads(path.read_text()) for path in trained.glob("runs/it/checkpoints/*/manifest.json")
    }
    best = min(manifests, key=lambda name: manifests[name]["metrics"]["eval/loss"])
    images = Digits().input_example()
    names: dict[str, Any] = {
        "experiment_id": published[0].experiment_id,
        "run_id": published[0].source_run_id,
        "images": images.numpy(),
    }
    exec(example_of_the_documentation(), names)
    model: LoggedModel = names["best"]
    assert model.name == best
    logits = expected(trained, best, images)
    with torch.inference_mode():
        assert np.array_equal(names["model"](images).numpy(), logits)
    assert np.array_equal(names["predictions"], logits)
    assert {metric.key: metric.value for metric in model.metrics or []} == manifests[best]["metrics"]
    assert model.params["step"] == str(manifests[best]["step"])
    # As MLflow's own `log_model` has it: the run's parameters are the model's too.
    assert model.params["optimizer.init_args.lr"] == "0.002"
    assert model.source_run_id == published[-1].source_run_id


def test_module_is_what_was_trained_when_loaded_from_mlflow(trained: Path, published: list[LoggedModel]) -> None:
    images = Digits().input_example()
    for where in (f"models:/{published[-1].model_id}", trained / "runs/it/checkpoints/epoch-0003"):
        drawn = torch.get_rng_state()
        model = harness.load_model(where)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert not any(module.training for module in model.modules())
        with torch.inference_mode():
            assert np.array_equal(model(images).numpy(), expected(trained, "epoch-0003", images))


def test_mlflow_predicts_when_it_loads_the_model_itself(trained: Path, published: list[LoggedModel]) -> None:
    served = mlflow.pyfunc.load_model(f"models:/{published[1].model_id}", model_config={"device": "cpu"})
    images = Digits().input_example()
    logits = expected(trained, "epoch-0002", images)
    assert np.array_equal(served.predict(images.numpy()), logits)
    assert np.array_equal(served.predict(served.input_example), logits)
    assert np.array_equal(
        served.predict(pd.DataFrame({"image": [image.flatten().tolist() for image in images]})), logits
    )
    assert [str(served.metadata.signature.inputs), str(served.metadata.signature.outputs)] == [
        "[Tensor('float32', (-1, 1, 8, 8))]",
        "[Tensor('float32', (-1, 10))]",
    ]
    assert not served.get_raw_model().training
    assert served.model_id == published[1].model_id
    with pytest.raises(mlflow.MlflowException, match="does not match expected shape"):
        served.predict(images.numpy()[:, :, :7])


def test_nothing_is_pickled_when_a_model_is_published(published: list[LoggedModel], tmp_path: Path) -> None:
    fetched = Path(mlflow.artifacts.download_artifacts(f"models:/{published[0].model_id}", dst_path=str(tmp_path)))
    assert sorted(path.name for path in fetched.iterdir()) == [
        "MLmodel",
        "conda.yaml",
        "input_example.json",
        "manifest.json",
        "model.safetensors",
        "python_env.yaml",
        "registered_model_meta",  # of MLflow's download
        "requirements.txt",
        "serving_input_example.json",
    ]
    requirements = (fetched / "requirements.txt").read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}\n" in requirements
    # A package index may have another package of that name, so it is only listed with its source.
    assert not any(line.startswith("harness==") for line in requirements.splitlines())


@contextmanager
def serving(model_uri: str, cwd: Path, server: MlflowServer) -> Iterator[str]:
    """`mlflow models serve`, in the environment that this runs in; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [BIN / "mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local", "-p", str(port)]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # it starts its scoring server by the name `python`
    with (cwd / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=cwd,
            env=environment({"MLFLOW_TRACKING_URI": server.uri, "PATH": path}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not _answers(f"http://127.0.0.1:{port}/ping"):
            assert process.poll() is None and time.monotonic() < deadline_s, (cwd / "serve.log").read_text()[-3000:]
            time.sleep(0.1)  # it says that it is up by answering, and in no other way
        yield f"http://127.0.0.1:{port}"
    finally:
        for member in descendants(process.pid):
            os.kill(member, signal.SIGKILL)
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def ask(address: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["predictions"]


def test_predictions_are_equal_when_mlflow_serves_the_model(
    trained: Path, published: list[LoggedModel], server: MlflowServer, tmp_path: Path
) -> None:
    images = Digits().input_example()
    logits = expected(trained, "epoch-0003", images)
    with serving(f"models:/{published[-1].model_id}", tmp_path, server) as address:
        for key in ("inputs", "instances"):
            assert np.allclose(ask(address, {key: images.tolist()}), logits, atol=1e-6)
        flat = {"columns": ["image"], "data": [[image.flatten().tolist()] for image in images]}
        assert np.allclose(ask(address, {"dataframe_split": flat}), logits, atol=1e-6)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(address, {"inputs": [[1.0]]})


def test_training_resumes_exactly_when_only_mlflow_remains(trained: Path, server: MlflowServer, tmp_path: Path) -> None:
    words = ("train", "--config", ROOT / "configs" / "digits.yaml", "--checkpoint.every_n_epochs", "1")
    tracking = ("--tracking.tracking_uri", server.uri, "--tracking.experiment_name", "alone")
    registered = ("--tracking.registered_model_name", "alone", "--tracking.registered_model_aliases", "true")
    keeping = ("--tracking.log_resume_state", "last", "--checkpoint.when_busy", "wait")
    first = (*words, *tracking, *registered, *keeping, "--trainer.max_epochs", "2", "--run_name", "first")
    done = run(harness_command(*first), tmp_path)
    assert done.code == 0, done.output
    reader = MlflowClient(server.uri)
    (mlflow_run,) = reader.search_runs([reader.get_experiment_by_name("alone").experiment_id])
    states = [model.tags["harness.resume_state"] for model in models(reader, mlflow_run)]
    assert states == ["removed", "here"]
    shutil.rmtree(tmp_path / "runs")

    again = (*words, *tracking, "--trainer.max_epochs", "3", "--run_name", "second")
    done = run(harness_command(*again, "--resume_from_checkpoint", "models:/alone@last"), tmp_path)
    assert done.code == 0, done.output
    assert "resumed from" in done.output
    ours, theirs = (
        load_file(path / "checkpoints/epoch-0003/model.safetensors")
        for path in (tmp_path / "runs/second", trained / "runs/it")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # The earlier model only has its weights, and the message says so.
    earlier = (*words, *tracking, "--run_name", "third", "--resume_from_checkpoint", "models:/alone/1")
    done = run(harness_command(*earlier), tmp_path)
    assert done.code != 0
    assert "has the weights alone" in done.output


OWN_LOOP = """
import sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from harness import ClassSpec, PeriodicLogger, TrackingConfig
from net import Net

accelerator = Accelerator(cpu=True)
with PeriodicLogger(accelerator, 1, experiment_name=sys.argv[1], run_name=sys.argv[1]) as logger:
    model = Net(width=5)
    if sys.argv[1] == "described":
        logger.describe(ClassSpec("net.Net", {"width": 5}), model, {"x": torch.ones(2, 3), "scale": torch.ones(2, 1)})
    data = DataLoader(TensorDataset(torch.rand(8, 3)), 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    logger.watch(model, optimizer)
    for _ in logger.epochs(1):
        for (x,) in logger.batches(data):
            accelerator.backward(model(x=x, scale=torch.ones(4, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
"""
NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, x, scale):
        return self.layer(x) * scale
"""
ASK = """
import sys
import mlflow
import numpy as np
sys.path = [path for path in sys.path if path]  # as for MLflow's commands: not from where they are started
served = mlflow.pyfunc.load_model(sys.argv[1])
example = served.input_example
assert sorted(example) == ["scale", "x"], example
full = served.predict(example)
half = served.predict({"x": example["x"], "scale": example["scale"] / 2})
assert full.shape == (2, 5) and np.allclose(full, 2 * half)
print(type(served.get_raw_model()).__name__, "answers")
"""


@pytest.mark.parametrize("name", ["described", "undescribed"])
def test_own_loop_gives_a_model_to_serve_when_it_names_the_class(
    tmp_path: Path, server: MlflowServer, name: str
) -> None:
    for file, text in {"loop.py": OWN_LOOP, "net.py": NET, "ask.py": ASK}.items():
        (tmp_path / file).write_text(text)
    extra = {"MLFLOW_TRACKING_URI": server.uri}
    done = run([sys.executable, "loop.py", name], tmp_path, extra=extra)
    assert done.code == 0, done.output
    reader = MlflowClient(server.uri)
    (mlflow_run,) = reader.search_runs([reader.get_experiment_by_name(name).experiment_id])
    (model,) = models(reader, mlflow_run)
    asked = run([sys.executable, "-P", "ask.py", f"models:/{model.model_id}"], tmp_path, extra=extra)
    if name == "described":
        assert "no class is named" not in done.output
        assert "Net answers" in asked.output, asked.output
    else:
        assert done.output.count("no class is named for the models in MLflow") == 1
        assert 'does not have the "python_function" flavor' in asked.output
