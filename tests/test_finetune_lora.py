"""Adapters: trained and merged by the pass, or read from a file and merged when a model is loaded."""

import json
import sys

import peft
import pytest
import torch
from labelled_examples import context_of, encoder, labelled
from safetensors.torch import load_file, save_file
from training_set import documents, equal, tiny_bundle, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from compress.artifact.bundle import Bundle
from compress.errors import MissingExtra, UserError
from compress.models import adapters
from compress.passes.finetune import Finetune
from compress.passes.quantize_round import QuantizeRound
from compress.run.pipeline import make
from compress.run.preflight import preflight
from compress.run.recipe import Recipe
from compress.training import checkpoint

# stock peft's own call of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS = {"epochs": 4, "batch": 8, "learning_rate": 3e-3, "heldout_points": 2, "stop_by": "loss"}


def tuned(bundle, folder, data=None, **settings):
    step = Finetune(**{**STEPS, "lora": {"rank": 4, "alpha": 8}, **settings})
    return step(bundle, context_of(bundle, folder, data or labelled(bundle)))


def test_adapters_are_merged_into_an_ordinary_model(tmp_path):
    bundle = encoder()
    before = weights(bundle)
    result = tuned(bundle, tmp_path / "work")
    assert equal(before, weights(bundle))
    after = weights(result)
    inside = {n for n in after if ".layer." in n and n.endswith("weight") and "LayerNorm" not in n}
    assert len(inside) == 6 * 2
    for name, value in after.items():
        if name in inside:
            moved = value - before[name]
            assert 0 < torch.linalg.matrix_rank(moved, atol=1e-5) <= 4, name
        elif name in before:
            assert torch.equal(value, before[name]), name  # the rest of the body stays
        else:
            assert name.startswith(("classifier.", "bert.pooler."))
    assert all(p.requires_grad for p in result.model.parameters())
    assert not hasattr(result.model, "peft_config")
    assert result.notes["lora"]["layers"] == 12
    assert result.notes["heldout_after"] < result.notes["heldout_before"]
    assert result.notes["parameters"] == sum(p.numel() for p in result.model.parameters())
    result.save(tmp_path / "saved")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, result.model(ids).logits)


