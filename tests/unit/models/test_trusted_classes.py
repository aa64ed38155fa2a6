"""What the description of a model may have built, by `harness.load_model` and by what MLflow calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch
import yaml
from jsonargparse.typing import PositiveInt
from safetensors.torch import save_file
from torch import nn

import harness
from harness.errors import ConfigError
from harness.models.mlflow_flavor import TRUSTED_VARIABLE, _load_pyfunc
from tests.unit.models import trusted_models

NET = f"{trusted_models.__name__}.Net"
OUTSIDE = "telltale_outside"


@pytest.fixture
def telltale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package outside of the model's: the file that exists once the package was imported."""
    (tmp_path / f"{OUTSIDE}.py").write_text(
        f"import pathlib\nfrom torch import nn\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        "class Block(nn.Module):\n    pass\n"
        "def act(x):\n    return x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, OUTSIDE, raising=False)
    return tmp_path / "imported"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(class_path: str = NET, **init_args: Any) -> Path:
        found = tmp_path / "model"
        found.mkdir()
        save_file({"layer.weight": torch.ones(2, 2)}, found / "model.safetensors")
        described = {"class_path": class_path, "init_args": init_args}
        (found / "MLmodel").write_text(yaml.safe_dump({"flavors": {"harness": described}}))
        return found

    return write


BLOCK = {"class_path": f"{OUTSIDE}.Block"}
HIDDEN = json.dumps(BLOCK)
# Valid as JSON, and not as YAML.
WITH_TABS = HIDDEN.replace(" ", "\t")
OWN_BLOCK = {"class_path": f"{trusted_models.__name__}.Block"}
DOTTED = {"extra.class_path": f"{OUTSIDE}.Block", "extra.init_args": {}}


class Loaded(nn.Module):
    """What a short name could be taken for: a class of another module than the model's, which is imported already."""

    def __init__(self) -> None:
        raise AssertionError("it was called by its short name")


@pytest.mark.parametrize(
    ("init_args", "reason"),
    [
        ({"anything": BLOCK}, r"expects no class there"),
        ({"untyped": BLOCK}, r"expects no class there"),
        ({"untyped": [{"deep": BLOCK}]}, r"untyped\[0\]\.deep: names"),
        ({"values": {"x": BLOCK}}, r"values\.x: names"),
        ({"anything": HIDDEN}, "expects no class"),
        ({"values": json.dumps({"x": BLOCK})}, "expects no class"),
        ({"text_or_anything": HIDDEN}, "expects no class"),
        ({"block": BLOCK}, f"block: names {OUTSIDE}.Block, which is not below torch.nn, tests;"),
        ({"block": BLOCK["class_path"]}, "is not below"),
        ({"block": HIDDEN}, "is not below"),
        ({"blocks": [BLOCK]}, r"blocks\[0\]: names"),
        ({"by_name": {"x": BLOCK}}, r"by_name\.x: names"),
        ({"activation": f"{OUTSIDE}.act"}, "is not below"),
        ({"activation": BLOCK}, "is not below"),
        ({"kind": f"{OUTSIDE}.Block"}, "is not below"),
        ({"module_or_word": f"{OUTSIDE}.Block"}, "is not below"),
        ({"block": {"class_path": f"{trusted_models.__name__}.Block", "init_args": {"extra": BLOCK}}}, "expects no"),
        ({"settings": {"extra": BLOCK}}, "expects no class"),
        ({"settings": "a_file.yaml"}, "is not below"),
        ({"settings": "/a/file"}, "must be the full import path"),
        ({"maybe_settings": {"extra": BLOCK}}, "expects no class"),
        ({"activation": f"{trusted_models.__name__}.Popen"}, "which is subprocess.Popen, which is not below"),
        ({"activation": {"class_path": f"{trusted_models.__name__}.Popen"}}, "which is subprocess.Popen"),
        ({"activation": "torch.nn.modules.module.torch.load"}, "which is in torch, which is not below"),
        ({"extra.class_path": f"{OUTSIDE}.Block"}, "is not an argument of"),
        ({"block": {**OWN_BLOCK, "init_args": DOTTED}}, r"extra\.class_path: is not an argument of"),
        ({"block": DOTTED}, r"extra\.class_path: is not an argument of"),
        ({"maybe_settings": DOTTED}, r"extra\.class_path: is not an argument of"),
        ({"settings": DOTTED}, r"extra\.class_path: is not an argument of"),
        ({"named": DOTTED}, r"extra\.class_path: is not an argument of"),
        ({"rates": DOTTED}, r"has extra\.class_path, extra\.init_args; it takes"),
        ({"rates": {"extra": BLOCK}}, "expects no class"),
        ({"block": {**OWN_BLOCK, "dict_kwargs": {"extra": BLOCK}}}, "may have only class_path and init_args"),
        ({"block": {**OWN_BLOCK, "init_args+": {}}}, "may have only class_path and init_args"),
        ({"block": {**OWN_BLOCK, "init_args": [BLOCK]}}, "must be a mapping"),
        ({"block": {"__class_path__": f"{OUTSIDE}.Block"}}, "__class_path__: is not an argument of"),
        ({"block": {"__path__": "file.yaml"}}, "__path__: is not an argument of"),
        ({"block": "Loaded"}, "must be the full import path"),
        ({"block": {"class_path": "Loaded"}}, "must be the full import path"),
        ({"blocks": ["Loaded"]}, "must be the full import path"),
        ({"activation": "Loaded"}, "must be the full import path"),
        ({"make_norm": "Loaded"}, "must be the full import path"),
        ({"block": WITH_TABS}, "is not below"),
        ({"anything": WITH_TABS}, "expects no class"),
        ({"anythings": [WITH_TABS]}, "expects no class"),
        ({"anythings": [{"deep": [BLOCK]}]}, r"anythings\[0\]\.deep\[0\]: names"),
        ({"unresolved": BLOCK}, "expects no class"),
        ({"rest": BLOCK}, "rest: is not an argument of"),
        ({"size": [BLOCK]}, "size.height: names"),
        ({"module": OUTSIDE}, "must be module or None"),
        ({"kind": BLOCK}, "is not below"),
        ({"block": ["Loaded"]}, "got a list"),
        ({"moment": f"{OUTSIDE}.Block"}, r"moment: must be datetime\.datetime or None"),
        ({"other_path": f"{OUTSIDE}.Block"}, r"other_path: must be pathlib\.WindowsPath or None"),
        ({"pure_path": BLOCK}, "expects no class"),
        ({"own_path": BLOCK}, "expects no class"),
        ({"amount": f"{OUTSIDE}.Block"}, r"amount: must be decimal\.Decimal or None"),
        ({"positive": f"{OUTSIDE}.Block"}, "positive: must be"),
        ({"registered": f"{OUTSIDE}.Block"}, "is not below"),
    ],
    ids=str,
)
def test_nothing_is_imported_when_a_class_is_not_trusted(
    write: Callable[..., Path], telltale: Path, init_args: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        harness.load_model(write(**init_args))
    assert not telltale.exists()


@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ({"block": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}}, nn.Linear),
        ({"block": {"class_path": f"{trusted_models.__name__}.Block"}}, trusted_models.Block),
        ({"block": "torch.nn.ReLU"}, nn.ReLU),
        ({"word_or_module": {"class_path": "torch.nn.ReLU"}}, nn.ReLU),
        ({"maybe_settings": {"width": 3}}, trusted_models.Settings),
        ({"activation": "torch.nn.ReLU"}, nn.ReLU),
        ({"blocks": [OWN_BLOCK]}, list),
    ],
    ids=str,
)
def test_class_is_built_when_the_annotation_expects_it(
    write: Callable[..., Path], init_args: dict[str, Any], expected: type
) -> None:
    given = harness.load_model(write(**init_args)).given
    assert isinstance(given[next(iter(init_args))], expected)


