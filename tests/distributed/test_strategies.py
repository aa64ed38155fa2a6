"""Every strategy trains both tasks to the losses of DDP: one through our own accelerate configuration files.

The other's ranks are forked from a process that has imported everything, with the environment that those files
make: starting takes longer than training here.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor

from harness.checkpoint.format.commit import Manifest, list_checkpoints
from tests.distributed.resuming_ranks import train_words
from tests.distributed.test_saver import ranks
from tests.launching import ROOT, accelerate, run

# Few steps: strategies round differently in the eighth digit, until one rounding turns a ReLU over, here at step 18.
TASKS = {
    "digits": ("--trainer.max_steps", "12"),
    "byte_lm": (
        *("--trainer.max_steps", "12", "--trainer.limit_eval_batches", "4", "--tracking.log_every_n_steps", "4"),
        *("--task.init_args.max_text_bytes", "200000", "--task.init_args.context_length", "32"),
        *("--task.init_args.d_model", "64", "--task.init_args.num_layers", "2"),
    ),
}
TASKS["unclipped byte_lm"] = (*TASKS["byte_lm"], "--trainer.max_grad_norm", "null")
# accelerate's smallest hybrid mesh is 2 x 2; it is compared with DDP on as many ranks.
NUM_PROCESSES = {"single": 1, "hsdp": 4}


@cache
def trained(strategy: str, task: str, num_processes: int) -> tuple[Manifest, dict[str, Tensor], dict[str, Tensor]]:
    """The last checkpoint's manifest, weights and optimizer state."""
    # Read before it returns: what is kept is in memory.
    with TemporaryDirectory(prefix=f"harness-{strategy}-") as directory:
        return _trained(Path(directory), strategy, task, num_processes)


def _trained(
    cwd: Path, strategy: str, task: str, num_processes: int
) -> tuple[Manifest, dict[str, Tensor], dict[str, Tensor]]:
    config = ROOT / "configs" / f"{task.split()[-1]}.yaml"
    words = ("-m", "harness", "--config", config, "--run_name", "it", "--tracking.enabled", "false", *TASKS[task])
    if task == "digits":
        done = run(accelerate(strategy, "--num_processes", str(num_processes), *words), cwd)
        assert done.code == 0, done.output
    else:
        train_forked(strategy, num_processes, cwd, *words[2:])
    checkpoints = cwd / "runs" / "it" / "checkpoints"
    name, manifest = list_checkpoints(checkpoints)[-1]
    return (
        manifest,
        load((checkpoints / name / "model.safetensors").read_bytes()),
        load((checkpoints / name / "optimizer.safetensors").read_bytes()),
    )


def train_forked(strategy: str, num_processes: int, cwd: Path, *words: str | Path) -> None:
    with ranks(num_processes, train_words, strategy, cwd, [str(word) for word in words]) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * num_processes


@pytest.mark.parametrize(
    ("strategy", "task"),
    [
        *product(("single", "fsdp2", "hsdp", "zero1", "zero2", "zero3"), ("digits", "byte_lm")),
        *product(("fsdp1",), ("byte_lm", "unclipped byte_lm")),
    ],
)
def test_losses_and_checkpoint_equal_ddp_when_strategy_is(strategy: str, task: str) -> None:
    num_processes = NUM_PROCESSES.get(strategy, 2)
    manifest, weights, moments = trained(strategy, task, num_processes)
    assert manifest.topology["strategy"] == strategy
    assert manifest.topology["world_size"] == str(num_processes)
    if strategy == "single":
        assert manifest.metrics["eval/loss"] < 0.9 * {"digits": 2.3, "byte_lm": 5.6}[task]  # it has learned
        return
    expected, expected_weights, expected_moments = trained("ddp", task, num_processes)
    for name in ("train/loss", "eval/loss", "train/grad_norm"):
        assert manifest.metrics[name] == pytest.approx(expected.metrics[name], rel=2e-3 if "grad" in name else 2e-4), (
            name
        )
    assert weights.keys() == expected_weights.keys()
    assert moments.keys() == expected_moments.keys()
    for mine, theirs in ((weights, expected_weights), (moments, expected_moments)):
        for name, tensor in theirs.items():
            torch.testing.assert_close(
                mine[name], tensor, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


# SGD, so that a gradient's length shows in the weights; a loss this large would be clipped to 1.
STEEP = (
    *("--config", ROOT / "configs/digits.yaml", "--run_name", "it", "--tracking.enabled", "false"),
    *("--task.class_path", "tests.distributed.tasks.Steep", "--trainer.max_steps", "1"),
    *("--trainer.max_grad_norm", "null", "--optimizer.class_path", "torch.optim.SGD"),
    *("--optimizer.init_args.lr", "0.5"),
)


def test_gradients_are_not_clipped_when_max_grad_norm_is_null(tmp_path: Path) -> None:
    weights = {}
    for strategy in ("ddp", "fsdp2", "zero2"):
        (cwd := tmp_path / strategy).mkdir()
        train_forked(strategy, 2, cwd, *STEEP)
        weights[strategy] = load_file(cwd / "runs/it/checkpoints/step-00000001/model.safetensors")
    for strategy in ("fsdp2", "zero2"):
        for key, tensor in weights["ddp"].items():
            torch.testing.assert_close(
                weights[strategy][key], tensor, rtol=1e-3, atol=1e-3, msg=lambda text, name=strategy: f"{name}: {text}"
            )


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_bf16_trains_with_fp32_optimizer_state_when_sharded(tmp_path: Path, strategy: str) -> None:
    words = ("--config", ROOT / "configs/byte_lm.yaml", "--run_name", "it", "--tracking.enabled", "false")
    train_forked(strategy, 2, tmp_path, *words, *TASKS["byte_lm"], "--trainer.mixed_precision", "bf16")
    ((name, manifest),) = list_checkpoints(tmp_path / "runs/it/checkpoints")
    assert manifest.metrics["train/loss"] < 5.5
    optimizer = load_file(tmp_path / "runs/it/checkpoints" / name / "optimizer.safetensors")
    assert {tensor.dtype for tensor in optimizer.values()} == {torch.float32}
    weights = load_file(tmp_path / "runs/it/checkpoints" / name / "model.safetensors")
    if strategy == "zero3":  # the weights are 16-bit, and their fp32 masters go along
        for key, tensor in weights.items():
            assert tensor.dtype == torch.bfloat16
            torch.testing.assert_close(optimizer[f"master.{key}"].bfloat16(), tensor, rtol=0, atol=0)
