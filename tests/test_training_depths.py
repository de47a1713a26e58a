"""What learns by its depth: only the last blocks, one block after the other, at rates that fall."""

import pytest
import torch
import transformers
from export_models import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from seq2seq_models import tiny_seq2seq
from torch import nn
from training_set import WINDOW, equal, tiny_bundle, tiny_context, weights

from compress.errors import UserError
from compress.passes.train import Train
from compress.training import checkpoint, depths
from compress.training.gradients import Gradients, centralise
from compress.training.optimizers import split

STEPS = {"tokens": 10 * 4 * WINDOW, "batch": 4, "heldout_points": 2}
TOP = 5  # of four blocks


def level(name):
    """By hand, of the tied Llama."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) + 1
    return {"model.embed_tokens.weight": 0, "model.norm.weight": TOP}[name]


def test_levels_follow_the_order_of_the_forward_pass():
    model = tiny_bundle().model
    assert depths.levels(model) == {name: level(name) for name, _ in model.named_parameters()}
    with torch.device("meta"):
        assert depths.levels(type(model)(model.config)) == depths.levels(model)
    # OPT registers its last norm before its blocks
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2}
    config = transformers.OPTConfig(**sizes, num_attention_heads=2, word_embed_proj_dim=16)
    found = depths.levels(transformers.OPTForCausalLM(config))
    assert {found[f"model.decoder.final_layer_norm.{n}"] for n in ("weight", "bias")} == {3}
    assert found["model.decoder.embed_positions.weight"] == 0
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    found = depths.levels(transformers.BertForSequenceClassification(config))
    assert {v for n, v in found.items() if n.startswith("bert.embeddings.")} == {0}
    assert {v for n, v in found.items() if n.startswith(("classifier.", "bert.pooler."))} == {3}


def test_a_decoder_comes_after_its_encoder():
    model = tiny_seq2seq("t5").model
    found, names = depths.levels(model), list(dict(model.named_parameters()))
    encoder = model.config.num_layers
    top = encoder + model.config.num_decoder_layers + 1
    assert found["shared.weight"] == 0
    assert found["encoder.final_layer_norm.weight"] == encoder
    assert found["decoder.final_layer_norm.weight"] == top
    assert {found[n] for n in names if n.startswith("decoder.block.0.")} == {encoder + 1}


def run(tmp_path, name="run", bundle=None, **settings):
    bundle = bundle or tiny_bundle()
    return Train(**{**STEPS, **settings})(bundle, tiny_context(bundle, tmp_path / name))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_only_the_last_blocks_learn(count, tmp_path):
    before, after = weights(tiny_bundle()), weights(run(tmp_path, last_blocks=count))
    for name, value in after.items():
        still = name == "lm_head.weight" or level(name) <= 4 - count  # the head is tied
        assert torch.equal(value, before[name]) == still, name


def test_more_blocks_than_there_are_or_nothing_left_is_refused():
    model = tiny_bundle().model
    with pytest.raises(UserError, match=r"^last_blocks: 5, but the model has 4 blocks; take at most 4$"):
        Train(last_blocks=5).layers(model)
    freeze = ("model.layers.3", "model.norm")
    with pytest.raises(UserError, match=r"^last_blocks: 1 with freeze: \[.*\] leaves nothing to train"):
        Train(last_blocks=1, freeze=freeze).layers(model)
    Train(last_blocks=2, freeze=freeze).layers(model)


@pytest.fixture
def watched(monkeypatch):
    """Calls `watched[0](model, gradients, step)` when the gradients of a step are ready."""
    begin, prepare, models, watchers = Gradients.__init__, Gradients.prepare, {}, [lambda *_: None]

    def beginning(self, model, *others):
        models[id(self)] = model
        begin(self, model, *others)

    def prepared(self, step, dropped):
        prepare(self, step, dropped)
        watchers[0](models[id(self)], self, step)

    monkeypatch.setattr(Gradients, "__init__", beginning)
    monkeypatch.setattr(Gradients, "prepare", prepared)
    return watchers


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd", "adam", "adagrad", "rmsprop"])
def test_a_block_is_as_it_was_until_its_turn(optimizer, tmp_path, watched):
    """Bit by bit, whatever decay and momentum would do."""
    before = dict(tiny_bundle().model.named_parameters())
    begins = {5: 0, 4: 2, 3: 4, 2: 5, 1: 7, 0: 8}  # of 10 steps: five portions over the first 8

    def watch(model, _, step):
        for name, parameter in model.named_parameters():
            begun = begins[level(name)]
            assert (parameter.grad is not None) == (begun <= step), (step, name)
            assert torch.equal(parameter, before[name]) == (step <= begun), (step, name)

    watched[0] = watch
    run(tmp_path, optimizer=optimizer, unfreeze=0.8, weight_decay=0.1, learning_rate=1e-3, warmup=0)


def test_rates_fall_by_the_factor_per_level():
    model = tiny_bundle().model
    found = depths.decays(depths.levels(model), 0.8)
    assert found == {name: 0.8 ** (TOP - level(name)) for name, _ in model.named_parameters()}


def test_layer_decay_scales_the_steps_beside_slower(tmp_path):
    """SGD without momentum, one step, no clipping: the update is the factor times as long."""
    plain = {"tokens": 4 * WINDOW, "optimizer": "sgd", "momentum": 0, "clip": 1e9, "learning_rate": 1.0,
             "schedule": "constant", "warmup": 0, "heldout_points": 1}  # fmt: skip
    slower = ({"modules": "model.layers.1", "factor": 0.5},)
    before = weights(tiny_bundle())
    whole = weights(run(tmp_path, "a", **plain))
    decayed = weights(run(tmp_path, "b", **plain, layer_decay=0.5, slower=slower))
    for name, value in before.items():
        own = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        factor = 0.5 ** (TOP - level(own)) * (0.5 if own.startswith("model.layers.1.") else 1)
        torch.testing.assert_close(
            decayed[name] - value, factor * (whole[name] - value), rtol=1e-3, atol=1e-6
        )


@given(rows=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_centralised_gradients_have_no_mean_over_the_inputs(rows, columns, seed, share):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(rows, columns, generator=generator)
    dropped = torch.rand(rows, columns, generator=generator) < share
    plain, pruned = gradient.clone(), gradient.masked_fill(dropped, 0)
    centralise(plain)
    torch.testing.assert_close(plain, gradient - gradient.mean(1, keepdim=True))
    before = pruned.clone()
    centralise(pruned, dropped)
    assert not pruned[dropped].any()
    for row, own, kept in zip(pruned, before, ~dropped, strict=True):
        torch.testing.assert_close(row[kept], own[kept] - (own[kept].mean() if kept.any() else 0))


def test_only_matrices_in_linear_layers_are_centralised(tmp_path, watched):
    found = {}
    watched[0] = lambda model, own, _: found.update({id(p): p.grad.mean(1).abs().max() for p in own.matrices})
    centralised = run(tmp_path, "a", centralise=True)
    assert len(found) == 7 * 4 == len(split(tiny_bundle().model)[0])
    assert max(found.values()) < 1e-6
    assert not equal(weights(centralised), weights(run(tmp_path, "b")))


def test_dropout_is_changed_while_it_trains_and_put_back(tmp_path, watched):
    with pytest.raises(UserError, match="dropout: LlamaForCausalLM has no dropout layer whose share"):
        Train(dropout=0.3).layers(tiny_bundle().model)

    def shares(model):
        return {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}

    seen, bundle = [], tiny_bundle(family="gpt2", kv_heads=None)
    watched[0] = lambda model, *_: seen.append(shares(model))
    result = run(tmp_path, bundle=bundle, dropout=0.3)
    assert set(seen[-1].values()) == {0.3}
    assert shares(result.model) == shares(bundle.model)
    assert set(shares(bundle.model).values()) != {0.3}


@pytest.mark.parametrize(
    "settings",
    [
        {"unfreeze": 0.7, "layer_decay": 0.8, "optimizer": "adagrad", "schedule": "polynomial"},
        {"last_blocks": 2, "centralise": True, "optimizer": "rmsprop", "schedule": "exponential"},
        {"unfreeze": 0.5, "optimizer": "adam", "learning_rate": 1e-3, "average": "ema"},
    ],
)
def test_interrupted_it_ends_with_the_same_bytes(settings, tmp_path, monkeypatch):
    settings = {**settings, "checkpoint_seconds": 0.0}
    whole = run(tmp_path, "whole", **settings)
    save, calls = checkpoint.save, []

    def interrupted(*arguments):
        save(*arguments)
        calls.append(arguments[3]["step"])
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    for _ in range(5):
        try:
            result = run(tmp_path, "cut", **settings)
            break
        except KeyboardInterrupt:
            continue
    assert calls == list(range(1, 10))
    assert equal(weights(whole), weights(result))
    assert Train(**settings).deciding("float32") != Train(**STEPS).deciding("float32")
