"""BERT-style encoders: the same passes, judged by the masked-LM loss or by the embeddings' cosine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import invoke, refused, write_recipe, write_text
from encoder_models import write_encoder

from compress.artifact.bundle import Bundle
from compress.artifact.counts import code_files
from compress.errors import UserError
from compress.measure.quality import score, summarise
from compress.models.layers import linear_layers
from compress.runtimes.torch_runtime import TorchRuntime
from compress.tasks.masked import MASKED


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=["masked", "embedding"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Any:
    """(task, checkpoint, run folder, results by variant) of a whole run through the command line."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_encoder(folder / "model", text, request.param == "masked")
    variants: dict[str, Any] = {
        "int8": ["quantize_round"],
        "rounded": [{"quantize_round": {"format": "int3"}}],
    }
    if request.param == "masked":
        variants |= {"solved": [{"quantize_gptq": {"format": "int3"}}], "sparse": ["prune_magnitude"]}
    recipe = write_recipe(
        folder / "tiny.yaml", text, model={"checkpoint": str(checkpoint)}, variants=variants
    )
    outcome = invoke("run", recipe, "-o", folder / "run")
    assert outcome.code == 0, outcome.err
    lines = (folder / "run" / "results.jsonl").read_text().splitlines()
    return request.param, checkpoint, folder / "run", {r["variant"]: r for r in map(json.loads, lines)}


def loss(task: str, result: dict[str, Any]) -> float:
    return float(result["kl_to_base" if task == "masked" else "cosine_distance"])


def test_every_pass_works_and_fewer_bits_lose_more(run):
    task, _, _, results = run
    assert 0 < loss(task, results["int8"]) < loss(task, results["rounded"])
    if task == "masked":
        assert loss(task, results["solved"]) < loss(task, results["rounded"])  # GPTQ beats rounding
        assert results["sparse"]["nonzero_parameters"] < results["sparse"]["parameters"]
    absent = ["decode_tokens_per_second", "bits_per_byte"]
    absent += ["cosine_distance"] if task == "masked" else ["nll", "perplexity", "kl_to_base"]
    assert {results["int8"][name] for name in absent} == {None}
    assert results["int8"]["prefill_tokens_per_second"] > 0


def test_the_page_tells_of_it(run):
    task, _, folder, _ = run
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert ("1 − cosine" in markdown) == (task == "embedding")
    assert ("cosine similarity" in page) == (task == "embedding")
    assert "quality was not measured" not in markdown


def test_embeddings_are_quantized_and_the_artifact_loads_again(run):
    task, checkpoint, folder, _ = run
    model = Bundle.load(folder / "int8").model
    assert type(model).__name__ == ("BertForMaskedLM" if task == "masked" else "BertModel")
    assert type(model.get_input_embeddings()).__name__ == "QuantizedEmbedding"
    if task == "masked":
        assert model.get_output_embeddings().quantized is model.get_input_embeddings().quantized
    original = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    assert sum(p.stat().st_size for p in code_files(folder / "int8")) < 0.6 * original


def test_the_masked_loss_is_that_of_a_plain_forward_pass(run):
    task, checkpoint, folder, results = run
    windows = np.load(folder / "evaluation.npy")
    tokenizer = Bundle.load(checkpoint).tokenizer
    assert set(windows[:, 0]) == {tokenizer.cls_token_id}
    assert set(windows[:, -1]) == {tokenizer.sep_token_id}
    model = Bundle.load(checkpoint).model
    if task == "embedding":
        other = Bundle.load(folder / "int8").model
        with torch.no_grad():
            ids = torch.from_numpy(windows).long()
            pair = [m(input_ids=ids).last_hidden_state.mean(1) for m in (model, other)]
        wanted = 1 - torch.nn.functional.cosine_similarity(*pair).mean()
        assert results["int8"]["cosine_distance"] == pytest.approx(float(wanted), rel=1e-2)
        return
    nats = []
    for index, window in enumerate(windows):
        asked = MASKED.question(window, index, tokenizer.mask_token_id)
        assert (asked.inputs[asked.rows] == tokenizer.mask_token_id).all()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(asked.inputs).long()[None]).logits[0]
        targets = torch.from_numpy(asked.targets).long()
        nats.append(torch.nn.functional.cross_entropy(logits[asked.rows], targets, reduction="none"))
    assert results["base"]["nll"] == pytest.approx(float(torch.cat(nats).mean()), rel=1e-5)


def test_the_pooler_and_the_head_are_no_block_layers(run):
    _, checkpoint, _, _ = run
    names = linear_layers(Bundle.load(checkpoint).model)
    assert len(names) == 2 * 6
    assert all("encoder.layer." in name for name in names)


def test_a_model_with_itself_is_at_no_distance(run, tmp_path):
    _, checkpoint, folder, _ = run
    runtime = TorchRuntime(checkpoint, threads=1)
    windows = np.load(folder / "evaluation.npy")[:2]
    kept = {"task": runtime.task, "mask_token": runtime.mask_token}
    first = score(runtime.logits, windows, keep=tmp_path, **kept)
    again = summarise(score(runtime.logits, windows, base=tmp_path, **kept), first, 1)
    assert (again.kl_to_base or 0.0) == pytest.approx(0, abs=1e-6)
    assert (again.cosine_distance or 0.0) == pytest.approx(0, abs=1e-9)


def test_what_an_encoder_cannot_do_is_said_beforehand(text, tmp_path, monkeypatch):
    checkpoint = write_encoder(tmp_path / "model", text, head=True)
    recipe = write_recipe(
        tmp_path / "tiny.yaml", text, model={"checkpoint": str(checkpoint)}, base=["export_onnx"]
    )
    monkeypatch.setattr("compress.export.onnx.trace.find_spec", lambda name: None)
    assert "export_onnx of an encoder needs the package 'onnxscript': pip install onnxscript" in refused(
        "run", recipe, "-o", tmp_path / "run"
    )
    recipe = write_recipe(
        tmp_path / "tiny.yaml",
        text,
        model={"checkpoint": str(checkpoint)},
        base=[{"prune_gradual": {"towards": "text"}}],
    )
    line = refused("run", recipe, "-o", tmp_path / "run")  # it would see the tokens that it predicts
    assert (
        "base.passes.0.prune_gradual: does not take an encoder (model_type 'bert'); those that do: " in line
    )
    with pytest.raises(UserError, match="no mask token"):
        MASKED.question(np.arange(8, dtype=np.int32), 0, None)
