"""Runtimes that are not ours: what they compute is what torch computes, and missing ones are named."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import export_models
import numpy as np
import pytest
from cli_helpers import write_text

import compress
from compress import CAUSAL, ExportCompressedTensors, ExportGguf, Int4, Int8, QuantizeGPTQ, UserError
from compress.measure import turns, worker
from compress.records.protocol import MeasureProtocol
from compress.records.run import RunRecord, VariantRecord
from compress.runtimes import RUNTIMES, detect_runtime, open_runtime, prepare, process_bytes
from compress.runtimes.exported import EXPORTED, Exported

WITH_LLAMA = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed; it is built from source"
)
QUICK = MeasureProtocol(threads=1, rounds=1, prefill_tokens=16)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("others") / "text", documents=40, words=200)


@pytest.fixture
def coded(bundle, text, tmp_path) -> Path:
    """An artifact with all three exports beside its codes."""
    data = compress.DataConfig(
        text=str(text), window=32, evaluation_windows=4, calibration_windows=8, heldout_windows=4
    )
    step = QuantizeGPTQ(format=Int4(group=32, symmetric=True), embeddings=Int8(group=32))
    made = bundle.apply(step, text=data).apply(ExportGguf(), text=data)
    made.apply(ExportCompressedTensors(), text=data).save(tmp_path / "coded")
    return tmp_path / "coded"


@WITH_LLAMA
class TestLlamaCpp:
    @pytest.fixture
    def file(self, bundle, text, tmp_path) -> Path:
        made = bundle.apply(ExportGguf(floats="float32"), text=str(text)).save(tmp_path / "made")
        assert made.exports == ("gguf",)
        return tmp_path / "made" / "gguf" / "model.gguf"

    def test_every_position_is_what_torch_computes(self, file):
        tokens = export_models.tokens(3, 24)
        runtime, torch = open_runtime(file, "llama.cpp", 1), open_runtime(file.parents[1], "torch", 1)
        assert (runtime.name, runtime.task, runtime.context) == ("llama.cpp", CAUSAL, torch.context)
        expected = torch.logits(tokens)
        # llama.cpp keeps keys and values as float16
        assert np.abs(runtime.logits(tokens) - expected).max() <= 5e-3 * np.abs(expected).max()

    def test_a_prefill_and_decoding_give_the_same_beyond_the_first_cache(self, file):
        tokens = export_models.tokens(2, 120)
        runtime = open_runtime(file, "llama.cpp", 1)
        expected = runtime.logits(tokens)
        state = open_runtime(file, "llama.cpp", 1).prefill(tokens[:, :8])
        with pytest.raises(ValueError, match="one cache"):
            runtime.decode(state, tokens[:, 8])
        state = runtime.prefill(tokens[:, :8])
        runtime.close()
        runtime = open_runtime(file, "llama.cpp", 1)
        ended = runtime.prefill(tokens[:, :8])
        state = runtime.prefill(tokens[:, :8])  # room for 64 more: the cache moves on the way
        with pytest.raises(ValueError, match="one cache"):
            runtime.decode(ended, tokens[:, 8])
        for place in range(8, 120):
            state = runtime.decode(state, tokens[:, place])
            assert np.abs(state.logits - expected[:, place]).max() <= 5e-3 * np.abs(expected).max()
        assert state.length == 120

    def test_more_tokens_than_a_call_takes(self, file):
        tokens = np.tile(export_models.tokens(1, 100), (24, 1))  # 2400; llama.cpp takes 2048
        found = open_runtime(file, "llama.cpp", 1).logits(tokens)
        assert np.abs(found - found[:1]).max() <= 5e-3 * np.abs(found).max()

    def test_a_file_that_it_cannot_load_is_told_in_a_line(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"GGUF, not")
        with pytest.raises(UserError, match=r"model\.gguf: llama\.cpp cannot load it: .*"):
            open_runtime(tmp_path / "model.gguf", "llama.cpp")


def test_transformers_computes_what_the_codes_stand_for(coded):
    tokens = export_models.tokens(2, 16)
    runtime = open_runtime(coded / "compressed-tensors", "transformers", 1)
    expected = open_runtime(coded, "torch", 1).logits(tokens)
    assert runtime.name == "transformers"
    # norms and embeddings are float16 in the folder
    assert np.abs(runtime.logits(tokens) - expected).max() <= 5e-3 * np.abs(expected).max()


def test_what_lies_there_says_what_it_is_for(coded):
    assert detect_runtime(coded) == "torch"
    assert detect_runtime(coded / "compressed-tensors") == "transformers"
    assert (detect_runtime(coded / "gguf" / "model.gguf") == "llama.cpp") == EXPORTED["gguf"].installed


def test_measuring_an_artifact_measures_its_exports_where_they_ship(bundle, coded, text, tmp_path):
    bundle.save(tmp_path / "base")
    data = compress.DataConfig(text=str(text), window=32, evaluation_windows=4)
    results = compress.measure(coded, base=tmp_path / "base", text=data, protocol=QUICK)
    found = {(r.variant, r.runtime): r for r in results}
    runtimes = ["torch", *(["llama.cpp"] if EXPORTED["gguf"].installed else []), "transformers"]
    assert list(found) == [("base", "torch"), *(("coded", runtime) for runtime in runtimes)]
    torch = found["coded", "torch"]
    for runtime in runtimes:
        line = found["coded", runtime]
        assert line.nll == pytest.approx(torch.nll, abs=0.02)
        assert line.decode_tokens_per_second > 0
        assert line.artifact.startswith(str(coded))
    if EXPORTED["gguf"].installed:
        assert found["coded", "llama.cpp"].disk_bytes == (coded / "gguf" / "model.gguf").stat().st_size


def test_a_runtime_that_is_missing_is_named_with_what_brings_it(bundle, text, tmp_path, monkeypatch):
    missing = {
        **EXPORTED,
        "gguf": Exported("llama.cpp", "model.gguf", "nowhere", "llama-x"),
    }
    monkeypatch.setattr("compress.measure.places.EXPORTED", missing)
    monkeypatch.setattr("compress.run.request.EXPORTED", missing)
    bundle.save(tmp_path / "model")
    said: list[str] = []
    done = compress.quantize(
        tmp_path / "model", bits=8, to="gguf", out=tmp_path / "out", text=text, threads=1, say=said.append
    )
    reason = "not measured in llama.cpp: pip install llama-x"
    assert f"gguf: written, {reason}" in said
    assert RunRecord.read(tmp_path / "out" / "run.json").not_measured == {"gguf": reason}
    for page in ("report.md", "report.html"):
        assert f"Written, {reason}." in (tmp_path / "out" / page).read_text(encoding="utf-8")
    assert {r.runtime for r in done.results} == {"torch"}


@pytest.mark.skipif(EXPORTED["gguf"].installed, reason="llama-cpp-python is installed")
def test_without_llama_cpp_opening_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        open_runtime(tmp_path / "model.gguf", "llama.cpp")


def test_run_records_from_before_exports_were_listed():
    old = {"name": "x", "parent": None, "artifact": "x", "fingerprint": "1", "steps": []}
    assert VariantRecord.model_validate({**old, "onnx_artifact": "x/onnx"}).exports == ("onnx",)
    assert VariantRecord.model_validate({**old, "onnx_artifact": None}).exports == ()


def test_a_runtime_that_nobody_has():
    with pytest.raises(UserError, match="runtime: 'llama' is unknown"):
        open_runtime(Path(), "llama")


def test_what_measuring_asks_of_a_runtime_is_told_where_runtimes_are():
    for module in (turns, worker):  # how a process is started, timed and asked
        assert not re.search("onnxruntime|transformers|llama", Path(module.__file__).read_text())
    assert [process_bytes(name) > 0 for name in (*RUNTIMES, "another")] == [True] * len(RUNTIMES) + [False]
    prepare("another")  # who opens it says that it is unknown
    code = "import sys; from compress.runtimes import prepare; prepare(sys.argv[1]); print(*sys.modules)"
    for name, wanted in (
        ("onnxruntime", "onnxruntime"),
        ("torch", "transformers.models.llama.modeling_llama"),
    ):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
        loaded = done.stdout.split()
        assert wanted in loaded, name
        assert ("torch" in loaded) == (name == "torch")
