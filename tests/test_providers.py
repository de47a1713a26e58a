"""Execution providers: an absent one is told with what to install; a present one computes the same."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from cli_helpers import invoke, refused, settings, write_recipe, write_text
from export_models import exported, quantized, tiny_bundle, tokens

from compress.errors import UserError
from compress.export.onnx.forms import Forms
from compress.formats import Int4
from compress.generation.generator import TextGenerator
from compress.measure import worker
from compress.records.protocol import MeasureProtocol
from compress.runtimes.onnx_runtime import OnnxRuntime
from compress.runtimes.onnx_session import without_defaults
from compress.tasks.causal import CAUSAL

FULL = {
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
PRESENT = onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    bundle = tiny_bundle("llama")
    bundle.save(folder)
    exported(bundle, folder / "onnx")
    return folder


@pytest.fixture
def bare(monkeypatch):
    """An ONNX Runtime with nothing but the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


def test_an_absent_provider_is_told_with_its_package_and_what_there_is(bare, folder, tmp_path):
    command = ("generate", folder / "onnx", "-p", "w3", "--provider")
    for name, package in (
        ("cuda", "onnxruntime-gpu"),
        ("openvino", "onnxruntime-openvino"),
        ("coreml", "macOS"),
    ):
        line = refused(*command, name)
        assert f"provider: '{name}' is not in this ONNX Runtime, which has cpu" in line
        assert package in line
    assert "did you mean 'cuda'?" in refused(*command, "cida")
    assert invoke(*command, "cpu").out == invoke(*command[:-1]).out
    assert "'cuda' runs ONNX graphs" in refused("generate", folder, "-p", "w3", "--provider", "cuda")
    bench = ("bench", folder / "onnx", "--provider")
    assert "onnxruntime-gpu" in refused(*bench, "cuda")
    assert "provider: 'cida' is not valid" in refused(*bench, "cida")
    recipe = write_recipe(tmp_path / "tiny.yaml", write_text(tmp_path / "text", documents=4))
    line = refused("run", recipe, "-o", tmp_path / "run", *settings("measure.provider=openvino"))
    assert "onnxruntime-openvino" in line
    assert not (tmp_path / "run").exists(), "refused before any work"


def test_the_doctor_tells_what_is_there_and_how_to_get_the_rest(bare):
    told = invoke("doctor").out
    assert "providers     cpu, of ONNX Runtime\n" in told
    assert "no cuda: pip uninstall onnxruntime, then pip install onnxruntime-gpu" in told
    assert "no openvino: " in told


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif(FULL["cuda"] in PRESENT, reason="the CUDA provider starts here")
def test_a_provider_that_does_not_start_is_no_silent_cpu(folder, monkeypatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider", FULL["cuda"]]
    )
    with pytest.raises(UserError, match="'cuda' does not start here"):
        OnnxRuntime(folder / "onnx", threads=1, provider="cuda")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(full not in PRESENT, reason=f"no {full} in this ONNX Runtime")
        )
        for name, full in FULL.items()
    ],
)
@pytest.mark.parametrize("coded", [False, True])
def test_a_present_provider_computes_what_the_cpu_does(name, coded, tmp_path):
    bundle = tiny_bundle("llama")
    # beside codes, providers may round activations or not, whatever the graph allows: here it does not
    exported(quantized(bundle, Int4(group=32)) if coded else bundle, tmp_path, Forms(accuracy_level=0))
    reference = OnnxRuntime(tmp_path, threads=1)
    try:
        runtime = OnnxRuntime(tmp_path, threads=1, provider=name)
    except UserError as error:
        if name == "cuda" or f"provider '{name}' cannot run it" not in str(error):
            raise
        pytest.skip(str(error))
    assert runtime.device == name
    ids = tokens(batch=2, length=40)
    expected = reference.logits(ids)
    tolerance = (0.05 if coded else 2e-3) * np.abs(expected).max()
    assert np.abs(runtime.logits(ids) - expected).max() < tolerance
    state = runtime.prefill(ids[:, :30])
    for position in range(30, 40):
        state = runtime.decode(state, ids[:, position])
        assert np.abs(state.logits - expected[:, position]).max() < tolerance
    generator = TextGenerator(tmp_path, threads=1, provider=name)
    assert generator.generate(["w3 w4", "w5 w6 w7"], 8) == [
        "".join(generator.stream(prompt, 8)) for prompt in ("w3 w4", "w5 w6 w7")
    ]


def test_a_provider_that_cannot_run_the_graph_is_refused_when_it_loads(folder, monkeypatch):
    class Session(onnxruntime.InferenceSession):
        def __init__(self, graph, options, providers):
            super().__init__(graph, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [FULL["openvino"], "CPUExecutionProvider"]

        def run_with_iobinding(self, *_):
            raise RuntimeError("no kernel\nfor this")

    available = ["CPUExecutionProvider", FULL["openvino"]]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(UserError, match="provider 'openvino' cannot run it, take cpu: .*no kernel"):
        OnnxRuntime(folder / "onnx", threads=1, provider="openvino")


def test_openvino_is_given_a_graph_without_defaults(folder):
    """It would take them for constants."""
    graph = folder / "onnx" / "model.onnx"
    assert "logits_to_keep" in {x.name for x in onnx.load(graph, load_external_data=False).graph.initializer}
    changed = onnx.load_from_string(without_defaults(graph)).graph
    inputs = {value.name for value in changed.input}
    assert "logits_to_keep" in inputs
    assert not inputs & {x.name for x in changed.initializer}
    assert len(changed.initializer) == len(onnx.load(graph, load_external_data=False).graph.initializer) - 1


def test_measurements_use_the_provider_and_say_so(folder, tmp_path, monkeypatch):
    asked = []

    def opened(path, runtime, threads, *, provider, waiting="spin", verify=True):
        asked.append((runtime, provider))
        return SimpleNamespace(weight_bytes=0, device=provider, context=64, task=CAUSAL)

    monkeypatch.setattr(worker, "open_runtime", opened)
    facts = worker.Worker("onnxruntime", 1, lambda: None).load(str(folder), "cuda")
    assert asked == [("onnxruntime", "cuda")]
    assert facts["device"] == "cuda"
    record = MeasureProtocol(provider="cuda").record(windows=1, window=1, text_sha256="")
    assert record["provider"] == "cuda"
