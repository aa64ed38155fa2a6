"""The comparison with others runs through, over the quickest of its cells."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.launching import ROOT, run


def test_facts_are_there_when_a_cell_is_asked_for(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text('{"cells": {"a peer, at another time": {}}}')
    script = ROOT / "benchmarks" / "compare_autolog.py"
    done = run([sys.executable, script, "--only", "harness_autolog,exit", "--json", "--into", kept], tmp_path)
    assert done.code == 0, done.output
    record = json.loads(done.output[done.output.index("{\n") :])
    cell = record["cells"]["harness_autolog, exit"]
    (found,) = cell["runs"]
    assert (cell["exit_code"], found["status"]) == (3, "FAILED")
    assert "exit code 3" in found["reason"]
    # The script's own values, of all steps to the one that it ended in; and ours, of those that were reduced by then.
    assert found["losses"]["loss"]["points"] == 13
    assert found["losses"]["train/loss"]["points"] in (11, 12)
    (model,) = found["models"].values()
    assert model["weights"] == {"model.safetensors": "whole"}
    assert json.loads(kept.read_text())["cells"].keys() == {"a peer, at another time", "harness_autolog, exit"}
