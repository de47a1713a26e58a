"""Structured and vocabulary pruning from the command line: healed, quantized, exported, measured."""

import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from cli_helpers import DATA, SHAPE, invoke, refused, results, write_recipe, write_text

from compress.artifact.bundle import Bundle
from compress.artifact.counts import weight_file_bytes
from compress.measure.artifacts import _trimmed
from compress.records.manifest import Manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pruning")
    plain = write_text(folder / "plain")
    (folder / "words.txt").write_text("zyxwv uvwxy qqkqk kkqkq jzjzj zjzjz\n" * 600, encoding="utf-8")
    recipe = write_recipe(
        folder / "r.yaml",
        plain,
        data={"text": [str(plain), str(folder / "words.txt")], **DATA},
        model={"create": {**SHAPE, "heads": 4, "kv_heads": 2, "vocab_size": 400}},
        variants={
            "narrow": [
                {"prune_structured": {"target": {"block_parameters": 0.6, "shapes": 2}}},
                {"export_onnx": {"check_tokens": 64}},
            ],
            "trimmed": [{"prune_vocabulary": {"text": [str(plain)]}}],
            "healed": {
                "from": "trimmed",
                "passes": [{"prune_structured": {"neurons": 0.25}}, {"distill": {"tokens": 256, "batch": 4}}],
            },
        },
    )
    outcome = invoke("run", recipe, "-o", folder / "run")
    assert outcome.code == 0, outcome.err
    return folder / "run", results(folder / "run")


def notes(folder: Path, step: str) -> dict[str, Any]:
    steps = Manifest.read(folder / "manifest.json").lineage.steps
    return next(s.notes for s in steps if s.name == step)


def test_the_target_is_met_and_the_smaller_shape_runs_everywhere(run):
    folder, results = run
    kept = notes(folder / "narrow", "prune_structured")
    assert 0.5 < kept["target"]["reached"] <= 0.6
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "narrow")
    assert model.config.intermediate_size == kept["left"]["neurons"]
    torch, onnx = results["narrow", "torch"], results["narrow", "onnxruntime"]
    assert torch["parameters"] == kept["parameters"] < results["base", "torch"]["parameters"]
    assert onnx["nll"] == pytest.approx(torch["nll"], abs=1e-3)


def test_trimmed_rows_change_nothing_but_the_file(run):
    folder, results = run
    told = notes(folder / "trimmed", "prune_vocabulary")
    assert told["rows_removed"] > 0
    removed = weight_file_bytes(folder / "base") - weight_file_bytes(folder / "trimmed")
    assert abs(removed - told["bytes_removed"]) <= 16
    trimmed = results["trimmed", "torch"]
    # an untrained model gives every row alike, so what removed rows had of the probability is their share
    assert trimmed["delta_nll"] == pytest.approx(math.log(told["rows_kept"] / told["rows"]), abs=5e-3)
    assert trimmed["kl_to_base"] == pytest.approx(0, abs=1e-5)
    assert trimmed["decode_tokens_per_second"] > 0


def test_what_follows_works_in_the_new_ids(run):
    folder, results = run
    told = notes(folder / "trimmed", "prune_vocabulary")
    assert Bundle.load(folder / "healed").model.config.vocab_size == told["rows_kept"]
    assert abs(results["healed", "torch"]["delta_nll"]) < 0.5
    assert "prune_vocabulary" in (folder / "report.html").read_text(encoding="utf-8")
    outcome = invoke("generate", folder / "healed", "--prompt", "The model", "--tokens", "4")
    assert outcome.code == 0, outcome.err


def test_artifacts_of_fewer_tokens_are_compared_with_their_base_only(run):
    folder, _ = run
    assert _trimmed(folder / "trimmed", folder / "base")
    assert not _trimmed(folder / "trimmed", None)
    assert not _trimmed(folder / "narrow", folder / "base")  # the same tokens


def test_the_base_keeps_its_vocabulary(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", write_text(tmp_path / "text"), base=["prune_vocabulary"])
    assert "cannot be part of the base" in refused("run", recipe, "-o", tmp_path / "run")
