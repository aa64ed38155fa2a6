"""Each Python snippet of the pages runs, after the lines that its page leaves to the reader's own code."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, blocks, page_id
from tests.launching import BIN, ROOT, run

SMALL = """
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from harness import ClassSpec, PeriodicLogger
from harness.tasks import Digits

accelerator = Accelerator()
loader = DataLoader(torch.ones(8, 3), batch_size=4)
def made():
    model = nn.Linear(3, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = made()
def loss_of(model, batch):
    return model(batch).mean()
def train(logger, *parts):
    for _ in logger.epochs(1):
        for batch in logger.batches(loader):
            for model, optimizer in parts:
                optimizer.zero_grad()
                loss_of(model, batch).backward()
            for _, optimizer in parts:
                optimizer.step()
"""
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
    def forward(self, x):
        return self.conv(x).mean((1, 2, 3))
"""
LOGGER = 'logger = PeriodicLogger(accelerator, experiment_name="x", run_name="x")\nlogger.start()\n'
# What the frameworks' own names are in the snippets: whatever is given to them is kept, and nothing trains.
RECORDING = """
class Recorder:
    def __init__(self, *args, **kwargs):
        self.callbacks = kwargs.get("callbacks")
        assert self.callbacks is None or self.callbacks[0].__class__.__name__ == "HarnessCallback"
    def train(self): ...
    def fit(self, *args, **kwargs):
        Recorder(*args, **kwargs)
Trainer = Recorder
model = args = data = module = images = labels = None
model = Recorder()
"""
# Page, number of the snippet -> lines before it, lines behind it.
RUN = {
    ("README.md", 0): (SMALL, "assert logger.epoch == 2"),
    ("docs/guides/own-loop.md", 1): (
        SMALL + LOGGER + "average = made()[0]\nlogger.watch(model, optimizer)",
        "train(logger, (model, optimizer)); logger.close()",
    ),
    ("docs/guides/own-loop.md", 2): (
        SMALL + LOGGER + "(g, opt_g), (d, opt_d) = made(), made()",
        "train(logger, (g, opt_g), (d, opt_d)); logger.close()",
    ),
    ("docs/guides/own-loop.md", 3): (
        SMALL + LOGGER + "(encoder, _), (decoder, _) = made(), made()\n"
        "optimizer_of_both = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)",
        "train(logger, (nn.Sequential(encoder, decoder), optimizer_of_both)); logger.close()",
    ),
    ("docs/guides/own-loop.md", 4): (SMALL, ""),
    ("docs/guides/own-loop.md", 5): ("from accelerate import Accelerator", ""),
    ("docs/guides/own-task.md", 0): (
        "from torch import nn\nfrom torch.utils.data import DataLoader\nfrom harness import StepOutput, Task",
        "assert isinstance(MyTask(), Task)",
    ),
    ("docs/guides/any-script.md", 0): ("", "harness.autolog(disable=True)"),
    ("docs/guides/frameworks.md", 0): (RECORDING, ""),
    ("docs/guides/frameworks.md", 1): (RECORDING, ""),
    ("docs/guides/frameworks.md", 2): (RECORDING, ""),
    ("docs/guides/frameworks.md", 3): ("from accelerate import Accelerator\nloss, step = 0.5, 1", ""),
    ("docs/guides/frameworks.md", 4): ("from transformers import TrainingArguments", ""),
    ("docs/guides/models.md", 1): (
        SMALL + "from my_project import Net\nloader = DataLoader(torch.ones(4, 3, 8, 8), batch_size=2)",
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n    logger.watch(model, optimizer)\n"
        "    train(logger, (model, optimizer))",
    ),
    ("docs/migrating.md", 0): (
        "from pathlib import Path\nimport torch\nfrom safetensors.torch import save_file\n"
        "Path('runs/first/checkpoints/epoch-0002').mkdir(parents=True)\n"
        "save_file({'w': torch.ones(1)}, 'runs/first/checkpoints/epoch-0002/model.safetensors')",
        "assert set(weights) == {'w'}",
    ),
}
# The first is that of the README. The others need an MLflow server with models in it: tests/services/test_models.py and
# tests/local/integrations run them.
RUN_ELSEWHERE = {("docs/guides/own-loop.md", 0), ("docs/guides/models.md", 0), ("docs/guides/frameworks.md", 5)}


def test_each_snippet_is_run() -> None:
    found = {(page_id(page), number) for page in PAGES for number, _ in enumerate(blocks(page, "python"))}
    assert found == set(RUN) | RUN_ELSEWHERE
    assert blocks(ROOT / "README.md", "python")[0] == blocks(ROOT / "docs/guides/own-loop.md", "python")[0]


@pytest.mark.parametrize(("page", "number"), RUN, ids=lambda value: str(value))
def test_snippet_runs(page: str, number: int, tmp_path: Path) -> None:
    before, behind = RUN[page, number]
    snippet = blocks(ROOT / page, "python")[number].replace("epochs(100)", "epochs(2)")
    (tmp_path / "my_project.py").write_text(NET)
    script = tmp_path / "snippet.py"
    script.write_text(textwrap.dedent(before) + "\n" + snippet + behind + "\n")
    extra = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "KERAS_BACKEND": "torch"}
    done = run([BIN / "python", script], tmp_path, timeout_s=200, extra=extra)
    assert done.code == 0, done.output[-3000:]
