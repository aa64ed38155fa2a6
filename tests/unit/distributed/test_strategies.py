from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

from harness.distributed.strategies import check_launch, requested_processes
from harness.errors import LaunchError


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("accelerate launch --num_processes 4 -m harness --config c.yaml", "4"),
        ("python /v/bin/accelerate launch --num-processes=3 train.py", "3"),
        ("accelerate launch --config_file conf.yaml train.py", "8"),
        ("accelerate launch --config_file conf.yaml --num_processes 2 train.py", "2"),
        ("accelerate launch --config_file missing.yaml train.py", None),
        ("accelerate launch train.py --num_processes 4", None),
        ("accelerate launch -m harness --num_processes 4", None),
        ("accelerate test --num_processes 4", None),
        ("bash -c launch --num_processes 4", None),
        ("", None),
    ],
)
def test_number_is_read_when_the_launcher_has_one(tmp_path: Path, command: str, expected: str | None) -> None:
    (tmp_path / "conf.yaml").write_text("num_processes: 8\n")
    assert requested_processes(command.split(" "), tmp_path) == expected


@pytest.mark.parametrize("content", ["a: [1", "- 1", "", "other: 1"])
def test_number_is_unknown_when_the_file_lacks_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "conf.yaml").write_text(content)
    assert requested_processes(["accelerate", "launch", "--config_file", "conf.yaml", "train.py"], tmp_path) is None


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("WORLD_SIZE", "4", "4 processes were started, but each trains separately"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed was requested"),
    ],
)
def test_error_has_the_remedy_when_accelerate_runs_less(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    check_launch(accelerator)
    monkeypatch.setenv(variable, value)
    with pytest.raises(LaunchError, match=expected) as caught:
        check_launch(accelerator)
    assert "harness launch" in str(caught.value)


def test_remedy_differs_when_accelerate_does_not_count_ranks(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(LaunchError, match="give transformers' TrainingArguments use_cpu=True"):
        check_launch(accelerator)
