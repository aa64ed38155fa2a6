"""A run begins with the weights of somebody else's directory, and says what was not in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.errors import CheckpointError, ConfigError


@pytest.fixture
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=19, n_positions=8, n_embd=12, n_layer=2, n_head=2))

    return make


def begin(tmp_path: Path, model: torch.nn.Module, weights: Path, name: str = "run") -> None:
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with PeriodicLogger(
        accelerator,
        None,
        run_dir=tmp_path,
        run_name=name,
        checkpoint=CheckpointConfig(save_last=False),
        tracking=TrackingConfig(enabled=False),
        initial_weights=str(weights),
    ) as logger:
        logger.watch(prepared, optimizer)


@pytest.mark.parametrize("max_shard_size", ["5GB", "5KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_directory_when_a_run_begins(
    tmp_path: Path, gpt2: Any, max_shard_size: str, dtype: torch.dtype
) -> None:
    source = gpt2(1).to(dtype)
    source.save_pretrained(tmp_path / "hub", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "hub").glob("*.safetensors"))) > 1) == (max_shard_size == "5KB")
    model = gpt2(2)
    begin(tmp_path, model, tmp_path / "hub")
    for (name, mine), theirs in zip(model.named_parameters(), source.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float()), name


def test_names_are_listed_when_they_differ(tmp_path: Path, gpt2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2(1).save_pretrained(tmp_path / "hub")
    path = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.ln_f.bias"]
    tensors["pooler.weight"] = torch.ones(2)
    save_file(tensors, path)
    model = gpt2(2)
    before = model.transformer.ln_f.bias.detach().clone() + 0.5
    model.transformer.ln_f.bias.data.copy_(before)
    begin(tmp_path, model, tmp_path / "hub")
    told = capsys.readouterr().err
    assert "1 tensors are missing, and stay as they were: transformer.ln_f.bias" in told
    assert "1 tensors are not in the model, and left out: pooler.weight" in told
    assert torch.equal(model.transformer.ln_f.bias, before)


def test_error_names_both_sides_when_nothing_fits(tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"none of the model's names; it has other\.weight, and the model weight"):
        begin(tmp_path, torch.nn.Linear(2, 2), tmp_path)


def test_error_has_the_tensor_when_the_vocabulary_is_another(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(7, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight: has shape \[7, 3\] .* and \[5, 3\]"):
        begin(tmp_path, torch.nn.Embedding(5, 3), tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({}, CheckpointError, "has 0 safetensors files"),
        ({"model.safetensors": b"\x00" * 4}, CheckpointError, "header would end"),
        ({"model.safetensors.index.json": b"[]"}, CheckpointError, "cannot be read"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'}, CheckpointError, "in other directories"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b"}}'}, CheckpointError, "No such file"),
        (None, ConfigError, "is no directory"),
    ],
)
def test_error_has_the_file_when_there_are_no_weights(
    tmp_path: Path, files: dict[str, bytes] | None, error: type[Exception], said: str
) -> None:
    directory = tmp_path / "hub"
    if files is not None:
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_bytes(content)
    with pytest.raises(error, match=said):
        begin(tmp_path, torch.nn.Linear(2, 2), directory)


def test_own_checkpoint_is_gone_on_from_when_there_is_one(tmp_path: Path) -> None:
    save_file({"weight": torch.full((1, 1), 5.0), "bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    found = []
    for _ in range(2):
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(1, 1)
        loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with PeriodicLogger(
            accelerator,
            None,
            run_dir=tmp_path,
            run_name="run",
            checkpoint=CheckpointConfig(save_last=False),
            tracking=TrackingConfig(enabled=False),
            initial_weights=str(tmp_path),
        ) as logger:
            logger.watch(prepared, optimizer)
            found.append(model.weight.item())
            for _ in logger.epochs(1):
                for _ in logger.batches(loader):
                    model.weight.data.fill_(7.0)
                assert logger.save() == (len(found) == 1)  # then it is there already
    assert found == [5.0, 7.0]
