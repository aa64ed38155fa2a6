"""Where accelerate would silently do less than asked, the run stops with the reason and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import BIN, ROOT, accelerate, fsdp1_config, harness, run

CONFIG = ("--config", ROOT / "configs" / "digits.yaml", "--trainer.max_epochs", "1")

MULTI_CPU = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 1
num_processes: 2
machine_rank: 0
use_cpu: true
debug: false
mixed_precision: 'no'
main_training_function: main
"""


def refused(cwd: Path, *words: str | Path) -> str:
    done = run((BIN / "accelerate", "launch", *words, "-m", "harness", *CONFIG), cwd)
    assert done.code != 0
    assert len(done.error_lines) == 1, done.output
    assert not list(cwd.glob("runs")) and not list(cwd.glob("mlflow.db"))
    return done.error_lines[0]


def test_run_is_refused_when_accelerate_starts_one_process_for_cpu_option(tmp_path: Path) -> None:
    line = refused(tmp_path, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    assert "2 processes were requested, but the launcher started one" in line


def test_run_is_refused_when_accelerate_starts_one_process_for_multi_cpu_file(tmp_path: Path) -> None:
    (tmp_path / "multi_cpu.yaml").write_text(MULTI_CPU)
    line = refused(tmp_path, "--config_file", "multi_cpu.yaml")
    assert "2 processes were requested, but the launcher started one" in line


def test_run_is_refused_when_fsdp1_hides_the_parameters(tmp_path: Path) -> None:
    config = fsdp1_config(tmp_path, fsdp_use_orig_params="false")
    line = refused(tmp_path, "--config_file", config, "--main_process_port", "0")
    assert "`fsdp_use_orig_params: true` or `fsdp_version: 2`" in line


def test_command_that_is_printed_runs_when_harness_launch_becomes_it(tmp_path: Path) -> None:
    words = ("launch", "--strategy", "zero2", "--num_processes", "2", *CONFIG, "--tracking.enabled", "false")
    done = run(harness(*words), tmp_path)
    assert done.code == 0, done.output
    printed = done.output.splitlines()[0]
    assert printed.startswith(f"accelerate launch --config_file {ROOT}/configs/accelerate/zero2.yaml --num_processes 2")
    assert "epoch-0001" in done.output


def test_usage_error_is_one_line_and_code_2_when_config_is_wrong(tmp_path: Path) -> None:
    done = run(harness("launch", "--num_processes", "2", *CONFIG, "--checkpoint.every_n_epochs", "0"), tmp_path)
    assert (done.code, len(done.output.splitlines())) == (2, 1)
    assert "checkpoint.every_n_epochs: must be at least 1, got 0" in done.output


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_names_have_no_wrapper_when_model_is_compiled_and_checkpoints_activations(tmp_path: Path, backend: str) -> None:
    config = tmp_path / "compiled.yaml"
    text = (ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text()
    config.write_text(
        text.replace("fsdp_activation_checkpointing: false", "fsdp_activation_checkpointing: true")
        + f"dynamo_config:\n  dynamo_backend: {backend.upper()}\n"
    )
    words = (
        "-m",
        "harness",
        "--config",
        ROOT / "configs" / "byte_lm.yaml",
        "--run_name",
        "it",
        "--trainer.max_steps",
        "2",
    )
    small = (
        "--task.init_args.max_text_bytes",
        "60000",
        "--task.init_args.num_layers",
        "2",
        "--trainer.limit_eval_batches",
        "1",
    )
    done = run((*accelerate("fsdp2", "--config_file", config), *words, *small, "--tracking.enabled", "false"), tmp_path)
    assert done.code == 0, done.output
    from safetensors import safe_open

    with safe_open(tmp_path / "runs/it/checkpoints/step-00000002/model.safetensors", "pt") as stream:
        names = set(stream.keys())
    assert "blocks.0.qkv.weight" in names
    assert not [name for name in names if "_orig_mod" in name or "_checkpoint_wrapped" in name]
