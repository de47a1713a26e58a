"""`onnxruntime-genai` runs the exported folder as it is, and says what our runtime says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import training_set
from export_models import CONTEXT, MODELS, exported, quantized, tiny_bundle, tokens

from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.cache import cache_scales
from compress.export.onnx.families import describe
from compress.export.onnx.forms import Forms
from compress.export.onnx.genai import genai_config
from compress.formats import Int4
from compress.runtimes.onnx_runtime import OnnxRuntime

genai = pytest.importorskip("onnxruntime_genai", reason="the extra genai is not installed")


def continued(folder, prompts, steps):
    """Greedy continuations by the library: prompts, lists of tokens, -> the same with up to `steps` more."""
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    longest = max(map(len, prompts)) + steps
    settings.set_search_options(max_length=longest, batch_size=len(prompts))
    generator = genai.Generator(model, settings)
    rows = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]
    padded = [np.pad(row, (0, max(map(len, rows)) - len(row)), constant_values=1) for row in rows]
    generator.append_tokens(np.stack(padded))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(i))) for i in range(len(prompts))]


def ours(runtime, prompt, steps, end):
    """The same by our runtime, up to the first end token, which the library leaves out."""
    state, text = runtime.prefill(np.asarray([prompt], dtype=np.int32)), list(prompt)
    for _ in range(steps):
        chosen = int(state.logits[0].argmax())
        if chosen == end:
            break
        text.append(chosen)
        state = runtime.decode(state, np.asarray([text[-1]], dtype=np.int32))
    return text


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name, tmp_path):
    bundle = tiny_bundle(name)
    runtime = exported(bundle, tmp_path)
    prompt = tokens(1, 9)[0].tolist()
    assert continued(tmp_path, [prompt], 20) == [ours(runtime, prompt, 20, end=1)]


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_of_codes(name, tmp_path):
    bundle = tiny_bundle(name)
    write_artifact(bundle, tmp_path, Forms(), cache_scales(bundle.model, tokens(4, 40, seed=9)))
    prompt = tokens(1, 9)[0].tolist()
    found = continued(tmp_path, [prompt], 20)
    assert found == [ours(OnnxRuntime(tmp_path, threads=1), prompt, 20, end=1)]


def test_codes_and_prompts_of_different_lengths_in_one_batch(tmp_path):
    runtime = exported(quantized(tiny_bundle("llama"), Int4()), tmp_path)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 12)]
    found = continued(tmp_path, prompts, 8)
    for row, prompt in zip(found, prompts, strict=True):
        expected = ours(runtime, prompt, 8, end=1)
        assert [t for t in row if t != 1][: len(expected)] == [t for t in expected if t != 1]


def test_it_reads_the_tokenizer_of_the_folder(tmp_path):
    bundle = training_set.tiny_bundle()
    exported(bundle, tmp_path)
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path)))
    text = "def alpha(x): return x + 1\n"
    ids = list(map(int, tokenizer.encode(text)))
    assert ids == bundle.tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_the_file_says_what_the_model_says(tmp_path):
    bundle = tiny_bundle("gemma2")
    bundle.model.generation_config.eos_token_id = [1, 5]
    exported(bundle, tmp_path)
    written = json.loads((tmp_path / "genai_config.json").read_text())
    model, decoder = written["model"], written["model"]["decoder"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (0, [1, 5], 1)
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (32, 2, 2)
    assert written["search"]["max_length"] == model["context_length"] == CONTEXT


def test_where_no_token_ends_a_text_there_is_no_file():
    """The library refuses a file without one, and our runtime needs none."""
    nobody = SimpleNamespace(config=SimpleNamespace())
    assert genai_config(nobody, SimpleNamespace(), describe(tiny_bundle("llama").model)) is None
