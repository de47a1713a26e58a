"""Encoders in ONNX Runtime give what torch gives: every family, every form, padded and not."""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cli_helpers import invoke, results, write_recipe, write_text
from encoder_models import CONTEXT, ENCODERS, tiny_encoder, write_encoder
from export_models import SPINNING, quantized, session_entry, tokens
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from compress.context import Context
from compress.errors import UserError
from compress.export.onnx import encoder as encoder_export
from compress.export.onnx import sides
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.check import ExportCheckFailed
from compress.export.onnx.encoder_check import compare_encoder
from compress.export.onnx.forms import Forms
from compress.export.onnx.simplify import needed, without_turns
from compress.export.onnx.trace import trace
from compress.formats import Int4, Int8
from compress.passes.export_onnx import ExportOnnx
from compress.records.manifest import Manifest
from compress.runtimes import open_runtime
from compress.runtimes.onnx_encoder import OnnxEncoder

pytest.importorskip("onnxscript")

FAMILIES = [name for name in ENCODERS if name != "embedding"]
PADDING = 3
FLOAT32 = 1e-5
PARTS = {8: ["codes", "scales"], 4: ["codes", "scales", "zeros"]}


@cache
def traced(name):
    """A tiny model and its graph, which holds none of its matrices and so serves every format."""
    bundle = tiny_encoder(name)
    inputs = encoder_export.encoder_inputs(bundle.model, bundle.tokenizer)
    task = "last_hidden_state" if name == "embedding" else "logits"
    answer, either = encoder_export.encoder_answer(bundle.model, inputs)
    assert either
    return bundle, trace(bundle.model, dict.fromkeys(inputs, ("batch", "sequence")), [task], answer)


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Write an artifact of a tiny encoder, maybe quantized, without tracing it again."""

    def write(name, format=None, forms=None, held=None):
        bundle, graph = traced(name)
        monkeypatch.setattr(encoder_export, "trace", lambda *arguments: graph)
        held = held or (bundle if format is None else quantized(bundle, format))
        write_artifact(held, tmp_path, forms or Forms())
        return held, OnnxEncoder(tmp_path, threads=1)

    return write


def in_torch(model, ids, mask=None):
    with torch.inference_mode():
        mask = None if mask is None else torch.from_numpy(mask)
        return model(input_ids=torch.from_numpy(ids).long(), attention_mask=mask)[0].numpy()


# where a row's text begins in the room that it leaves
BEGINS = {"right": [0.0], "left": [1.0], "mixed": [0.5, 1.0, 0.0, 0.25, 0.75]}


def padded(lengths, side="right", filler=PADDING):
    """Rows of random tokens: ids and mask (rows, width); `mixed`: left, right and at both ends by turns."""
    width, lengths = max(lengths) + 4 * (side == "mixed"), np.asarray(lengths)[:, None]
    begin = np.resize(BEGINS[side], lengths.shape) * (width - lengths)
    place = np.arange(width) - begin.astype(int)
    mask = ((place >= 0) & (place < lengths)).astype(np.int64)
    text = tokens(len(lengths), width)
    ids = np.where(mask == 1, np.where(text == PADDING, PADDING + 1, text), filler).astype(np.int32)
    return ids, mask


@pytest.mark.parametrize("name", FAMILIES)
def test_float_graph_equals_torch_at_every_size(name, write):
    bundle, runtime = write(name)
    for batch, length in ((1, 1), (1, 40), (3, 17), (2, CONTEXT - 8)):
        ids = np.where(tokens(batch, length) == PADDING, PADDING + 1, tokens(batch, length))
        expected = in_torch(bundle.model, ids)
        assert np.abs(runtime.logits(ids) - expected).max() < FLOAT32 * np.abs(expected).max()


@pytest.mark.parametrize("name", ENCODERS)
def test_on_every_side_a_row_gives_what_stock_transformers_says_of_it_alone(name, write):
    """Whatever stands where there is padding."""
    bundle, runtime = write(name)
    for side, filler in [(side, filler) for side in BEGINS for filler in (PADDING, 7)]:
        ids, mask = padded((23, 1, 9, 23, 16), side, filler)
        together = runtime.masked(ids, mask)
        for row, real in enumerate(mask == 1):
            alone = in_torch(bundle.model, ids[row : row + 1, real])[0]
            assert np.abs(together[row, real] - alone).max() < FLOAT32 * np.abs(alone).max()


def test_where_nothing_helps_padding_on_the_left_fails(monkeypatch, tmp_path):
    """In stock ONNX Runtime, too."""
    monkeypatch.setattr(sides, "_TABLES", ("nowhere",))
    bundle = tiny_encoder("bert")
    write_artifact(bundle, tmp_path, Forms())
    runtime = OnnxEncoder(tmp_path, threads=1)
    ids, mask = padded((9, 4), "left")
    with pytest.raises(UserError, match="padded on the right only; set the tokenizer's padding_side"):
        runtime.masked(ids, mask)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    given = {"input_ids": ids.astype(np.int64), "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
    with pytest.raises(Exception, match="GatherElements"):
        session.run(None, given)
    held = tokens(3, 16)
    assert compare_encoder(bundle.model, runtime, held, "float32", padding=PADDING).passed


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize(
    ("format", "forms", "tolerance"),
    [
        (Int4(), Forms(accuracy_level=0), 1e-4),
        (Int4(group=32, symmetric=True), Forms(accuracy_level=0), 1e-4),
        (Int8(), Forms(int8="blocks", accuracy_level=0), 1e-4),
        (Int4(), Forms(), 0.05),
        (Int8(), Forms(int8="blocks"), 0.05),
        (Int8(), Forms(int8="token"), 0.05),
        (Int8(symmetric=False), Forms(int8="token"), 0.05),
        (Int8(), Forms(int8="token", activation_bits=8), 0.05),
        (Int8(), Forms(int8="tensor"), 0.05),
    ],
)
def test_codes_in_the_graph_stand_for_those_in_torch(name, format, forms, tolerance, write):
    held, runtime = write(name, format, forms)
    ids = tokens(2, 24)
    expected = in_torch(held.model, ids)
    difference = np.abs(runtime.logits(ids) - expected)
    worst = difference.max() if tolerance < 0.01 else difference.mean()
    assert worst < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("format", [None, Int8(), Int4()])
def test_matrices_are_stored_once_and_as_codes_alone(format, write, tmp_path):
    held, runtime = write("bert", format, Forms(int8="token"))
    graph = onnx.load(tmp_path / "model.onnx").graph
    # ".3d" has the bytes of the codes in another shape: see test_a_tied_matrix_is_stored_once
    stored = {x.name: numpy_helper.to_array(x) for x in graph.initializer if not x.name.endswith(".3d")}
    table = "bert.embeddings.word_embeddings"  # the head's matrix, too
    assert not [name for name in stored if name.startswith("cls.predictions.decoder")]
    assert {n for n in stored if n.startswith(table) and not n.endswith("bias")} == {
        f"{table}.{part}" for part in (["weight"] if format is None else PARTS[format.bits])
    }
    if format is not None:
        matrices = [a for n, a in stored.items() if a.dtype == np.float32 and a.ndim == 2]
        widest = max(a.shape[0] for a in matrices)
        assert widest == CONTEXT  # positions; the head's own transform is smaller
        codes = held.model.get_submodule("bert.encoder.layer.0.intermediate.dense").quantized
        found = stored["bert.encoder.layer.0.intermediate.dense.codes"]
        if format.bits == 8:
            found = (found.astype(np.int16).T + 128).astype(np.uint8)
        expected = codes.unpacked() if format.bits == 8 else codes.codes
        assert found.tobytes() == expected.numpy().tobytes()
    size = sum(a.nbytes for a in stored.values())
    assert size == pytest.approx(runtime.weight_bytes, rel=0.02)


def test_attention_is_one_node_and_nothing_is_left_of_ours(write, tmp_path):
    write("bert")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    count = {kind: sum(n.op_type == kind for n in nodes) for kind in {n.op_type for n in nodes}}
    assert count["MultiHeadAttention"] == 1
    assert count["Sum"] == count["LayerNormalization"] - 1 == 3  # all but that of the head's own transform
    assert "Softmax" not in count
    assert {n.domain for n in nodes} <= {"", "com.microsoft"}
    assert "Transpose" not in count  # they came in pairs


def test_attention_adds_the_biases_of_integer_products(write, tmp_path):
    bundle = quantized(tiny_encoder("bert"), Int8())
    random = torch.Generator().manual_seed(0)
    for name, part in bundle.model.named_parameters():
        if name.endswith(("query.bias", "key.bias", "value.bias")):
            part.data = torch.randn(part.shape, generator=random)
    _, runtime = write("bert", forms=Forms(int8="token", activation_bits=8), held=bundle)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    (attention,) = [node for node in nodes if node.op_type == "MultiHeadAttention"]
    assert attention.input[3] == "bert.encoder.layer.0.attention.self.query.biases"
    ids = tokens(2, 24)
    expected = in_torch(bundle.model, ids)
    difference = np.abs(runtime.logits(ids) - expected).mean()
    assert difference < 0.05 * np.abs(expected).max()
    for part in (part for name, part in bundle.model.named_parameters() if name.endswith("query.bias")):
        part.data = torch.zeros_like(part)
    assert np.abs(in_torch(bundle.model, ids) - expected).mean() > 2 * difference  # they matter


@given(st.lists(st.sampled_from([(24,), (4, 6), (2, 3, 4), (6, 4)]), min_size=1, max_size=6))
def test_leaving_reshapes_out_changes_no_value(sizes):
    value = np.arange(24, dtype=np.float32).reshape(4, 6)
    names = ["x", *(f"r{i}" for i in range(len(sizes)))]
    known = dict(zip(names, [value.shape, *sizes], strict=True))
    shapes = [numpy_helper.from_array(np.asarray(size), f"s{i}") for i, size in enumerate(sizes)]
    nodes = [helper.make_node("Reshape", [names[i], f"s{i}"], [names[i + 1]]) for i in range(len(sizes))] + [
        helper.make_node("Identity", [names[-1]], ["y"]),
        helper.make_node("Neg", ["y"], ["z"]),
    ]

    def run(chosen):
        ends = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, value.shape),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, sizes[-1]),
        ]
        graph = helper.make_graph(chosen, "g", ends[:1], ends[1:], shapes)
        return ReferenceEvaluator(helper.make_model(graph)).run(None, {"x": value})[0]

    fewer = needed(without_turns(nodes, ["z"], known), ["z"])
    assert [node.op_type for node in fewer].count("Reshape") <= (sizes[-1] != value.shape) * len(sizes)
    assert "Identity" not in [node.op_type for node in fewer]
    assert (run(fewer) == run(nodes)).all()


@given(st.lists(st.permutations(range(3)), min_size=1, max_size=6))
def test_leaving_transposes_out_changes_no_value(turns):
    names = ["x", *(f"t{i}" for i in range(len(turns)))]
    nodes = [
        helper.make_node("Transpose", [names[i]], [names[i + 1]], perm=turn) for i, turn in enumerate(turns)
    ]
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def run(chosen):
        unknown = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["a", "b", "c"]) for n in ("x", names[-1])
        ]
        graph = helper.make_graph(chosen, "g", unknown[:1], unknown[1:])
        return ReferenceEvaluator(helper.make_model(graph)).run(None, {"x": value})[0]

    fewer = needed(without_turns(nodes, names[-1:], {}), names[-1:])
    assert len(fewer) <= len(nodes)
    assert (run(fewer) == run(nodes)).all()


def test_the_runtime_is_found_by_what_the_export_left(tmp_path, context):
    bundle = tiny_encoder("bert")
    result = ExportOnnx()(bundle, context)
    facts = result.notes["onnx"]
    assert facts["check"]["passed"]
    assert (facts["check"]["kind"], facts["task"]) == ("float32", "masked")
    assert facts["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    manifest = Manifest.read(result.exports["onnx"] / "manifest.json")
    assert manifest.onnx == facts
    runtime = open_runtime(result.exports["onnx"], "onnxruntime", threads=1)
    sleeping = open_runtime(result.exports["onnx"], "onnxruntime", threads=1, waiting="sleep")
    assert [session_entry(r, SPINNING) for r in (runtime, sleeping)] == [None, "0"]
    ids = tokens(2, 12)
    expected = in_torch(bundle.model, ids)
    assert (runtime.task.name, runtime.mask_token) == ("masked", 4)
    assert np.abs(runtime.prefill(ids).logits - expected[:, -1]).max() < FLOAT32 * np.abs(expected).max()
    with pytest.raises(UserError, match="continues none"):
        runtime.decode(runtime.prefill(ids), ids[:, 0])
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens exceed the model's context of {CONTEXT}"):
        runtime.logits(tokens(1, CONTEXT + 1))
    first = {p.name: p.read_bytes() for p in result.exports["onnx"].iterdir()}
    again = ExportOnnx()(bundle, context).exports["onnx"]
    assert {p.name: p.read_bytes() for p in again.iterdir()} == first  # same model, same bytes
    (again / "manifest.json").write_text("[")
    with pytest.raises(UserError, match=r"manifest\.json: does not list its files"):
        open_runtime(again, "onnxruntime", threads=1)
    (again / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"an encoder's graph without the manifest\.json"):
        open_runtime(again, "onnxruntime", threads=1)


def test_another_model_or_a_graph_that_ignores_padding_fails_the_check(write):
    _, runtime = write("bert")
    other = tiny_encoder("bert", seed=1).model
    with pytest.raises(ExportCheckFailed, match="answers differ by"):
        compare_encoder(other, runtime, tokens(3, 32), "float32")
    with pytest.raises(ExportCheckFailed, match="KL is"):
        compare_encoder(other, runtime, tokens(3, 32), "activations")
    right, model = runtime.masked, traced("bert")[0].model
    runtime.masked = lambda ids, mask: right(ids, np.ones_like(mask))
    with pytest.raises(ExportCheckFailed, match="answers differ by"):
        compare_encoder(model, runtime, tokens(3, 32), "float32")
    runtime.masked = lambda ids, mask: np.full_like(right(ids, mask), np.nan)
    with pytest.raises(ExportCheckFailed):
        compare_encoder(model, runtime, tokens(3, 32), "float32")


def test_a_model_that_cannot_be_traced_is_told_in_one_line(monkeypatch):
    bundle = tiny_encoder("bert")

    def decides(self, input_ids, **rest):
        return input_ids if int(input_ids.sum()) > 3 else -input_ids

    monkeypatch.setattr(type(bundle.model), "forward", decides)
    with pytest.raises(
        UserError, match="torch cannot trace a BertForMaskedLM .*leave export_onnx out"
    ) as told:
        trace(bundle.model, {"input_ids": ("batch", "sequence")}, "logits")
    assert "\n" not in str(told.value)


def test_an_embedding_model_goes_through_a_whole_run(tmp_path):
    text = write_text(tmp_path / "text")
    checkpoint = write_encoder(tmp_path / "model", text, head=False, blocks=1)
    recipe = write_recipe(
        tmp_path / "tiny.yaml", text, model={"checkpoint": str(checkpoint)},
        variants={"int8": ["quantize_round", {"export_onnx": {"check_tokens": 128}}]},
    )  # fmt: skip
    outcome = invoke("run", recipe, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")
    assert set(found) == {("base", "torch"), ("int8", "torch"), ("int8", "onnxruntime")}
    result = found["int8", "onnxruntime"]
    facts = Manifest.read(tmp_path / "run" / "int8" / "onnx" / "manifest.json").onnx
    assert facts["linear_forms"] == {"token": 6}  # an encoder's default; the pooler is not read
    assert facts["check"]["kind"] == "activations"
    assert found["int8", "torch"]["cosine_distance"] < result["cosine_distance"] < 0.01
    assert result["prefill_tokens_per_second"] > 0
    assert result["nll"] is result["decode_tokens_per_second"] is None
    assert result["weight_bytes"] < 0.5 * found["base", "torch"]["weight_bytes"]
    assert "ONNX Runtime" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


class _Heldout:
    tokens = tokens(3, 32)


class _Data:
    heldout = _Heldout()


@pytest.fixture
def context(tmp_path):
    return Context(
        data=_Data(),  # the pass reads nothing else of the text
        teacher=lambda: None,
        seed=0,
        workdir=tmp_path,
        device=torch.device("cpu"),
        threads=1,
        precision="float32",
    )