@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ({"activation": "torch.nn.functional.gelu"}, nn.functional.gelu),
        ({"kind": "torch.nn.Tanh"}, nn.Tanh),
        ({"word_or_module": "tanh"}, "tanh"),
        ({"word_or_module": f"{OUTSIDE}.Block"}, f"{OUTSIDE}.Block"),
        ({"module_or_word": "tanh"}, "tanh"),
        ({"anythings": ["1", {"deep": ["1", HIDDEN]}]}, [1, {"deep": ["1", HIDDEN]}]),
        ({"word_or_module": "weights_of_ours.bin"}, "weights_of_ours.bin"),
        ({"name": HIDDEN}, HIDDEN),
        ({"values": {"depth": 3, "names": ["os.path"]}}, {"depth": 3, "names": ["os.path"]}),
        ({"settings": {"width": 5}}, trusted_models.Settings(5)),
        ({"settings": '{"width": 5}'}, trusted_models.Settings(5)),
        ({"preset": {"width": 7}}, trusted_models.Settings(7, "kept")),
        (
            {"outer": {"inner": {"width": 7}}},
            trusted_models.Outer(trusted_models.Settings(7, "kept"), 4),
        ),
        ({"word_or_module": "Loaded"}, "Loaded"),
        ({"anything": {"a.b": 1, "c": [None, 2.5]}}, {"a.b": 1, "c": [None, 2.5]}),
        ({"anything": "1e-3"}, 1e-3),
        ({"untyped": "[1, 2]"}, [1, 2]),
        ({"untyped_text": "12"}, "12"),
        ({"widths": [1, 2]}, (1, 2)),
        ({"size": [1]}, trusted_models.Size(1)),
        ({"size": {"height": 1, "width": 3}}, trusted_models.Size(1, 3)),
        ({"rates": {"first": 1}}, {"first": 1.0}),
        ({"kind_of": "SMALL"}, trusted_models.Kind.SMALL),
        ({"kind_of": "other"}, "other"),
        ({"path": "a/b"}, Path("a/b")),
        ({"pure_path": f"{OUTSIDE}.Block"}, PurePath(f"{OUTSIDE}.Block")),
        ({"posix_path": f"{OUTSIDE}.Block"}, PurePosixPath(f"{OUTSIDE}.Block")),
        ({"windows_path": f"{OUTSIDE}.Block"}, PureWindowsPath(f"{OUTSIDE}.Block")),
        ({"own_path": f"{OUTSIDE}.Block"}, trusted_models.OwnPath(f"{OUTSIDE}.Block")),
        ({"count_or_path": "3"}, 3),
        ({"count_or_path": "a/b"}, PurePath("a/b")),
        ({"word_or_path": "a/b"}, "a/b"),
        ({"pure_path": "null"}, None),
        ({"name": "~"}, None),
        ({"amount": 1.5}, Decimal("1.5")),
        ({"positive": 3}, PositiveInt(3)),
        ({"number": 3}, 3),
        ({"depth": 3}, 3),
        ({"by_index": {"3": ["x"]}}, {3: {"x"}}),
        ({"unresolved": {"x": 1}}, {"x": 1}),
        ({"name": None}, None),
    ],
    ids=str,
)
def test_value_is_converted_when_it_names_no_class(
    write: Callable[..., Path], telltale: Path, init_args: dict[str, Any], expected: Any
) -> None:
    found = harness.load_model(write(**init_args)).given[next(iter(init_args))]
    assert (found, type(found)) == (expected, type(expected))
    assert not telltale.exists()


