from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harness.config.schema import ClassSpec, RunConfig
from harness.tracking import provenance

keys = st.text("abcxyz_", min_size=1, max_size=6)
nested = st.recursive(
    st.integers() | st.text(max_size=8) | st.none() | st.booleans(),
    lambda inner: st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


# ------------------------------------------------------------------------- parameters


@given(st.dictionaries(keys, nested, max_size=5))
def test_each_leaf_has_its_path_when_flattened(config: dict[str, Any]) -> None:
    def leaves(value: Any, path: tuple[str, ...]) -> dict[str, str]:
        if isinstance(value, dict) and value:
            return {k: v for key, item in value.items() for k, v in leaves(item, (*path, key)).items()}
        return {".".join(path): str(value)} if path else {}

    assert provenance.flatten_params(config) == leaves(config, ())


@given(
    st.sampled_from(["password", "hf_token", "db.secret", "api_key", "AWS_SECRET_ACCESS_KEY"]),
    st.text("QWERTZ !=/'\"", min_size=4, max_size=20).filter(lambda text: text.strip()),
)
def test_secret_is_gone_when_it_is_flattened_at_any_depth(name: str, value: str) -> None:
    for config in ({name: value}, {"task": {"init_args": {name: value}}}, {name: {"inner": value}}, {name: [value]}):
        (written,) = provenance.flatten_params(config).values()
        assert written == "***"


class Unreadable:
    """As a configuration's value that refers to a variable that is not set."""

    def __str__(self) -> str:
        raise KeyError("HOME")


def test_type_is_logged_when_a_parameter_has_no_text() -> None:
    found = provenance.flatten_params({"big": 10**5000, "missing": Unreadable(), "lr": 0.1})
    assert found == {"big": "(int of 16610 bits)", "missing": "(Unreadable)", "lr": "0.1"}


def test_names_are_dotted_when_a_run_config_is_flattened() -> None:
    config = RunConfig(ClassSpec("my.Task", {"max_tokens": 512, "tokenizer": "bpe"}))
    flat = provenance.flatten_params(config)
    assert flat["trainer.max_epochs"] == "20"
    assert flat["task.class_path"] == "my.Task"
    assert flat["task.init_args.max_tokens"] == "512"
    assert flat["task.init_args.tokenizer"] == "bpe"
    assert flat["scheduler"] == "None"
    assert "hunter2" not in str(provenance.flatten_params({"uri": "postgresql://me:hunter2@host/db"}))


# ------------------------------------------------------------------------- the code


def git(directory: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=trunk"]
    done = subprocess.run(["git", "-C", str(directory), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_and_dirtiness_are_found_when_in_a_work_tree(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "untracked.txt").write_text("does not count")
    clean = {
        "mlflow.source.git.commit": git(tmp_path, "rev-parse", "HEAD"),
        "mlflow.source.git.branch": "trunk",
        "harness.git_dirty": "false",
    }
    assert provenance.git_facts(tmp_path) == clean
    (tmp_path / "code.py").write_text("a = 2\n")
    assert provenance.git_facts(tmp_path) == {**clean, "harness.git_dirty": "true"}


def test_facts_are_empty_when_there_is_no_work_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.git_facts(tmp_path / "missing") == {}
    monkeypatch.setenv("PATH", "")  # no git at all
    assert provenance.git_facts(tmp_path) == {}


def test_tags_have_command_and_versions_when_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--uri", "http://me:hunter2@h", "--hf_token", "abc"])
    tags = provenance.tags({"strategy": "single"}, {"team": "vision", "harness.strategy": "mine"})
    assert tags["harness.command"].endswith("train.py --uri 'http://me:***@h' --hf_token '***'")
    assert torch.__version__.startswith(tags["harness.version.torch"])
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["team"] == "vision"
    assert tags["harness.strategy"] == "mine"  # the user's value takes precedence
    assert all(isinstance(value, str) for value in tags.values())


def test_job_is_named_when_slurm_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    tags = provenance.tags({}, {})
    assert (tags["mlflow.source.type"], tags["harness.slurm_job_id"]) == ("JOB", "4711")


# ------------------------------------------------------------------------- the data


def digest(batch: Any) -> str:
    return provenance.batch_digest(batch).text


def test_digest_differs_when_the_batch_does() -> None:
    batch = {"x": torch.arange(12).view(3, 4), "y": ["a", "b", "c"]}
    assert digest(batch) == digest({"x": torch.arange(12).view(3, 4).T.contiguous().T, "y": ["a", "b", "c"]})
    others: list[Any] = [
        {**batch, "x": torch.arange(12).view(3, 4).flip(0)},
        {**batch, "x": torch.arange(12).view(3, 4).int()},
        {**batch, "y": ["a", "b", "d"]},
        {"x": batch["x"], "z": batch["y"]},
    ]
    assert len({digest(each) for each in (batch, *others)}) == 5


def test_digest_ends_at_its_limit_when_the_batch_is_large() -> None:
    large = torch.zeros(64, 1024, 1024, dtype=torch.uint8)
    before = digest(large)
    large[-1] = 1
    assert digest(large) == before
    large[0, 0, 0] = 1
    assert digest(large) != before


def test_record_has_no_sample_read_when_the_data_set_would_raise() -> None:
    class Closed:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"opened for {name}")

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read")

        def __len__(self) -> int:
            return 3

    first = provenance.dataset_record(Closed(), "train", provenance.batch_digest([torch.ones(2)]))
    other = provenance.dataset_record(Closed(), "train", provenance.batch_digest([torch.zeros(2)]))
    assert first["name"].endswith("Closed")
    assert first["profile"] == '{"num_rows": 3}'
    assert first["digest"] != other["digest"]
    assert len(first["digest"]) <= 36


def test_own_digest_and_name_are_used_when_the_data_set_has_them() -> None:
    class Named:
        name = "imagenet"
        digest = "d" * 50

    record = provenance.dataset_record(Named(), "eval", provenance.batch_digest([1]))
    assert (record["name"], record["digest"], record["profile"]) == ("imagenet", "d" * 36, '{"num_rows": null}')


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float16])
def test_batch_is_digested_when_numpy_lacks_its_type(dtype: torch.dtype) -> None:
    ones, zeros = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    assert digest([ones, torch.ones(2, 2, dtype=dtype).T, "text", None]) != digest([zeros, "text", None])
    assert digest([ones]) != digest([zeros])


# ------------------------------------------------------------------------- the model


def test_summary_counts_parameters_when_some_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(10, 100), nn.Sequential(nn.Linear(100, 2), nn.Sequential(nn.Linear(2, 2))))
    model[0].requires_grad_(False)
    lines = [line.split() for line in provenance.model_summary(model).splitlines()]
    assert lines[0] == ["module", "class", "parameters", "trainable"]
    assert lines[1] == ["(model)", "Sequential", "1,308", "208"]
    assert lines[2] == ["0", "Linear", "1,100", "0"]
    assert [line[0] for line in lines[1:]] == ["(model)", "0", "1", "1.0", "1.1"]  # the third level and no deeper
