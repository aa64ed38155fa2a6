from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from harness.config.schema import (
    CheckpointConfig,
    ClassSpec,
    EarlyStopping,
    RunConfig,
    TrackingConfig,
    TrainerConfig,
    check_run_name,
    parse_size_bytes,
)
from harness.errors import ConfigError, HarnessError

TASK = ClassSpec("harness.tasks.Digits")


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (TrainerConfig, "trainer.max_epochs", 0),
        (TrainerConfig, "trainer.max_steps", 0),
        (TrainerConfig, "trainer.gradient_accumulation_steps", 0),
        (TrainerConfig, "trainer.limit_train_batches", 0),
        (TrainerConfig, "trainer.limit_eval_batches", -1),
        (TrainerConfig, "trainer.overfit_batches", 0),
        (TrainerConfig, "trainer.max_grad_norm", 0.0),
        (TrainerConfig, "trainer.max_grad_norm", float("nan")),
        (EarlyStopping, "trainer.early_stopping.patience", 0),
        (CheckpointConfig, "checkpoint.every_n_epochs", 0),
        (CheckpointConfig, "checkpoint.every_n_steps", -5),
        (CheckpointConfig, "checkpoint.save_top_k", -2),
        (CheckpointConfig, "checkpoint.dtype", "bf16"),
        (CheckpointConfig, "checkpoint.max_shard_size", "5"),
        (TrackingConfig, "tracking.log_every_n_steps", 0),
        (TrackingConfig, "tracking.start_timeout_s", 0.0),
        (TrackingConfig, "tracking.drain_timeout_s", float("nan")),
    ],
)
def test_error_names_key_and_value_when_a_rule_is_broken(make: Any, key: str, value: object) -> None:
    required = {"monitor": "eval/loss"} if make is EarlyStopping else {}
    with pytest.raises(ConfigError) as caught:
        make(**required, **{key.rpartition(".")[2]: value})
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")
    assert str(value) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_is_refused_when_out_of_numpys_range(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed: must be from 0 to 4294967295"):
        RunConfig(TASK, seed=seed)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_seed_is_accepted_when_at_the_limit(seed: int) -> None:
    assert RunConfig(TASK, seed=seed).seed == seed


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("500MB", 500 * 10**6), ("1B", 1), (" 2TB ", 2 * 10**12)],
)
def test_size_is_in_powers_of_ten_when_well_formed(text: str, size_bytes: int) -> None:
    assert parse_size_bytes("k", text) == size_bytes
    assert CheckpointConfig(max_shard_size=text).max_shard_size_bytes == size_bytes


@pytest.mark.parametrize("text", ["", "5", "GB", "0B", "0.1B", "-5GB", "5GiB", "5 GB of disk", "1e9B"])
def test_size_is_refused_when_malformed_or_zero(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^k: must be a size such as 500MB or 5GB"):
        parse_size_bytes("k", text)


def test_shard_size_is_unlimited_when_none_is_set() -> None:
    assert CheckpointConfig().max_shard_size_bytes is None


@pytest.mark.parametrize("name", ["a", "run-1", "_x", "A.b", "2024-01-01"])
def test_run_name_is_accepted_when_it_can_be_a_directory(name: str) -> None:
    check_run_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "../x"])
def test_run_name_is_refused_when_it_cannot_be_a_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="run_name: must be letters"):
        check_run_name(name)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"registered_model_aliases": True},
            "tracking.registered_model_aliases: need a registered model; set",
        ),
        ({"log_resume_state": True}, "tracking.log_resume_state: must be none, last or all, got True"),
    ],
)
def test_tracking_is_refused_when_options_contradict(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TrackingConfig(**values)


def test_config_is_immutable_when_constructed() -> None:
    config = RunConfig(TASK)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_config_error_is_a_harness_error_and_a_value_error() -> None:
    assert issubclass(ConfigError, HarnessError)
    assert issubclass(ConfigError, ValueError)  # which is what jsonargparse passes on from a constructor
