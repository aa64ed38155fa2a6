from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness.config.instantiate import build_optimizer, build_scheduler, build_task, check_arguments, load_class
from harness.config.schema import ClassSpec
from harness.errors import ConfigError
from harness.tasks import Digits


def task_error(class_path: str, init_args: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        build_task(ClassSpec(class_path, init_args or {}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_task_is_built_when_class_and_arguments_are_valid() -> None:
    task = build_task(ClassSpec("harness.tasks.Digits", {"width": 4}))
    assert isinstance(task, Digits)
    assert task.width == 4


def test_error_names_the_module_when_it_cannot_be_imported() -> None:
    assert task_error("no_such_package.tasks.X").startswith(
        "task.class_path: cannot import 'no_such_package.tasks': No module named 'no_such_package'"
    )


def test_error_suggests_a_class_when_it_is_misspelt() -> None:
    assert task_error("harness.tasks.Digit").endswith("did you mean harness.tasks.Digits?")


def test_error_suggests_nothing_when_no_class_is_similar() -> None:
    message = task_error("harness.tasks.Zzzzzz")
    assert "harness.tasks has no class 'Zzzzzz'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("class_path", ["Digits", "", ".Digits", ".tasks.Digits", "..Digits"])
def test_error_when_the_class_path_has_no_module(class_path: str) -> None:
    assert task_error(class_path).startswith("task.class_path: must be a module and a class")


@pytest.mark.parametrize("class_path", ["harness.config.parsing.parse_run_config", "harness.tasks.", "harness.tasks"])
def test_error_when_the_path_is_not_a_class(class_path: str) -> None:
    assert "has no class" in task_error(class_path)


def test_error_names_the_valid_arguments_when_one_is_unknown() -> None:
    message = task_error("harness.tasks.Digits", {"widht": 3})
    assert message.startswith("task.init_args.widht: is not an argument of harness.tasks.Digits")
    assert "did you mean 'width'?" in message
    for name in ("batch_size", "dropout", "width"):
        assert name in message


def test_error_names_the_argument_when_its_type_is_wrong() -> None:
    message = task_error("harness.tasks.Digits", {"width": "many"})
    assert "task.init_args" in message and "width" in message and "many" in message


class Untyped(Digits):
    def __init__(self, width, depth=2):  # type: ignore[no-untyped-def]
        super().__init__(width)
        self.depth = depth


def test_arguments_are_unchanged_when_untyped() -> None:
    path = f"{__name__}.Untyped"
    task: Any = build_task(ClassSpec(path, {"width": 4}))
    assert (task.width, task.depth) == (4, 2)
    assert task_error(path) == f"task.init_args.width: is missing; {path} needs it"
    assert "is not an argument" in task_error(path, {"width": 4, "depht": 3})


def test_error_names_the_methods_when_the_class_is_no_task() -> None:
    assert "is not a harness.Task: it lacks model, train_data, eval_data, step" in task_error("torch.nn.ReLU")


def test_error_has_the_reason_when_the_constructor_raises() -> None:
    message = task_error("harness.tasks.ByteLM", {"d_model": 10, "num_heads": 3})
    assert "d_model must be a multiple of num_heads, got 10 and 3" in message


def test_optimizer_has_the_trained_parameters_when_some_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(ClassSpec("torch.optim.AdamW", {"lr": 0.1, "betas": [0.8, 0.9]}), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [p.shape for p in model[1].parameters()]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ClassSpec("torch.nn.ReLU"), "optimizer.class_path: torch.nn.ReLU is not a torch.optim.Optimizer"),
        (ClassSpec("torch.optim.SGDD"), "did you mean torch.optim.SGD?"),
        (ClassSpec("torch.optim.SGD", {"lrr": 0.1}), "did you mean 'lr'?"),
        (ClassSpec("torch.optim.SGD", {"params": []}), "optimizer.init_args.params: is not an argument"),
        (ClassSpec("torch.optim.AdamW", {"lr": -1.0}), "Invalid learning rate: -1.0"),
    ],
)
def test_error_when_the_optimizer_is_invalid(spec: ClassSpec, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(spec, nn.Linear(1, 1))
    assert expected in str(caught.value)


def test_scheduler_gets_the_optimizer_when_built() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = build_scheduler(ClassSpec("torch.optim.lr_scheduler.StepLR", {"step_size": 3}), optimizer)
    assert scheduler.optimizer is optimizer
    assert build_scheduler(None, optimizer) is None


@pytest.mark.parametrize(
    ("init_args", "expected"), [({}, "step_size"), ({"optimizer": 1, "step_size": 3}, "optimizer")]
)
def test_error_names_the_argument_when_the_scheduler_is_invalid(init_args: dict[str, Any], expected: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=rf"scheduler\.init_args.*{expected}"):
        build_scheduler(ClassSpec("torch.optim.lr_scheduler.StepLR", init_args), optimizer)


def test_nothing_is_built_when_arguments_are_checked() -> None:
    spec = ClassSpec("torch.optim.SGD", {"lr": 0.5})
    assert check_arguments("optimizer", spec, ("params",)).lr == 0.5
    assert load_class("optimizer", spec.class_path) is torch.optim.SGD
