"""ONNX Runtime gives what torch gives, through every entrance."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from export_models import CONTEXT, MODELS, exported, session_entry, tiny_bundle, tokens, torch_logits

from compress.errors import UserError
from compress.runtimes.onnx_runtime import OnnxRuntime
from compress.runtimes.onnx_session import open_session


@pytest.mark.parametrize("name", MODELS)
def test_float_graph_equals_torch_with_and_without_the_cache(name, tmp_path):
    bundle = tiny_bundle(name)
    runtime = exported(bundle, tmp_path)
    ids = tokens(batch=2, length=40)
    expected = torch_logits(bundle.model, ids)
    tolerance = 1e-5 * np.abs(expected).max()
    assert np.abs(runtime.logits(ids) - expected).max() < tolerance
    state = runtime.prefill(ids[:, :20])
    assert np.abs(state.logits - expected[:, 19]).max() < tolerance
    for position in range(20, 40):
        state = runtime.decode(state, ids[:, position])
        assert np.abs(state.logits - expected[:, position]).max() < tolerance
    assert state.length == 40


def test_the_cache_grows_past_its_first_capacity(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.runtimes.onnx_runtime._SPARE", 1)
    bundle = tiny_bundle("llama")
    runtime = exported(bundle, tmp_path)
    ids = tokens(batch=2, length=CONTEXT)
    expected = torch_logits(bundle.model, ids)
    state = runtime.prefill(ids[:, :3])
    for position in range(3, CONTEXT):
        state = runtime.decode(state, ids[:, position])
    assert np.abs(state.logits - expected[:, -1]).max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(UserError, match="context of 64 tokens"):
        runtime.decode(state, ids[:, 0])


def test_long_texts_are_scored_in_chunks(tmp_path):
    bundle = tiny_bundle("llama")
    exported(bundle, tmp_path)
    runtime = OnnxRuntime(tmp_path, threads=1, prefill_chunk=7)
    ids = tokens(batch=2, length=40)
    expected = torch_logits(bundle.model, ids)
    assert np.abs(runtime.logits(ids) - expected).max() < 1e-5 * np.abs(expected).max()


def test_long_prompts_of_a_batch_are_read_into_one_cache(tmp_path, monkeypatch):
    """Row by row in chunks, each into its own part of the memory: no copy is made afterwards."""
    monkeypatch.setattr(OnnxRuntime, "join", lambda *_: pytest.fail("copied"))
    bundle = tiny_bundle("llama")
    exported(bundle, tmp_path)
    runtime = OnnxRuntime(tmp_path, threads=1, prefill_chunk=7)
    ids = tokens(batch=3, length=40)
    expected = torch_logits(bundle.model, ids)
    state = runtime.prefill(ids[:, :30])
    assert np.abs(state.logits - expected[:, 29]).max() < 1e-5 * np.abs(expected).max()
    for position in range(30, 40):
        state = runtime.decode(state, ids[:, position])
        assert np.abs(state.logits - expected[:, position]).max() < 1e-5 * np.abs(expected).max()


def test_two_texts_at_once_do_not_disturb_each_other(tmp_path):
    runtime = exported(tiny_bundle("llama"), tmp_path)
    ids = tokens(batch=2, length=10)
    alone = runtime.decode(runtime.prefill(ids[:1, :9]), ids[:1, 9]).logits.copy()
    first, second = runtime.prefill(ids[:1, :9]), runtime.prefill(ids[1:, :9])
    runtime.decode(second, ids[1:, 9])
    assert (runtime.decode(first, ids[:1, 9]).logits == alone).all()


def test_weights_are_packed_together_where_the_file_is_small(tmp_path, monkeypatch):
    """On all threads at once, with all originals still there: small files have that memory to spare."""
    ids = tokens(batch=1, length=10)
    together = exported(tiny_bundle("llama"), tmp_path)
    monkeypatch.setattr("compress.runtimes.onnx_session._TOGETHER_UP_TO", together.weight_bytes - 1)
    in_turn = OnnxRuntime(tmp_path, threads=1)
    key = "session.prepack.enable_parallel"
    assert [session_entry(runtime, key) for runtime in (together, in_turn)] == ["1", None]
    assert (together.logits(ids) == in_turn.logits(ids)).all()


def test_our_sessions_print_nothing_where_stock_ones_warn_of_defaults(tmp_path, capfd):
    """As docs/deploying.md says, with the setting that silences those."""
    runtime = exported(tiny_bundle("llama"), tmp_path)
    runtime.decode(runtime.prefill(tokens(1, 5)), tokens(1, 1)[:, 0])
    assert capfd.readouterr() == ("", "")
    options = onnxruntime.SessionOptions()
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    assert "logits_to_keep appears in graph inputs" in capfd.readouterr().err
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    assert capfd.readouterr() == ("", "")


def test_text_longer_than_the_context_is_refused(tmp_path):
    runtime = exported(tiny_bundle("llama"), tmp_path)
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        runtime.logits(tokens(1, CONTEXT + 1))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        OnnxRuntime(tmp_path, threads=1)


def test_a_broken_model_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="cannot load it"):
        OnnxRuntime(tmp_path, threads=1)


def test_it_needs_neither_torch_nor_transformers():
    code = (
        "import sys, compress.runtimes.onnx_runtime, compress.runtimes;"
        "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("damaged", [b"of-somebody", b"of-an-input"])
def test_what_is_no_text_in_a_graph_is_one_line(damaged, tmp_path):
    kind = onnx.helper.make_tensor_value_info
    inputs = [kind("of-an-input", onnx.TensorProto.FLOAT, [1])]
    outputs = [kind("y", onnx.TensorProto.FLOAT, [1])]
    node = onnx.helper.make_node("Identity", ["of-an-input"], ["y"])
    graph = onnx.helper.make_graph([node], "g", inputs, outputs)
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset])
    model.metadata_props.add(key="note", value="of-somebody")
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    open_session(file, 1)
    file.write_bytes(model.SerializeToString().replace(damaged, b"\xfd" * len(damaged)))
    with pytest.raises(UserError, match=r"model\.onnx: ONNX Runtime cannot load it: .*; export it again"):
        open_session(file, 1)


def test_a_graph_whose_output_has_another_name_is_refused_in_one_line(tmp_path):
    exported(tiny_bundle("llama"), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == "logits":
                node.output[place] = "lo'its"
    next(value for value in model.graph.output if value.name == "logits").name = "lo'its"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="logits"):
        OnnxRuntime(tmp_path, threads=1).logits(tokens(batch=1, length=8))