def test_other_package_is_allowed_when_the_caller_trusts_it(
    write: Callable[..., Path], telltale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = write(block=BLOCK)
    with pytest.raises(ConfigError, match="is not below"):
        _load_pyfunc(str(where))
    assert not telltale.exists()
    assert type(harness.load_model(where, trusted=[OUTSIDE]).given["block"]).__module__ == OUTSIDE
    monkeypatch.setenv(TRUSTED_VARIABLE, f"something.else, {OUTSIDE}.Block")
    assert type(_load_pyfunc(str(where)).get_raw_model().given["block"]).__module__ == OUTSIDE


def test_class_is_refused_when_neither_module_nor_task(write: Callable[..., Path]) -> None:
    where = write(f"{trusted_models.__name__}.Makes")
    with pytest.raises(ConfigError, match=r"is neither a torch\.nn\.Module nor a harness\.Task"):
        harness.load_model(where)
    assert isinstance(harness.load_model(where, trusted=["tests"]), trusted_models.Net)


def test_rest_of_torch_is_refused_when_the_model_is_torchs(write: Callable[..., Path]) -> None:
    where = write("torch.nn.TransformerEncoderLayer", d_model=2, nhead=1, activation={"class_path": "torch.hub.load"})
    with pytest.raises(ConfigError, match=r"names torch\.hub\.load, which is not below torch\.nn;"):
        harness.load_model(where)


def test_class_is_a_factory_when_a_callable_is_expected(write: Callable[..., Path]) -> None:
    described = {"class_path": "torch.nn.LayerNorm", "init_args": {"eps": 0.5}}
    make_norm = harness.load_model(write(make_norm=described)).given["make_norm"]
    assert make_norm(3).normalized_shape == (3,)
    assert make_norm(3).eps == 0.5


def test_arguments_are_passed_when_the_parent_takes_them(write: Callable[..., Path]) -> None:
    given = harness.load_model(write(f"{trusted_models.__name__}.Wide", factor=3, block=OWN_BLOCK)).given
    assert (given["factor"], type(given["block"])) == (3, trusted_models.Block)


@pytest.mark.parametrize("package", ["model", "downloads"])
@pytest.mark.parametrize("is_regular", [False, True])
def test_code_in_the_models_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, is_regular: bool
) -> None:
    """As after a download into the working directory, where each directory can be found as a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    where = tmp_path / ("model" if package == "model" else "downloads/model")
    where.mkdir(parents=True)
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
    (where / "evil.py").write_text(code)
    if is_regular:
        (where / "__init__.py").write_text(code)
    class_path = "model.evil.Net" if package == "model" else "downloads.model.evil.Net"
    (where / "MLmodel").write_text(yaml.safe_dump({"flavors": {"harness": {"class_path": class_path}}}))
    with pytest.raises(ConfigError, match=f"class_path: names {class_path}, which is in the model's own directory"):
        harness.load_model(where)
    assert not (tmp_path / "imported").exists()


def test_class_is_found_when_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    (tmp_path / "beside_the_model.py").write_text(
        "from tests.unit.models.trusted_models import Net as Base\nclass Net(Base): ..."
    )
    assert type(harness.load_model(write("beside_the_model.Net"))).__module__ == "beside_the_model"


@pytest.mark.parametrize("is_in_run", [True, False])
@pytest.mark.parametrize("start", ["project", "run", "checkpoint"])
def test_code_in_the_runs_directory_is_not_imported(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    is_in_run: bool,
) -> None:
    """The run's directory is below the project's, whose modules a run may name."""
    run_dir = tmp_path / "runs/it"
    run_dir.mkdir(parents=True)
    make_checkpoint({"layer.weight": torch.ones(2, 2)}).parent.rename(run_dir / "checkpoints")
    module = f"code_of_a_run_{start}_{is_in_run}"
    recipe = {"class_path": f"{module}.Net", "init_args": {}}
    (run_dir / "outbox").mkdir()
    (run_dir / "outbox/recipe-1.json").write_text(json.dumps(recipe))
    code = f"from {trusted_models.__name__} import Net as Base\nclass Net(Base): ...\n"
    ((run_dir if is_in_run else tmp_path) / f"{module}.py").write_text(code)
    checkpoint = run_dir / "checkpoints/epoch-0001"
    monkeypatch.chdir({"project": tmp_path, "run": run_dir, "checkpoint": checkpoint}[start])
    for each in (tmp_path, run_dir):
        monkeypatch.syspath_prepend(str(each))
    where = checkpoint.relative_to(Path.cwd())
    if is_in_run:
        with pytest.raises(ConfigError, match=f"names {module}.Net, which is in the model's own directory"):
            harness.load_model(where)
        assert module not in sys.modules
    else:
        assert type(harness.load_model(where)).__module__ == module
