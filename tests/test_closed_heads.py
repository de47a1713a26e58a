"""Heads of encoders whose checkpoint has no field for fewer: zero in the file, and no part of the graph."""

import numpy as np
import onnx
import pytest
import torch
import transformers
from export_models import quantized
from taught_models import labelled_context, tiny_classifier
from test_prune_structured import kill

from compress.errors import UserError
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.closed_heads import without_closed_heads
from compress.export.onnx.forms import Forms
from compress.formats import Int4, Int8, QuantizedTensor
from compress.models.attention_layers import attention_layers
from compress.passes.distill import Distill
from compress.passes.prune_structured import PruneStructured
from compress.runtimes.onnx_encoder import OnnxEncoder
from compress.structured.structure import find_structure

FAMILIES = ["bert", "roberta", "distilbert"]
IDS = torch.arange(10, 30)[None]
HEAD = 8  # columns


@torch.no_grad()
def answer(model, ids=IDS):
    return model(input_ids=ids)[0]


def planted(family="bert", heads=4):
    """A classifier of whose heads half are dead: another half in each block."""
    bundle = tiny_classifier("class", family)
    for sublayer in find_structure(bundle.model).of("heads"):
        kill(bundle.model, sublayer, [1, 2] if sublayer.block else [0, 3])
    return bundle


def pruned(bundle, folder, **shares):
    return PruneStructured(heads=0.5, multiple_of=1, **shares)(
        bundle, labelled_context("class", folder, bundle)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_dead_heads_are_closed_and_the_checkpoint_is_stock(family, tmp_path):
    bundle = planted(family)
    result = pruned(bundle, tmp_path)
    torch.testing.assert_close(answer(result.model), answer(bundle.model), rtol=1e-3, atol=1e-4)
    assert result.notes["closed_heads"]["per_block"] == 2
    assert result.notes["parameters_removed"] == 0, "the file keeps its zeros"
    for block, layers in enumerate(attention_layers(result.model)):
        gone = [1, 2] if block else [0, 3]
        for name in layers.makers:
            assert not result.model.get_submodule(name).weight.view(4, HEAD, -1)[gone].any()
            assert not result.model.get_submodule(name).bias.view(4, HEAD)[gone].any()
            assert not result.masks[name].view(4, HEAD, -1)[gone].any()
        read = result.masks[layers.reader].view(32, 4, HEAD)
        assert not read[:, gone].any()
        assert int(read.sum()) == 32 * 2 * HEAD
    result.save(tmp_path / "pruned")
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(answer(stock), answer(result.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", [None, Int8(), Int4(group=16), Int4()], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_leave_them_out(family, format, tmp_path):
    bundle = pruned(planted(family), tmp_path)
    held = bundle if format is None else quantized(bundle, format)
    # a group of 16 columns is two heads, one of which lives: nothing is cut there
    alone = format is None or format.group_width(32) == 32
    smaller, count = without_closed_heads(held.model)
    assert count == (4 if alone else 0)
    torch.testing.assert_close(answer(smaller), answer(held.model), rtol=1e-4, atol=1e-5)
    facts = write_artifact(held, tmp_path / "graph", Forms())
    assert facts.get("closed_heads_left_out", 0) == count
    found = OnnxEncoder(tmp_path / "graph", threads=1).logits(IDS.numpy().astype(np.int32))
    np.testing.assert_allclose(found[0], answer(held.model).numpy(), atol=1e-4 if format is None else 0.02)
    graph = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False).graph
    heads = [
        a.i
        for n in graph.node
        for a in n.attribute
        if n.op_type == "MultiHeadAttention" and a.name == "num_heads"
    ]
    assert heads == ([2, 2] if alone else [4, 4])


def test_a_whole_group_of_codes_goes(tmp_path):
    bundle = tiny_classifier("class")
    for sublayer in find_structure(bundle.model).of("heads"):
        kill(bundle.model, sublayer, [2, 3])
    smaller, count = without_closed_heads(quantized(pruned(bundle, tmp_path), Int4(group=16)).model)
    assert count == 4
    assert next(attention_layers(smaller)).head == HEAD
    assert smaller.get_submodule(next(attention_layers(smaller)).reader).in_features == 16


def test_healing_keeps_them_closed_and_neurons_go_beside(tmp_path):
    bundle = tiny_classifier("class")
    context = labelled_context("class", tmp_path, bundle)
    result = PruneStructured(heads=0.5, neurons=0.5, multiple_of=1)(bundle, context)
    assert result.notes["left"]["heads"] == 2
    healed = Distill(epochs=1, batch=16)(result, context)
    assert without_closed_heads(healed.model)[1] == 4
    reader = next(attention_layers(healed.model)).reader
    assert not torch.equal(
        healed.model.get_submodule(reader).weight, result.model.get_submodule(reader).weight
    )


def test_a_model_that_has_lost_all_heads_of_a_block_keeps_one():
    bundle = tiny_classifier("class")
    for sublayer in find_structure(bundle.model).of("heads"):
        kill(bundle.model, sublayer, [0, 1, 2, 3])
    smaller, count = without_closed_heads(bundle.model)
    assert count == 6
    torch.testing.assert_close(answer(smaller), answer(bundle.model), rtol=1e-4, atol=1e-5)


def test_a_model_without_closed_heads_is_itself():
    model = tiny_classifier("class").model
    assert without_closed_heads(model) == (model, 0)


def test_where_graphs_keep_them_heads_alone_are_refused(tmp_path):
    with pytest.raises(UserError, match="give heads and width the same share, or prune neurons only"):
        pruned(tiny_classifier("class", "modernbert"), tmp_path)


@pytest.mark.parametrize("format", [Int8(), Int4(group=16), Int4(group=16, symmetric=False)], ids=str)
def test_a_part_of_codes_is_the_part_of_what_they_stand_for(format):
    codes = QuantizedTensor.round(format, torch.randn(6, 48, generator=torch.Generator().manual_seed(0)))
    rows, columns = torch.tensor([0, 3, 4]), torch.arange(16, 48)
    assert torch.equal(codes.part(rows, columns).dequantize(), codes.dequantize()[rows][:, columns])
    assert torch.equal(codes.part().dequantize(), codes.dequantize())
