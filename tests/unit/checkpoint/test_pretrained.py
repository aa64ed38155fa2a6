"""What we write is what transformers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig


@pytest.mark.parametrize("max_shard_size", [None, "10KB"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_same_logits_come_out_when_transformers_loads_a_checkpoint(
    tmp_path: Path, kind: str, max_shard_size: str | None
) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "bos_token_id": 0, "eos_token_id": 1}
    model: torch.nn.Module
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=12, n_layer=2, n_head=2, **sizes))
    else:
        widths = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **widths, **sizes))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = model.config
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.arange(8)[None]
    checkpoint = CheckpointConfig(save_last=False, max_shard_size=max_shard_size)
    tracking = TrackingConfig(enabled=False)
    with PeriodicLogger(
        accelerator, None, run_dir=tmp_path, run_name="it", checkpoint=checkpoint, tracking=tracking
    ) as logger:
        logger.watch(model, optimizer)
        accelerator.backward(model(tokens, labels=tokens).loss)
        optimizer.step()
        assert logger.save()  # outside of batches(): at once
    (directory,) = (tmp_path / "it/checkpoints").iterdir()
    config.save_pretrained(directory)
    loaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert (len(list(directory.glob("model-*.safetensors"))) > 1) == (max_shard_size is not None)
    model.eval()
    torch.testing.assert_close(loaded.eval()(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_checkpoint_is_of_the_whole_step_when_asked_for_between_accumulated_batches(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, data = torch.nn.Linear(4, 4), torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    checkpoint = CheckpointConfig(save_last=False, when_busy="wait")
    tracking = TrackingConfig(enabled=False)
    expected = {}
    with PeriodicLogger(
        accelerator, None, run_dir=tmp_path, run_name="it", checkpoint=checkpoint, tracking=tracking
    ) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(1):
            for position, batch in enumerate(logger.batches(data)):
                with accelerator.accumulate(model):
                    accelerator.backward(model(batch).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
                if position in (4, 7):  # in the middle of the second step, and of the third
                    assert logger.save()
                if position in (5, 8):
                    expected[logger.step + 1] = model.weight.detach().clone()
    assert sorted(path.name for path in (tmp_path / "it/checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert set(expected) == {2, 3}
    for step, weight in expected.items():
        saved = load_file(tmp_path / f"it/checkpoints/step-{step:08d}/model.safetensors")
        assert torch.equal(saved["weight"], weight)
