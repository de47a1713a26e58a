"""What is loaded answers as the stock loader's model does, or is refused before any work."""

from importlib.util import find_spec

import pytest
import torch
from cli_helpers import invoke, refused
from encoder_models import tiny_encoder
from export_models import tiny_bundle as tiny_export
from seq2seq_models import tiny_seq2seq

from compress import api
from compress.artifact.shards import ShardReader
from compress.errors import UserError
from compress.passes.quantize_round import QuantizeRound
from compress.run.recipe import Recipe
from compress.runtimes import null_pass as checks
from compress.runtimes.null_pass import null_pass

DECODERS = [(tiny_export, name) for name in ("gpt2", "gemma3", "gpt_neox")]


@pytest.mark.parametrize(("make", "name"), [*DECODERS, (tiny_encoder, "embedding"), (tiny_seq2seq, "t5")])
def test_what_loads_as_stock_passes(make, name, tmp_path):
    make(name).save(tmp_path / "m")
    assert null_pass(tmp_path / "m") is None


@pytest.fixture
def misread(monkeypatch):
    """One tensor of the third block comes out of the files a little wrong."""
    real = ShardReader.read

    def read(self, names):
        found = real(self, names)
        for name, tensor in found.items():
            if name.startswith("model.layers.2.") and name.endswith("up_proj.weight"):
                found[name] = tensor.flip(0)
        return found

    monkeypatch.setattr(ShardReader, "read", read)


def test_a_wrong_reading_is_told_with_its_first_layer(misread, bundle, tmp_path):
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.mul_(3)
    bundle.save(tmp_path / "m")
    with pytest.raises(UserError, match=r"KL [0-9.e-]+ nats, first in model\.layers\.2\b") as told:
        null_pass(tmp_path / "m")
    assert "\n" not in str(told.value)


def test_a_run_ends_before_its_first_pass_and_does_not_take_the_step_for_finished(
    misread, bundle, recipe_dict, tmp_path
):
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.mul_(3)
    bundle.model.save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    recipe_dict |= {"model": {"checkpoint": str(tmp_path / "m")}, "base": []}
    recipe = Recipe.parse(recipe_dict, "test")
    for _ in range(2):
        with pytest.raises(UserError, match="answers otherwise than stock transformers'"):
            api.make_artifacts(recipe, tmp_path / "run", lambda line: None)
    assert not [p for p in (tmp_path / "run" / ".steps").iterdir() if (p / "manifest.json").is_file()]
    asked = "quantize", tmp_path / "m", "-o", tmp_path / "out", "--text", recipe_dict["data"]["text"]
    done = invoke(*asked, "--effort", "quick", "--threads", 1)
    last = done.err.splitlines()[-1]
    assert done.code == 2
    assert last.startswith("error: ")
    assert "answers otherwise than stock transformers'" in last
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".onnx", ".safetensors")]
    assert "answers otherwise" in refused("bench", tmp_path / "m", "--window", 32, "--windows", 2)


def test_the_divergence_is_the_sum_over_the_vocabulary():
    true, other = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    p, q = torch.softmax(true, -1)[0], torch.softmax(other, -1)[0]
    expected = sum(float(p[i]) * float(torch.log(p[i] / q[i])) for i in range(3))
    assert checks._kl(true, other) == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_compared_is_said(bundle, make_context, tmp_path, monkeypatch):
    QuantizeRound()(bundle, make_context(bundle)).save(tmp_path / "codes")
    assert "codes" in str(null_pass(tmp_path / "codes"))
    bundle.save(tmp_path / "m")
    monkeypatch.setattr(checks, "LARGEST", 100)
    assert "GB in float32" in str(null_pass(tmp_path / "m"))


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_gguf_is_compared_with_llama_cpp(bundle, tmp_path, monkeypatch):
    from compress.export.gguf.artifact import write_gguf

    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.mul_(3)
    write_gguf(bundle, tmp_path / "m.gguf", floats="float32", split=None, widen=False)
    assert null_pass(tmp_path / "m.gguf") is None
    real = checks._llama_cpp
    monkeypatch.setattr(checks, "_llama_cpp", lambda file, tokens: real(file, tokens.flip(1)))
    with pytest.raises(UserError, match="otherwise than in llama.cpp"):
        null_pass(tmp_path / "m.gguf")
