"""A transposed layer comes in as a Linear and is stored as it was: GPT-2 from stock to stock."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
import training_set
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from compress.artifact.bundle import Bundle
from compress.artifact.sparse import SPARSE
from compress.models.checkpoints import meta_model
from compress.models.conv1d import StoredTransposed, linears
from compress.models.layers import linear_layers, matrix
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_structured import PruneStructured
from compress.passes.prune_wanda import PruneWanda
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse
from compress.passes.student import Student
from compress.passes.train import Train
from compress.records.manifest import Lineage

IDS = torch.arange(5, 29)[None]
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture
def gpt2() -> Bundle:
    return training_set.tiny_bundle(family="gpt2")


def stock() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=4, n_head=2, n_positions=64, n_inner=80)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_layer_is_a_linear_with_the_bits_and_the_state_of_what_it_stands_for():
    generator = torch.Generator().manual_seed(0)
    old = Conv1D(48, 32)
    old.weight.data = torch.randn(32, 48, generator=generator)
    old.bias.data = torch.randn(48, generator=generator)
    new = StoredTransposed(old)
    assert isinstance(new, nn.Linear)
    assert (new.in_features, new.out_features) == (32, 48)
    assert new.weight.shape == (48, 32)
    assert new.weight.data_ptr() == old.weight.data_ptr()
    state = new.state_dict()
    assert list(state) == list(old.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in old.state_dict().items())
    grown = []
    for layer in (old, copy.deepcopy(new)):
        x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradient = layer.weight.grad if layer is old else layer.weight.grad.T
        grown.append((y, x.grad, gradient, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grown, strict=True))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_the_stock_model_is_loaded(assign):
    source, target = stock(), linears(stock())
    for parameter in target.parameters():
        parameter.data.zero_()
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(logits(source), logits(target))


def test_no_model_has_transposed_layers_once_it_is_in(gpt2, tmp_path):
    gpt2.save(tmp_path / "artifact")
    models = [
        gpt2.model,
        Bundle.load(tmp_path / "artifact").model,
        Bundle.load(tmp_path / "artifact", stream=True).model,
        meta_model(str(tmp_path / "artifact")),
        Bundle(stock(), gpt2.tokenizer, Lineage(source="by hand")).model,
    ]
    for model in models:
        assert not any(isinstance(module, Conv1D) for module in model.modules())
        names = linear_layers(model)
        assert len(names) == 4 * len(TRANSPOSED)
        for name in names:
            module = model.get_submodule(name)
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


def test_a_saved_model_has_the_bytes_of_the_stock_one_and_loads_there(gpt2, tmp_path):
    model = stock()
    wanted = logits(model)
    model.save_pretrained(tmp_path / "stock")
    Bundle(model, gpt2.tokenizer, Lineage(source="by hand")).save(tmp_path / "ours")
    assert digest(tmp_path / "ours/model.safetensors") == digest(tmp_path / "stock/model.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), wanted)


@pytest.mark.parametrize(
    "step",
    [
        Train(tokens=256, batch=4),
        PruneMagnitude(sparsity=0.5),
        Student(blocks=2),
        PruneStructured(neurons=0.25, multiple_of=4),
    ],
    ids=lambda step: step.name(),
)
def test_what_a_pass_leaves_loads_in_stock_transformers(step, gpt2, make_context, tmp_path):
    result = step(gpt2, make_context(gpt2))
    result.save(tmp_path / "artifact")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    assert any(isinstance(module, Conv1D) for module in found.modules())
    assert torch.equal(logits(found), logits(result.model))


@pytest.mark.parametrize("step", [PruneWanda(sparsity=0.5), QuantizeRound()], ids=lambda step: step.name())
def test_block_by_block_gives_the_same_bytes(step, gpt2, make_context, tmp_path):
    masked = PruneMagnitude(pattern="2:4")(gpt2, make_context(gpt2))
    masked.save(tmp_path / "source")
    for stream in (False, True):
        bundle = Bundle.load(tmp_path / "source", stream=stream)
        assert all(torch.equal(bundle.masks[name], mask) for name, mask in masked.masks.items())
        step(bundle, make_context(bundle, workdir=f"work-{stream}")).save(tmp_path / str(stream))
    found = [
        {name: matrix_of(Bundle.load(tmp_path / str(stream)).model, name) for name in masked.masks}
        for stream in (False, True)
    ]
    for name, mask in masked.masks.items():
        assert torch.equal(found[0][name], found[1][name])
        assert not found[0][name][~mask].any()


def matrix_of(model, name: str) -> torch.Tensor:
    return matrix(model.get_submodule(name))


@pytest.mark.parametrize("packed", [False, True])
def test_bitmasks_are_of_the_stored_order_and_run_packed(packed, gpt2, make_context, tmp_path):
    half = PruneMagnitude(sparsity=0.6)(gpt2, make_context(gpt2))
    StoreSparse()(half, make_context(half)).save(tmp_path / "artifact")
    assert (tmp_path / "artifact" / SPARSE).is_file()
    loaded = Bundle.load(tmp_path / "artifact", masks=not packed, packed=packed)
    name = "transformer.h.0.mlp.c_fc"
    assert torch.equal(matrix_of(loaded.model, name), matrix_of(half.model, name))
    torch.testing.assert_close(logits(loaded.model), logits(half.model))