def test_merging_equals_stock_pefts(tmp_path, monkeypatch):
    kept = {}
    merge = adapters.merged

    def watched(tuner):
        kept.update({n: p.detach().clone() for n, p in tuner.model.named_parameters()})
        return merge(tuner)

    monkeypatch.setattr(adapters, "merged", watched)
    bundle = encoder()
    result = weights(tuned(bundle, tmp_path))
    for name in [
        n.removesuffix(".lora_A.default.weight") for n in kept if n.endswith("lora_A.default.weight")
    ]:
        a, b = (kept[f"{name}.lora_{side}.default.weight"] for side in "AB")
        expected = weights(bundle)[f"{name}.weight"].double() + 8 / 4 * b.double() @ a.double()
        torch.testing.assert_close(result[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_targets_are_chosen_by_wildcards(tmp_path):
    bundle = encoder()
    settings = {"rank": 2, "targets": ("*.query", "*.value")}
    after = weights(tuned(bundle, tmp_path, lora=settings))
    moved = {n for n, v in weights(bundle).items() if n in after and not torch.equal(after[n], v)}
    assert moved == {
        f"bert.encoder.layer.{i}.attention.self.{n}.weight" for i in (0, 1) for n in ("query", "value")
    }
    with pytest.raises(
        UserError, match=r"finetune.lora.targets: \['q_proj'\] fits no linear layer in the blocks"
    ):
        Finetune(lora={"targets": ("q_proj",)}).layers(bundle.model)


def test_pruned_weights_stay_zero_and_it_is_told_what_that_cost(tmp_path):
    bundle, name = encoder(), "bert.encoder.layer.0.intermediate.dense"
    mask = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    result = tuned(bundle.evolve(masks={name: mask}), tmp_path, lora={"rank": 4, "targets": (name,)})
    assert torch.equal(result.model.get_submodule(name).weight != 0, mask)
    told = result.notes["lora"]
    assert 0.2 < told["masked_share"] < 0.8  # half of the weights
    assert {"heldout_before_masking"} < set(told)


def test_killed_it_ends_with_the_same_bytes_and_keeps_little(tmp_path, monkeypatch):
    bundle = encoder()
    settings = {"checkpoint_seconds": 0.0, "average": "ema", "patience": 50}
    whole = tuned(bundle, tmp_path / "whole", **settings)
    save, calls = checkpoint.save, []

    def interrupted(*arguments):
        save(*arguments)
        calls.append(arguments[3]["step"])
        if len(calls) % 6 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    for _ in range(5):
        try:
            result = tuned(bundle, tmp_path / "cut", **settings)
            break
        except KeyboardInterrupt:
            continue
    assert calls == list(range(1, 20))
    assert equal(weights(whole), weights(result))
    held = {n for n in load_file(tmp_path / "cut" / "training.safetensors") if n.startswith("model.")}
    assert all("lora_" in n or "classifier" in n or "pooler" in n for n in held)


def stock_adapter(bundle, folder, **settings):
    """One that stock peft made, with random matrices, of the model in `folder/base`."""
    bundle.save(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    tuner = peft.get_peft_model(model, peft.LoraConfig(**given))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuner.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuner.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def stock_merged(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"modules_to_save": ["norm"], "layers_to_transform": [1, 2]},
    ],
)
def test_an_adapter_is_merged_as_stock_peft_merges_it(settings, tmp_path):
    base, adapter = stock_adapter(tiny_bundle(), tmp_path, **settings)
    found, right = weights(Bundle.load(base, adapter=adapter)), stock_merged(base, adapter)
    assert not equal(found, weights(Bundle.load(base)))
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_matrices_that_lie_turned_are_merged_too(tmp_path):
    bundle = tiny_bundle(family="gpt2", kv_heads=None)
    base, adapter = stock_adapter(bundle, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    right, found = stock_merged(base, adapter), Bundle.load(base, adapter=adapter)
    found.save(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in right.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


def changed(adapter, settings=None, tensors=None):
    """The adapter with some settings or tensors changed."""
    config = json.loads((adapter / adapters.SETTINGS).read_text())
    (adapter / adapters.SETTINGS).write_text(json.dumps({**config, **(settings or {})}))
    if tensors is not None:
        save_file(tensors(load_file(adapter / adapters.WEIGHTS)), adapter / adapters.WEIGHTS)


def renamed(old, new):
    return lambda found: {name.replace(old, new): tensor for name, tensor in found.items()}


def narrower(found):
    return {n: t[:, :-1].contiguous() if "lora_A" in n else t for n, t in found.items()}


@pytest.mark.parametrize(
    ("settings", "tensors", "told"),
    [
        ({}, renamed("layers.3", "layers.9"), r"'model.layers.9.mlp.down_proj', which is no linear layer"),
        ({}, narrower, r"4 x 63 and 32 x 4 for 'model.layers.0.mlp.down_proj', which is 32 x 64 in"),
        ({}, lambda f: {**f, "base_model.model.score.weight": torch.zeros(2, 32)},
         r"holds 'score.weight' 2 x 32, and this model none \(it was made for"),
        ({}, lambda f: {**f, "other": torch.zeros(2)}, "'other' is no part of an adapter"),
        ({}, lambda f: {n: t.long() for n, t in f.items()}, "is of I64"),
        ({}, lambda f: {n: t * torch.nan for n, t in f.items()}, "are NaN or infinite"),
        ({}, lambda f: {}, "holds no tensors"),
        ({"peft_type": "PREFIX_TUNING"}, None, "peft_type is 'PREFIX_TUNING'; LORA alone is merged"),
        ({"megatron_config": {"a": 1}}, None, "'megatron_config' is set, which is not merged here"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa', which changes the base"),
        ({"r": 3}, None, "cannot be put on this model"),
        ({"r": "x"}, None, "a rank of 'x', where the tensors have 4 at most"),
        ({"r": 10**9}, None, "a rank of 1000000000, where"),
        ({"rank_pattern": {"(a+)+": 4}}, None, r"rank_pattern is {'\(a\+\)\+': 4}; names of modules"),
        ({"alpha_pattern": [1]}, None, r"alpha_pattern is \[1\]; names of modules"),
        ({"lora_alpha": "x"}, None, "cannot be put on this model"),
        ({"lora_alpha": 1e300}, None, "are NaN or infinite"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(settings, tensors, told, tmp_path):
    base, adapter = stock_adapter(tiny_bundle(), tmp_path)
    changed(adapter, settings, tensors)
    with pytest.raises(UserError, match=told) as refused:
        Bundle.load(base, adapter=adapter)
    assert "\n" not in str(refused.value)


def test_pickles_are_refused_and_a_lone_adapter_says_where_it_belongs(tmp_path):
    base, adapter = stock_adapter(tiny_bundle(), tmp_path)
    with pytest.raises(UserError, match="goes on top of another model.*model: {checkpoint: BASE, adapter: "):
        Bundle.load(adapter)
    (adapter / adapters.WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin: pickled weights are refused"):
        Bundle.load(base, adapter=adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: is missing"):
        Bundle.load(base, adapter=adapter)
    with pytest.raises(UserError, match="holds no adapter_config.json, so it is no adapter"):
        Bundle.load(base, adapter=tmp_path)


def test_a_recipe_merges_an_adapter_and_knows_it_by_its_files(tmp_path):
    bundle = tiny_bundle()
    base, adapter = stock_adapter(bundle, tmp_path)
    (tmp_path / "my.txt").write_text("".join(d.text for d in documents()))
    content = {
        "name": "merged",
        "model": {"checkpoint": str(base), "adapter": str(adapter)},
        "data": {
            "text": str(tmp_path / "my.txt"),
            "window": 32,
            "evaluation_windows": 4,
            "heldout_windows": 2,
        },
    }
    recipe = Recipe.parse(content)
    preflight(recipe, tmp_path / "run", measured=False)
    said = []
    make(recipe, tmp_path / "run", said.append)
    found = Bundle.load(tmp_path / "run" / "base")
    assert equal(weights(found), weights(Bundle.load(base, adapter=adapter)))
    assert found.lineage.source == f"{base} with {adapter} merged"
    assert found.lineage.steps[0].config == {"checkpoint": str(base), "adapter": str(adapter)}
    done = len(said)
    make(recipe, tmp_path / "run", said.append)
    assert len(said) == done  # nothing is made again
    changed(adapter, tensors=lambda f: {n: 2 * t for n, t in f.items()})
    make(recipe, tmp_path / "run", said.append)
    assert len(said) > done
    assert not equal(weights(found), weights(Bundle.load(tmp_path / "run" / "base")))
    changed(adapter, tensors=narrower)
    with pytest.raises(UserError, match="adapter: .* has matrices 4 x 63"):
        preflight(recipe, tmp_path / "run", measured=False)
    alone = {**content, "model": {"create": {"preset": "1m"}, "adapter": str(adapter)}}
    with pytest.raises(UserError, match=r"adapter: '.*' goes on a checkpoint; give the one it was made for"):
        Recipe.parse(alone)


def test_another_pass_is_taught_by_the_model_with_its_adapter(tmp_path):
    base, adapter = stock_adapter(tiny_bundle(), tmp_path)
    loaded, taught = Bundle.load(base, adapter=adapter), []

    class Step(QuantizeRound):
        def __call__(self, bundle, context):
            taught.append(context.teacher())
            return bundle

    loaded.apply(Step())
    assert equal(weights(taught[0]), weights(loaded))


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"finetune.lora needs the package 'peft'.*in the extra 'lora'"):
        Finetune(lora={}).layers(encoder().model)


def test_what_is_pruned_stays_zero_and_codes_take_no_adapter(tmp_path):
    name, bundle = "model.layers.1.self_attn.q_proj", tiny_bundle()
    base, adapter = stock_adapter(bundle, tmp_path)
    mask = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        bundle.model.get_submodule(name).weight.masked_fill_(~mask, 0)
    bundle.evolve(masks={name: mask}).save(tmp_path / "pruned")
    found = Bundle.load(tmp_path / "pruned", adapter=adapter)
    whole = weights(Bundle.load(base, adapter=adapter))[f"{name}.weight"]
    torch.testing.assert_close(found.model.get_submodule(name).weight, whole * mask)
    bundle.apply(QuantizeRound(format="int8")).save(tmp_path / "codes")
    with pytest.raises(UserError, match="which is no linear layer of this model"):
        Bundle.load(tmp_path / "codes", adapter=adapter)
