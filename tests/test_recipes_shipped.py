"""Every recipe that is shipped runs, tiny, to its last artifact; its page shows the file and what it left."""

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from doc_pages import run_page
from tiny_recipes import BUDGET, DATA, tiny

from compress.artifact.bundle import Bundle
from compress.artifact.counts import weight_file_bytes
from compress.models.heads import labels_of
from compress.records.manifest import Manifest
from compress.run.pipeline import make
from compress.run.preflight import preflight
from compress.run.recipe import Recipe, load_recipe, shipped
from compress.tasks.registry import task_of

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "recipes"
# test_cli_demo.py runs the demo, test_cli_commands.py smollm2
DOCUMENTED = [name for name in shipped() if name not in ("demo", "smollm2")]
LABELLED = {  # name -> the task of what it leaves
    "classifier": "sequence-classification", "entities": "token-classification",
    "embedder": "embedding", "reranker": "regression", "summarise": "seq2seq",
}  # fmt: skip


def source(name: str) -> str:
    return (files("compress.run.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def test_there_are_ten_for_a_model_and_text_and_five_for_labels() -> None:
    assert len(DOCUMENTED) == 15
    assert set(LABELLED) < set(DOCUMENTED)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_learnt_small_from_a_model_made_here(name: str, tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(source(name))
    content["model"]["create"] |= {"hidden": 64, "heads": 4, "intermediate": 128, "vocab_size": 450}
    content["model"]["passes"] = [{"train": {"tokens": 512, "batch": 4}}]
    small = tiny(content, tmp_path / "no model", tmp_path / "no text")
    small["data"] = {**DATA, "window": 64}
    small["data"]["labelled"] = {
        **content["data"]["labelled"], "train_rows": 60, "evaluation_rows": 20, "heldout_rows": 20,
    }  # fmt: skip
    recipe = Recipe.parse({**small, "model": content["model"]})
    assert [step.name() for step in recipe.base.passes] == ["train", "finetune", "export_onnx"]
    folder = tmp_path / "run"
    folder.mkdir()
    preflight(recipe, folder)
    made = make(recipe, folder)
    for variant in recipe.ordered():
        bundle = Bundle.load(folder / variant)
        task = task_of(bundle.model.config)
        assert str(task) == LABELLED[name]
        assert task.judged_by(made.evaluation.kind)
        assert task.embeds or labels_of(bundle.model.config) == made.evaluation.names
        graph = "decoder_model.onnx" if task.writes else "model.onnx"
        assert (folder / variant / "onnx" / graph).is_file()


@pytest.mark.parametrize("name", LABELLED)
def test_a_model_and_rows_take_the_places_of_what_is_made_here(name: str) -> None:
    recipe = load_recipe(name, model={"checkpoint": "m"}, data={"labelled": "rows.csv"})
    assert [step.name() for step in recipe.base.passes] == ["finetune", "export_onnx"]
    assert (recipe.data.labelled.source, recipe.model.checkpoint) == ("rows.csv", "m")
    again = Recipe.parse(yaml.safe_load(load_recipe(name).to_yaml()))
    assert again.base == load_recipe(name).base, "written out, the passes are the base's"


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in LABELLED])
def test_its_page_runs_tiny_to_the_last_artifact(name: str, page_folder: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(source(name))
    assert content["model"] == {"checkpoint": None}, "the model is given with --model"
    run_page(PAGES / f"{name}.md", page_folder)
    run = page_folder / "runs" / name
    recipe = load_recipe(str(run / "recipe.yaml"))
    ids = torch.arange(64)[None] % 300
    for variant in recipe.ordered():
        model = Bundle.load(run / variant).model
        with torch.no_grad():
            assert torch.isfinite(model(ids % model.config.vocab_size).logits).all(), variant
        for step in recipe.chain(variant).passes:
            if step.kind == "export":
                folder = run / variant / step.name().removeprefix("export_").replace("_", "-")
                assert any(folder.iterdir()), folder
    PROMISES.get(name, lambda run: None)(run)


def size_is_met_from_below(run: Path) -> None:
    for served in ("small", "small-onnx/onnx"):
        size = sum(file.stat().st_size for file in (run / served).iterdir() if file.is_file())
        assert 0.9 * BUDGET < size <= BUDGET, served


def codes_keep_every_zero(run: Path) -> None:
    for variant in ("codes", "healed-codes"):
        bundle = Bundle.load(run / variant)
        assert Manifest.read(run / variant / "manifest.json").lineage.names[-1] == "store_sparse"
        assert bundle.masks
        for name in bundle.masks:
            weight = bundle.model.get_submodule(name).weight
            assert int((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) <= 2, name


def half_is_left(run: Path) -> None:
    whole = sum(p.numel() for p in Bundle.load(run / "base").model.parameters())
    left = sum(p.numel() for p in Bundle.load(run / "half").model.parameters())
    assert 0.4 * whole < left <= 0.5 * whole


def fewer_bytes_than_weights(run: Path) -> None:
    weights = sum(p.numel() for p in Bundle.load(run / "base").model.parameters())
    assert weight_file_bytes(run / "coded-tuned") < 0.75 * weights


PROMISES: dict[str, Callable[[Path], None]] = {
    "fit-size": size_is_met_from_below,
    "two-of-four": codes_keep_every_zero,
    "half-healed": half_is_left,
    "smallest-download": fewer_bytes_than_weights,
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_its_page_shows_the_file_and_has_a_place_for_results(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert source(name) in blocks, f"docs/recipes/{name}.md: show compress/run/recipes/{name}.yaml as it is"
    assert page.count("<!-- results:begin -->") == page.count("<!-- results:end -->") == 1
    for heading in ("## When", "## The recipe", "## Serving what it leaves", "## Results"):
        assert heading in page, heading


def test_no_page_is_left_over() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} - {"index"} == set(DOCUMENTED)
