"""The comparison with others runs through, over the quickest of its cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare_autolog


def test_facts_are_there_when_a_cell_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text('{"cells": {"a peer, at another time": {}}}')
    compare_autolog.main(["--only", "accelerate_tracker,exit", "--json", "--into", str(kept)])
    record = json.loads(capsys.readouterr().out)
    cell = record["cells"]["accelerate_tracker, exit"]
    (found,) = cell["runs"]
    # As the table has it: to the tracker the script has ended well.
    assert (cell["exit_code"], cell["steps"], found["status"]) == (3, 13, "FINISHED")
    loss = found["losses"]["loss"]
    assert (loss["points"], loss["at_steps"], loss["is"]) == (13, 13, "rank zero's")
    assert found["models"] == {}
    assert json.loads(kept.read_text())["cells"].keys() == {"a peer, at another time", "accelerate_tracker, exit"}
