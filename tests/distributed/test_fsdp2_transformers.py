"""Models of transformers whose embeddings accelerate's FSDP2 would put into two groups: they train, save and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.checkpoint.format.commit import list_checkpoints
from tests.launching import ROOT, accelerate, run

SCRIPT = ROOT / "tests" / "distributed" / "transformers_fsdp2.py"


@pytest.mark.parametrize("kind", ["bert", "vit", "t5"])
def test_model_trains_saves_and_resumes_when_a_layer_holds_an_embedding(tmp_path: Path, kind: str) -> None:
    done = run(accelerate("fsdp2", SCRIPT, kind), tmp_path, extra={"ACCELERATE_USE_CPU": "true"})
    assert done.code == 0, done.output
    assert f"{kind}: " in done.output
    assert [name for name, _ in list_checkpoints(tmp_path / "runs" / "cut" / "checkpoints")][-1] == "epoch-0002"
