"""From Python: load, apply, save, measure; and a caller whose process stays as it was."""

import importlib
import inspect
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import write_text
from training_set import equal, weights

import compress
from compress import DataConfig, ExportOnnx, Int4, QuantizeGPTQ, QuantizeRound, TuneScales, UserError, api
from compress.artifact.bundle import Bundle
from compress.export.gguf.artifact import write_gguf
from compress.measure import harness
from compress.measure.artifacts import measure_artifacts
from compress.run.recipe import Recipe
from compress.run.registry import names, pass_class

FEW = {"window": 32, "evaluation_windows": 4, "calibration_windows": 4, "heldout_windows": 2}


@pytest.fixture
def text(tmp_path: Path) -> DataConfig:
    return DataConfig(text=str(write_text(tmp_path / "text", documents=20, words=100)), **FEW)


@pytest.fixture
def model(bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "model")
    return tmp_path / "model"


def process_state() -> tuple[object, ...]:
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), random.getstate(),
        torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
    )  # fmt: skip


def test_a_chain_of_passes_leaves_the_model_and_the_process_alone(model, text, tmp_path):
    loaded = compress.load(model)
    before, state = weights(loaded), process_state()
    small = (
        loaded.apply(QuantizeGPTQ(format=Int4(group=16)), text=text)
        .apply(TuneScales(tokens=128, batch=2, window=32), text=text)
        .apply(ExportOnnx(), text=text)
    )
    assert process_state() == state
    assert equal(weights(loaded), before)
    assert small.lineage.names == ("quantize_gptq", "tune_scales", "export_onnx")
    scratch = small.exports["onnx"]
    small.save(str(tmp_path / "out"))
    assert (tmp_path / "out/onnx/model.onnx").is_file()
    assert equal(weights(compress.load(tmp_path / "out")), weights(small))
    del small
    assert not scratch.exists()


def test_what_a_pass_needs_and_does_not_get_is_asked_for(model, bundle, text):
    with pytest.raises(UserError, match=r"text: quantize_gptq needs text \(calibration\); give text="):
        compress.load(model).apply(QuantizeGPTQ())
    coded = bundle.apply(QuantizeRound())  # reads no text
    with pytest.raises(UserError, match="base: tune_scales learns from a model, and none was loaded"):
        coded.apply(TuneScales(tokens=64, batch=2, window=32), text=text)
    tuned = coded.apply(TuneScales(tokens=64, batch=2, window=32), text=text, base=bundle)
    assert tuned.lineage.steps[-1].notes["heldout_kl_before"] > 0


def test_measuring_reads_an_artifact_and_its_exports_from_disk(model, text, tmp_path):
    loaded = compress.load(model)
    loaded.apply(QuantizeRound(format=Int4(group=16))).apply(ExportOnnx(), text=text).save(tmp_path / "out")
    state = process_state()
    protocol = compress.MeasureProtocol(threads=1, prefill_tokens=16)
    results = compress.measure(tmp_path / "out", base=model, text=text, protocol=protocol)
    assert process_state() == state
    assert [(r.variant, r.runtime) for r in results] == [
        ("model", "torch"), ("out", "torch"), ("out", "onnxruntime")
    ]  # fmt: skip
    assert results[1].kl_to_base > 0
    assert results[2].kl_to_base == pytest.approx(results[1].kl_to_base, rel=0.5)
    lines = str(results).splitlines()
    assert len(lines) == 4
    assert lines[2].split()[:2] == ["out", "torch"]
    assert f"{results[1].kl_to_base:.4f}" in lines[2]
    with pytest.raises(UserError, match="no such artifact"):
        compress.measure(tmp_path / "nothing", text=text)


@pytest.fixture
def swapped(bundle) -> Bundle:
    """The same model with two tokens' ids exchanged in its tokenizer: as many tokens, the same strings."""
    words = json.loads(bundle.tokenizer.backend_tokenizer.to_str())
    ids = words["model"]["vocab"]
    ids["x"], ids["a"] = ids["a"], ids["x"]
    backend = type(bundle.tokenizer.backend_tokenizer).from_str(json.dumps(words))
    tokenizer = type(bundle.tokenizer)(tokenizer_object=backend, **bundle.tokenizer.special_tokens_map)
    other = bundle.clone().evolve(tokenizer=tokenizer)
    before, after = bundle.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    assert {token for token in before if before[token] != after[token]} == {"x", "a"}
    return other


