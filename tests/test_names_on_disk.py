"""Families whose files name tensors otherwise than their modules: every pass that streams takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_helpers import DATA, invoke, write_recipe, write_text
from safetensors.torch import load_file, save_file
from training_set import tiny_bundle
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from compress.artifact.bundle import Bundle

IDS = torch.arange(3, 43)[None]
SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("GPTNeoX", {"tie_word_embeddings": False}),
    "bert": ("Bert", {"architectures": ["BertForMaskedLM"]}),
    "nomic": ("NomicBert", {"architectures": ["NomicBertForMaskedLM"]}),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "olmoe": ("Olmoe", EXPERTS),
}
PASSES = {
    "int8": [{"quantize_round": {"format": "int8"}}],
    "hqq": ["quantize_hqq"],
    "gptq": [{"quantize_gptq": {"format": {"kind": "int4", "group": 32}}}],
    "wanda": [{"prune_wanda": {"sparsity": 0.5}}],
}


def stored(kind: str, folder: Path) -> Any:
    """A checkpoint as it lies on a hub; the model that stock transformers makes of it."""
    family, changes = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**SHAPE, **changes)
    loader = AutoModelForMaskedLM if "architectures" in changes else AutoModelForCausalLM
    torch.manual_seed(0)
    loader.from_config(config).save_pretrained(folder)
    tiny_bundle().tokenizer.save_pretrained(folder)
    if kind == "bert":  # as the first checkpoints of 2018 name them
        file = folder / "model.safetensors"
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = load_file(file)
        for new, name in old.items():
            state = {key.replace(new, name): value for key, value in state.items()}
        save_file(state, file, metadata={"format": "pt"})
    return loader.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_that_streams_takes_it(kind, tmp_path):
    stock = stored(kind, tmp_path / "m")
    model = Bundle.load(tmp_path / "m", stream=True).model
    if not any(parameter.is_meta for parameter in model.parameters()):
        assert torch.equal(logits(model), logits(stock))
    recipe = write_recipe(
        tmp_path / "r.yaml",
        write_text(tmp_path / "text"),
        model={"checkpoint": str(tmp_path / "m")},
        data={"text": str(tmp_path / "text"), **DATA},
        base=[],
        variants=PASSES,
    )
    done = invoke("run", recipe, "-o", tmp_path / "run", "--no-measure")
    assert done.code == 0, done.err
    expected = logits(stock).log_softmax(-1)
    for variant, most in (("base", 1e-9), ("int8", 1e-3)):
        found = logits(Bundle.load(tmp_path / "run" / variant).model).log_softmax(-1)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) < most
    again = type(stock).from_pretrained(tmp_path / "run" / "wanda")
    zeros = [bool((p == 0).float().mean() > 0.4) for _, p in again.named_parameters() if p.ndim >= 2]
    assert any(zeros)
