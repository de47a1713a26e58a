"""A token table in two formats: what the text uses often keeps its codes, the rest gets fewer bits."""

import json

import numpy as np
import onnx
import pytest
import torch
from cli_helpers import invoke, refused, results, write_recipe, write_text
from encoder_models import write_encoder
from safetensors.torch import load_file, save_file
from taught_models import labelled_context, tiny_body, tiny_classifier

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.forms import Forms
from compress.formats import Int4, Int8, QuantizedTensor
from compress.formats.split import SplitEmbedding
from compress.passes.quantize_rare_rows import QuantizeRareRows
from compress.passes.quantize_round import QuantizeRound
from compress.runtimes.onnx_encoder import OnnxEncoder

IDS = torch.arange(10, 60)[None]
TABLE = "bert.embeddings.word_embeddings"


@pytest.fixture
def split(tmp_path):
    bundle = tiny_classifier("class")
    context = labelled_context("class", tmp_path, bundle)
    rounded = QuantizeRound(format=Int8())(bundle, context)
    return rounded, QuantizeRareRows(coverage=0.7)(rounded, context), context


@torch.no_grad()
def answer(model, ids=IDS):
    return model(input_ids=ids)[0].numpy()


def test_rows_keep_their_codes_or_are_rounded(split):
    rounded, result, context = split
    before, table = rounded.model.get_submodule(TABLE), result.model.get_submodule(TABLE)
    assert isinstance(table, SplitEmbedding)
    rows = before.num_embeddings
    counts = np.bincount(
        np.concatenate([context.data.calibration.tokens.ravel(), context.data.train]), minlength=rows
    )
    rare = (table.place >= table.frequent.num_embeddings).numpy()
    special = [0, 1, 3, 4]  # begin, end, padding, mask
    assert not rare[special].any()
    usual = np.setdiff1d(np.arange(rows), special)
    assert counts[usual][rare[usual]].max() <= counts[usual][~rare[usual]].min()
    assert result.notes["rare_rows"] == rare.sum() > 0
    assert result.notes["share_of_text"] == pytest.approx(counts[rare].sum() / counts.sum())
    assert result.notes["share_of_text"] <= 0.3
    found, old = table(torch.arange(rows)), before(torch.arange(rows))
    assert torch.equal(found[~rare], old[~rare])
    expected = QuantizedTensor.round(Int4(group=32), old[rare]).dequantize()
    assert torch.equal(found[rare], expected)
    assert torch.equal(table.weight, found)


def test_it_is_the_same_when_loaded_again(split, tmp_path):
    _, result, _ = split
    result.save(tmp_path / "out")
    loaded = Bundle.load(tmp_path / "out")
    assert np.array_equal(answer(loaded.model), answer(result.model))
    records = json.loads((tmp_path / "out" / "manifest.json").read_text())["layers"]
    kinds = {name: record["format"]["kind"] for name, record in records.items() if record["embedding"]}
    assert kinds == {f"{TABLE}.frequent": "int8", f"{TABLE}.rare": "int4"}


def test_places_that_are_no_rows_are_refused(split, tmp_path):
    _, result, _ = split
    result.save(tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    state = load_file(file)
    state[f"{TABLE}.place"][5] = 10**6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="places of a table's rows are not each row once"):
        Bundle.load(tmp_path / "out", verify=False)


def test_a_graph_looks_rows_up_in_both(split, tmp_path):
    _, result, _ = split
    write_artifact(result, tmp_path / "graph", Forms())
    found = OnnxEncoder(tmp_path / "graph", threads=1).logits(IDS.numpy().astype(np.int32))
    np.testing.assert_allclose(found[0], answer(result.model), atol=0.02)
    graph = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert not any(name.startswith(f"{TABLE}.weight") for name in names), "no copy of the whole"
    assert any(name.startswith(f"{TABLE}.rare") for name in names)


def test_what_it_cannot_take_is_refused(split, tmp_path):
    rounded, _, context = split
    with pytest.raises(UserError, match="coverage: 0.99.* needs all .* rows"):
        QuantizeRareRows(coverage=1 - 1e-12)(replaced(rounded), context)
    with pytest.raises(UserError, match="holds no codes"):
        QuantizeRareRows()(tiny_classifier("class"), context)
    with pytest.raises(UserError, match="needs the table whole"):
        QuantizeRareRows().layers(tiny_body("BertForMaskedLM").model)


def replaced(bundle):
    """One whose every token is special, and so in use."""
    result = bundle.clone()
    result.tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"w{i}" for i in range(len(result.tokenizer))]}
    )
    return result


def test_a_run(tmp_path):
    text = write_text(tmp_path / "text")
    checkpoint = write_encoder(tmp_path / "model", text, head=False, blocks=1)
    model = {"checkpoint": str(checkpoint)}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", text, model=model, base=["export_onnx"],
        variants={"int8": ["quantize_round", {"quantize_rare_rows": {"coverage": 0.5}}, "export_onnx"]},
    )  # fmt: skip
    invoke("run", recipe, "-o", tmp_path / "out")
    found = results(tmp_path / "out")
    assert {runtime for variant, runtime in found if variant == "int8"} == {"torch", "onnxruntime"}
    assert 0 < found["int8", "onnxruntime"]["cosine_distance"] < 0.1
    early = write_recipe(tmp_path / "early.yaml", text, model=model, variants={"x": ["quantize_rare_rows"]})
    assert "quantize_rare_rows" in refused("run", early, "-o", tmp_path / "early")