def test_two_tokenizers_are_the_same_when_their_tokens_are(model, bundle, swapped, text, tmp_path):
    swapped.save(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: has another vocabulary than .*/model; measure"):
        measure_artifacts([model, tmp_path / "other"], text, None, None)
    # beside a base with the same tokens ids are translated: with its rows exchanged, too, it is that model
    rows, (one, two) = swapped.model.get_input_embeddings().weight, ids_of(bundle, "x", "a")
    with torch.no_grad():
        rows[[one, two]] = rows[[two, one]].clone()
    swapped.save(tmp_path / "renumbered")
    protocol = compress.MeasureProtocol(threads=1, prefill_tokens=16)
    _, as_it_is, renumbered = compress.bench(
        [model, tmp_path / "other", tmp_path / "renumbered"], text, model, protocol
    )
    assert renumbered.kl_to_base < 1e-9 < as_it_is.kl_to_base


def ids_of(bundle: Bundle, *tokens: str) -> list[int]:
    return [bundle.tokenizer.get_vocab()[token] for token in tokens]


@pytest.mark.parametrize("kind", ["gguf", "vocab.json and merges.txt"])
def test_what_has_no_tokenizer_json_has_the_vocabulary_of_itself(kind, bundle, text, tmp_path, monkeypatch):
    place = tmp_path / "alone.gguf" if kind == "gguf" else tmp_path / "old"
    if kind == "gguf":
        write_gguf(bundle, place)
    else:
        bundle.model.save_pretrained(place)
        words = json.loads(bundle.tokenizer.backend_tokenizer.to_str())["model"]
        (place / "vocab.json").write_text(json.dumps(words["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in words["merges"]]
        (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        settings = {"tokenizer_class": "GPT2Tokenizer", **bundle.tokenizer.special_tokens_map}
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not list(tmp_path.rglob("tokenizer.json"))
    monkeypatch.setattr(harness, "measure", lambda targets, *given, **named: targets)
    for base in (place, None):
        (target, *_) = measure_artifacts([place, place], text, base, None)
        assert target.path == place
    bundle.save(tmp_path / "model")  # and of the model that it was made of
    assert measure_artifacts([tmp_path / "model", place], text, tmp_path / "model", None)


def test_a_run_leaves_the_callers_threads(recipe_dict, tmp_path):
    from compress.api import make_artifacts

    torch.set_num_threads(1)
    state = process_state()
    make_artifacts(compress.Recipe.parse({**recipe_dict, "threads": 2}), tmp_path / "run", lambda line: None)
    assert process_state() == state


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("pass", "^{run}: was deleted or moved while the run used it; run again$"),
        ("measure", "^{run}: was deleted or moved while the run used it; run again$"),
        ("checkpoint", "^model: '{model}' does not exist; "),
    ],
)
def test_what_is_deleted_meanwhile_is_named(where, words, model, recipe_dict, tmp_path, monkeypatch):
    """The run's folder while a pass works and while it is measured; the checkpoint after the preflight."""
    run = tmp_path / "run"
    module, name = {
        "pass": (QuantizeRound, "__call__"),
        "measure": (api.harness, "measure"),
        "checkpoint": (api, "preflight"),
    }[where]
    real = getattr(module, name)

    def deleted(*arguments, **named):
        if where == "checkpoint":
            real(*arguments, **named)
        shutil.rmtree(model if where == "checkpoint" else run)
        return None if where == "checkpoint" else real(*arguments, **named)

    monkeypatch.setattr(module, name, deleted)
    changes = {"model": {"checkpoint": str(model)}, "base": [{"quantize_round": {}}], "variants": {}}
    with pytest.raises(UserError, match=words.format(run=run, model=model)):
        api.run(Recipe.parse({**recipe_dict, **changes}, "test"), run, lambda line: None)
    assert run.exists() == (where == "checkpoint")


def test_passes_formats_and_verbs_are_public():
    public = {getattr(compress, name) for name in compress.__all__ if name[0].isupper()}
    assert {pass_class(name) for name in names()} <= public
    for name in ("Int2", "Int3", "Int4", "Int5", "Int6", "Int8", "Nf4", "Coded", "Activations", "Context"):
        assert name in dir(compress)
    importlib.import_module("compress.run.recipe")  # binds the folder; it stays a verb
    assert list(inspect.signature(compress.run).parameters)[:2] == ["recipe", "folder"]
    assert compress.run.recipe.Recipe is compress.Recipe
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compress.nothing
