"""`compress-lm run` on an encoder and on an encoder-decoder made in the run: written, exported, measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cli_helpers import invoke, write_recipe, write_text

from compress.artifact.bundle import Bundle
from compress.records.run import RunRecord

SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"vocab_size": 270},
    "t5": {"vocab_size": 370, "decoder_layers": 1, "sentinels": 10},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, folder, results by variant and runtime)."""
    folder = tmp_path_factory.mktemp(request.param)
    text = write_text(folder / "text")
    create = {
        "family": request.param,
        "preset": "1m",
        "hidden": 32,
        "layers": 1,
        "heads": 2,
        "context": 64,
        "intermediate": 64,
    }
    recipe = write_recipe(
        folder / "tiny.yaml", text,
        model={"create": create | SHAPES[request.param]},
        base=[{"train": {"tokens": 2048, "batch": 4}}],
        variants={"int8": ["quantize_round", {"export_onnx": {"check_tokens": 32}}]},
    )  # fmt: skip
    outcome = invoke("run", recipe, "-o", folder / "run")
    assert outcome.code == 0, outcome.err
    lines = (folder / "run" / "results.jsonl").read_text().splitlines()
    return request.param, folder / "run", {(r["variant"], r["runtime"]): r for r in map(json.loads, lines)}


def test_every_variant_is_measured_in_every_runtime(run):
    family, folder, results = run
    assert set(results) == {("base", "torch"), ("int8", "torch"), ("int8", "onnxruntime")}
    assert all(r["nll"] > 0 and r["prefill_tokens_per_second"] > 0 for r in results.values())
    assert 0 < results["int8", "torch"]["kl_to_base"] < 0.1
    # both read the same codes
    assert results["int8", "onnxruntime"]["nll"] == pytest.approx(results["int8", "torch"]["nll"], abs=0.01)
    assert {r["bits_per_byte"] for r in results.values()} == {None}
    record = RunRecord.read(folder / "run.json")
    assert record.data.train_tokens > 0
    assert record.references == []  # n-grams go on with a text, and are asked for nothing else
    assert f"created here: {family} 1m" in (folder / "base" / "manifest.json").read_text()


def test_what_lies_there_is_a_stock_checkpoint(run):
    family, folder, results = run
    kind = {"bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration"}[family]
    model = getattr(transformers, kind).from_pretrained(folder / "base", dtype=torch.float32).eval()
    assert model.config.architectures == [kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    windows = np.load(folder / "evaluation.npy")
    assert len(tokenizer) == model.config.vocab_size == SHAPES[family]["vocab_size"]
    if family == "bert":
        assert set(windows[:, 0]) == {tokenizer.cls_token_id}
        assert set(windows[:, -1]) == {tokenizer.sep_token_id}
        return
    source, target = (torch.from_numpy(half).long() for half in (windows[:, :16], windows[:, 16:]))
    with torch.no_grad():
        wanted = float(model(input_ids=source, labels=target).loss)  # stock: shifted by the padding token
    assert results["base", "torch"]["nll"] == pytest.approx(wanted, rel=1e-5)


def test_a_second_run_makes_nothing_again(run):
    _, folder, _ = run
    outcome = invoke("run", folder / "recipe.yaml", "-o", folder)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("done before") == 3
    assert "create" not in outcome.err


def test_the_names_that_training_asks_for_are_there(run: tuple[str, Path, Any]):
    family, folder, _ = run
    bundle = Bundle.load(folder / "int8")
    assert bundle.tokenizer.model_max_length == 64
    if family == "bert":
        assert bundle.tokenizer.mask_token_id == 4
        assert list(bundle.tokenizer("a", "b")["token_type_ids"])[-1] == 1
    else:
        assert bundle.tokenizer.convert_tokens_to_ids("<extra_id_0>") == 369
        assert bundle.model.config.decoder_start_token_id == bundle.tokenizer.pad_token_id == 0
