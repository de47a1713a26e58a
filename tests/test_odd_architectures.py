"""Sizes in a text_config, states that are no keys and values, blocks that return tuples: right or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cli_helpers import DATA, invoke, refused, write_recipe, write_text
from training_set import tiny_bundle

from compress.artifact.bundle import Bundle
from compress.runtimes.torch_runtime import TorchRuntime

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, **ENDS}
TEXT = {
    **SMALL, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "sliding_window": 16, "max_position_embeddings": 256,
}  # fmt: skip
PICTURES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
STATES: dict[str, dict[str, Any]] = {
    "Mamba": {**SMALL, "state_size": 8},
    "Mamba2": {**SMALL, "state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    "FalconMamba": {**SMALL, "state_size": 8},
    "RecurrentGemma": {
        **SMALL, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4, "lru_width": 64,
        "attention_window_size": 32,
    },
    "Rwkv": {**SMALL, "context_length": 128, "attention_hidden_size": 64},
}  # fmt: skip


def saved(model: Any, folder: Path) -> Any:
    """The model as stock transformers loads it from where it was saved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # at its small random start logits hardly differ
            if parameter.dim() == 2 and parameter.shape[-1] > 4:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    tiny_bundle().tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def states(family: str, folder: Path) -> Any:
    config = getattr(transformers, f"{family}Config")(**STATES[family])
    return saved(getattr(transformers, f"{family}ForCausalLM")(config), folder)


def pictures(folder: Path) -> Any:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT).to_dict(),
        vision_config=PICTURES,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return saved(transformers.Gemma3ForConditionalGeneration(config), folder)


def recipe(tmp_path: Path, *passes: Any) -> Path:
    text = write_text(tmp_path / "text")
    return write_recipe(
        tmp_path / "r.yaml",
        text,
        model={"checkpoint": str(tmp_path / "m")},
        data={"text": str(text), **DATA},
        base=[],
        variants={f"v{number}": [step] for number, step in enumerate(passes)},
    )


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("family", STATES)
def test_a_text_goes_on_as_if_it_were_read_at_once(family, tmp_path):
    stock = states(family, tmp_path / "m")
    runtime = TorchRuntime(tmp_path / "m", threads=1)
    ids = np.random.default_rng(0).integers(1, 300, (2, 40))
    expected = logits(stock, ids)
    assert np.allclose(runtime.logits(ids), expected, atol=1e-4)
    state = runtime.prefill(ids[:, :30])
    for at in range(30, 40):
        assert np.allclose(state.logits, expected[:, at - 1], atol=1e-3), at
        state = runtime.decode(state, ids[:, at])
    assert np.allclose(state.logits, expected[:, -1], atol=1e-3)
    assert invoke("generate", tmp_path / "m", "--prompt", "The model", "--tokens", 4).code == 0


@pytest.mark.parametrize("family", [name for name in STATES if name != "Rwkv"])
def test_passes_take_them(family, tmp_path):
    stock = states(family, tmp_path / "m")
    file = recipe(tmp_path, {"quantize_round": {"format": "int8"}}, {"quantize_gptq": {"format": "int8"}})
    done = invoke("run", file, "-o", tmp_path / "run", "--no-measure")
    assert done.code == 0, done.err
    ids = np.random.default_rng(0).integers(1, 300, (1, 40))
    expected = torch.from_numpy(logits(stock, ids)).log_softmax(-1)
    for variant in ("v0", "v1"):
        found = TorchRuntime(tmp_path / "run" / variant, threads=1).logits(ids)
        found = torch.from_numpy(found).log_softmax(-1)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.01


def test_blocks_that_pass_on_a_state_are_refused_before_any_work(tmp_path):
    states("Rwkv", tmp_path / "m")
    file = recipe(tmp_path, "quantize_gptq")
    for more in ((), ("--dry-run",)):
        line = refused("run", file, "-o", tmp_path / "run", *more)
        assert "variants.v0.passes.0.quantize_gptq: the blocks of 'rwkv' are not run one by one" in line


def test_a_model_that_also_sees_pictures(tmp_path):
    stock = pictures(tmp_path / "m")
    file = recipe(
        tmp_path,
        {"quantize_round": {"format": "int8"}},
        {"quantize_gptq": {"format": "int8"}},
        {"prune_wanda": {"sparsity": 0.5}},
        {"quantize_auto": {"bits_per_weight": 6}},
    )
    done = invoke("run", file, "-o", tmp_path / "run", "--no-measure")
    assert done.code == 0, done.err
    ids = np.random.default_rng(0).integers(8, 300, (1, 40))
    expected = torch.from_numpy(logits(stock, ids)).log_softmax(-1)
    for variant, most in (("base", 1e-9), ("v0", 0.01), ("v1", 0.01)):
        found = torch.from_numpy(logits(Bundle.load(tmp_path / "run" / variant).model, ids)).log_softmax(-1)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) < most
    # the part that sees is as it was
    seeing = {n: p for n, p in stock.named_parameters() if "vision" in n}
    kept = dict(Bundle.load(tmp_path / "run" / "v1").model.named_parameters())
    assert all(torch.equal(kept[name], weight) for name, weight in seeing.items())


@pytest.mark.parametrize(
    "step", [{"prune_structured": {"neurons": 0.5}}, {"prune_vocabulary": {"text": ["stdlib"]}}]
)
def test_sizes_in_a_part_of_the_configuration_are_not_changed(step, tmp_path):
    pictures(tmp_path / "m")
    line = refused("run", recipe(tmp_path, step), "-o", tmp_path / "run", "--dry-run")
    assert "lie in its text_config, where they are not changed" in line
