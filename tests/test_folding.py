"""Folded scales: the model computes what it did, whatever the scales; unknown architectures are refused."""

import pytest
import torch
from pydantic import ValidationError
from training_set import tiny_bundle
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from compress.calibration.magnitudes import input_statistics
from compress.errors import UserError
from compress.layerwise.folding import apply_fold, find_folds, shared, stacked_weight
from compress.models.conv1d import linears
from compress.models.layers import matrix
from compress.passes.fold_scales import FoldScales
from compress.passes.prune_magnitude import PruneMagnitude

PLACES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama, a value head per query head": LlamaConfig(**SHAPE, num_key_value_heads=4),
    "mistral": MistralConfig(**GROUPED),
    "qwen2": Qwen2Config(**{**SHAPE, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "bert": BertConfig(**SHAPE),
}
IDS = torch.arange(24).view(2, 12) * 5 % 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(config):
    auto = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = linears(auto.from_config(config)).eval()
    for name, parameter in model.named_parameters():  # gains of 1 and biases of 0 would hide mistakes
        if parameter.dim() == 1:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator(len(name)))
            parameter.data.add_(noise)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_positive_scales_leave_the_function_as_it_was(config):
    model = make(config)
    before = logits(model)
    folds = find_folds(model, PLACES)
    expected = {"gpt2": 3, "bert": 1}.get(config.model_type, 4)
    assert len(folds) == expected * 2
    for number, fold in enumerate(folds):
        weight = stacked_weight(model, fold)
        scales = torch.rand(weight.shape[1], generator=generator(number)) * 4 + 0.25
        scales = shared(model, fold, scales, torch.mean)
        apply_fold(model, fold, scales)
        assert torch.allclose(stacked_weight(model, fold), weight * scales)
    after = logits(model)
    assert (after - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)


def test_heads_that_share_a_value_head_share_its_scales():
    model = make(CONFIGS["llama"])
    fold = next(f for f in find_folds(model, ("attention_out",)))
    values = torch.rand(64, generator=generator())
    tied = shared(model, fold, values, torch.amax).view(2, 2, 16)
    assert torch.equal(tied[:, 0], tied[:, 1])
    assert torch.equal(tied[:, 0], values.view(2, 2, 16).amax(1))
    other = next(f for f in find_folds(model, ("mlp_in",)))
    assert shared(model, other, values, torch.amax) is values


def test_an_architecture_whose_facts_are_unknown_is_refused():
    gemma = make(GemmaConfig(**{**SHAPE, "num_key_value_heads": 2, "head_dim": 16}))
    with pytest.raises(UserError, match="model_type 'gemma'.*known: bert, gpt2, llama"):
        FoldScales().layers(gemma)


def test_a_post_norm_encoder_has_no_norm_to_fold_into():
    assert FoldScales(places=("attention_in", "mlp_in")).layers(make(CONFIGS["bert"])) == []


def test_a_scale_that_is_not_positive_is_refused():
    model = make(CONFIGS["llama"])
    fold = find_folds(model, ("mlp_in",))[0]
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="not positive and finite"):
            apply_fold(model, fold, torch.full((32,), bad))


def test_a_model_that_is_not_built_as_its_type_says_is_refused(bundle, make_context):
    norm = bundle.model.model.layers[1].input_layernorm

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = norm.weight

        def forward(self, x):
            return torch.nn.functional.normalize(x, dim=-1) * (1 + self.weight)

    bundle.model.model.layers[1].input_layernorm = Other()
    with pytest.raises(UserError, match="changed the model's output.*leave fold_scales out"):
        FoldScales(betas=(0.5,))(bundle, make_context(bundle))


@pytest.mark.parametrize("betas", [(-0.1,), (0.5, 1.5), (float("nan"),), ()])
def test_a_beta_out_of_range_is_refused(betas):
    with pytest.raises(ValidationError, match="betas"):
        FoldScales(betas=betas)


def test_statistics_are_those_of_all_positions():
    model = make(CONFIGS["llama"])
    name = "model.layers.1.mlp.down_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    logits(model)
    handle.remove()
    x = seen[0].flatten(0, 1)
    found = input_statistics(model, IDS, [name], samples=6, batch=1)[name]
    assert found.count == 24
    assert torch.allclose(found.mean, x.abs().mean(0), atol=1e-6)
    assert torch.allclose(found.largest, x.abs().amax(0), atol=1e-6)
    sample = torch.cat(found.sample)
    assert sample.shape == (6, 48)
    assert torch.allclose(sample, x[[0, 4, 8, 12, 16, 20]], atol=1e-6)
    assert not model.get_submodule(name)._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "step",
    [
        FoldScales(),
        FoldScales(betas=(0.25,)),
        FoldScales(method="smoothquant"),
        FoldScales(method="smoothquant", inputs="rms"),
    ],
    ids=["awq", "awq at 0.25", "smoothquant", "smoothquant by rms"],
)
def test_the_pass_changes_weights_and_no_outputs_and_keeps_masks(step, family, make_context):
    bundle = tiny_bundle(family=family)
    bundle = PruneMagnitude(sparsity=0.4)(bundle, make_context(bundle))
    result = step(bundle, make_context(bundle))
    assert result.notes["output_change"] < 1e-5
    changed = [
        name
        for name, old in bundle.model.state_dict().items()
        if not torch.equal(old, result.model.state_dict()[name])
    ]
    named = {name.rpartition(".")[0] for name in changed}
    assert named
    assert named <= set(step.layers(bundle.model))
    for name, mask in bundle.masks.items():
        assert torch.equal(matrix(result.model.get_submodule(name)) != 0, mask)
    if len(step.betas) > 1 and step.method == "awq":
        assert result.notes["mean_error_ratio"] <= 1
