"""Our rules for names compared with those of the installed MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import verify_artifact_path
from mlflow.utils.uri import validate_path_is_safe
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_PARAM_VAL_LENGTH,
    MAX_TAG_VAL_LENGTH,
    _validate_metric,
    _validate_model_name,
    _validate_param,
    _validate_tag,
)

from harness.tracking.mlflow.client import MAX_PARAM_CHARS, MAX_TAG_CHARS
from harness.tracking.mlflow.names import MAX_KEY_CHARS, Kind, NameCleaner, clean_key, clean_model_name, clean_path

ODD = [
    "",
    "val/AR@100",
    "bad|name",
    "\N{PARTY POPPER}",
    "x" * 300,
    "a/../b",
    "..a",
    "/a",
    "a//b",
    "a/",
    ".",
    "..",
    "a\nb",
    "a\0b",
    "\ud800",
    "/" * 300,
    "%2e%2e/a",
    "C:\\a",
    "bob's model",
]
PLAIN = ["loss", "train/loss", "été: a.b-c_d", "x" * 250]
# Near what is allowed, as names are; any text besides.
names = st.text(st.sampled_from("ab./@ _-:|\u00e9\n\\%#'\""), max_size=12) | st.text(max_size=300)


def is_accepted(name: str) -> bool:
    try:
        _validate_metric(name, 1.0, 0, 0)
    except MlflowException:
        return False
    return True


@given(names)
@example("")
def test_mlflow_accepts_every_name_when_it_is_cleaned(name: str) -> None:
    key = clean_key(name)
    _validate_metric(key, 1.0, 0, 0)
    _validate_param(key, "1")
    _validate_tag(key, "1")
    assert clean_key(key) == key
    # MLflow's own expression lets a newline at the end pass.
    assert (key == name) == (is_accepted(name) and not name.endswith("\n"))

    model = clean_model_name(name)
    _validate_model_name(model)
    assert len(model) <= 256 and not {'"', "'"} <= set(model)
    assert clean_model_name(model) == model


@given(names)
@example("%2e%2e/a")
@example(" ")
@example("  a/b")
def test_path_stays_in_the_directory_when_it_is_cleaned(name: str) -> None:
    path = clean_path(name)
    assert validate_path_is_safe(path) == path
    verify_artifact_path(path)
    assert Path("/run", path).resolve().is_relative_to("/run") and Path("/run", path).resolve() != Path("/run")
    assert all(len(part.encode()) <= 255 for part in path.split("/"))
    assert clean_path(path) == path


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_name_is_accepted_when_it_is_cleaned(name: str) -> None:
    assert is_accepted(clean_key(name))


def test_limits_are_mlflows_when_values_are_cut() -> None:
    assert (MAX_KEY_CHARS, MAX_PARAM_CHARS, MAX_TAG_CHARS) == (
        MAX_ENTITY_KEY_LENGTH,
        MAX_PARAM_VAL_LENGTH,
        MAX_TAG_VAL_LENGTH,
    )


def test_warning_is_added_once_when_a_name_is_changed() -> None:
    names = NameCleaner()
    assert [names.clean("metric", "val/AR@100") for _ in range(3)] == ["val/AR_100-0f5bccb8"] * 3
    assert [names.clean("metric", name) for name in PLAIN] == PLAIN
    (line,) = names.warnings
    assert line.startswith(
        "metric 'val/AR@100' is named 'val/AR_100-0f5bccb8' in MLflow: names hold at most 250 letters"
    )


@pytest.mark.parametrize("kind", ["metric", "parameter", "tag"])
def test_cleaned_name_is_the_same_when_the_order_differs(kind: Kind) -> None:
    given = ["acc@1", "acc%1", "acc_1", "y" * 260 + "a", "y" * 260 + "b", "z|" * 125, "z?" * 125]
    found = NameCleaner().clean_all(kind, dict.fromkeys(given, "1"))
    assert len(found) == len(given) and all(map(is_accepted, found)) and "acc_1" in found
    # As in a later attempt, which logs them in another order.
    names = NameCleaner()
    assert [names.clean(kind, name) for name in reversed(given)] == list(found)[::-1]


def test_paths_remain_distinct_when_they_are_cleaned() -> None:
    given = ["note?.txt", "note%.txt", "note_.txt", "/note_.txt"]
    found = [clean_path(path) for path in given]
    assert len(set(found)) == len(given) and found[2] == given[2]
    assert all(path.startswith("note_") and path.endswith(".txt") for path in found)
