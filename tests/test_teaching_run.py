"""Classifiers that are cut, taught and judged in a run, and what is known to fail before it."""

import json
from pathlib import Path

import yaml
from cli_helpers import invoke, refused, write_text
from encoder_models import write_encoder

from compress.artifact.bundle import Bundle
from compress.models.heads import labels_of

FEW = {"epochs": 1, "batch": 8, "heldout_points": 1, "optimizer": "adamw", "learning_rate": 1e-3}


def write_labels(file: Path) -> Path:
    """Texts in the tokenizer's own words, labelled by what they are about."""
    words = {
        "sizes": "small large model weight",
        "files": "file folder read write",
        "steps": "step run train save",
    }
    rows = ["text,label"]
    for number in range(90):
        label = ("sizes", "files", "steps")[number % 3]
        own = words[label].split()
        text = [own[(number + place) % 3] for place in range(4)] + [f"each {number}", "value"]
        rows.append(f"{' '.join(text)},{label}")
    file.write_text("\n".join(rows) + "\n")
    return file


def write_run(folder: Path, **changes: object) -> Path:
    text = write_text(folder / "text", 24)
    write_encoder(folder / "encoder", text, head=False)
    recipe = {
        "name": "taught",
        "model": {"checkpoint": str(folder / "encoder")},
        "data": {
            "text": str(text), "window": 16, "evaluation_windows": 4, "calibration_windows": 16,
            "heldout_windows": 4,
            "labelled": {"source": str(write_labels(folder / "labels.csv"))},
        },
        "base": [{"finetune": {**FEW, "epochs": 2}}],
        "variants": {
            "student": [
                {"student": {"blocks": 1}},
                {"distill": {**FEW, "temperature": 2.0, "unlabelled": 0.3}},
            ],
            "pruned": [
                {"prune_structured": {"neurons": 0.5, "importance": "taylor", "multiple_of": 1}},
                {"distill": {**FEW, "hidden": 1.0}},
            ],
        },
        **changes,
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_a_classifier_is_cut_taught_and_judged_by_its_labels(tmp_path):
    recipe = write_run(tmp_path)
    outcome = invoke("run", recipe, "-o", tmp_path / "run", "--no-measure")
    assert outcome.code == 0, outcome.err
    bundles = {name: Bundle.load(tmp_path / "run" / name) for name in ("base", "student", "pruned")}
    labels = {name: labels_of(bundle.model.config) for name, bundle in bundles.items()}
    assert sorted(labels["base"]) == ["files", "sizes", "steps"]
    assert labels["student"] == labels["pruned"] == labels["base"]
    assert bundles["student"].model.config.num_hidden_layers == 1
    assert bundles["pruned"].model.config.intermediate_size == 32
    notes = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())["lineage"]["steps"][-1][
        "notes"
    ]
    assert (notes["task"], notes["unlabelled"], notes["stop_by"]) == ("sequence-classification", 0.3, "score")
    again = invoke("run", recipe, "-o", tmp_path / "run", "--no-measure")
    assert again.code == 0
    assert "done before" in again.out + again.err


def test_a_classifier_without_labelled_texts_is_told_before_any_work(tmp_path):
    write_run(tmp_path)
    classifier = tmp_path / "classifier"
    made = invoke("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run", "--no-measure")
    assert made.code == 0, made.err
    Bundle.load(tmp_path / "run" / "base").save(classifier)
    base = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    data = {name: value for name, value in base["data"].items() if name != "labelled"}
    lacking = {"model": {"checkpoint": str(classifier)}, "data": data, "base": []}
    variants = {"taught": [{"distill": dict(FEW)}]}
    recipe = tmp_path / "lacking.yaml"
    recipe.write_text(yaml.safe_dump({"name": "lacking", **lacking, "variants": variants}))
    said = refused("run", recipe, "-o", tmp_path / "other")
    assert "distill: a classifier learns from labelled texts, and there are none; give data.labelled" in said
    own = {name: value for name, value in base["data"].items() if name != "text"}
    variants = {"taught": [{"distill": {**FEW, "unlabelled": 0.5}}]}
    recipe.write_text(yaml.safe_dump({"name": "lacking", **lacking, "data": own, "variants": variants}))
    said = refused("run", recipe, "-o", tmp_path / "other")
    assert "distill.unlabelled: there is no text but that of the labelled rows" in said
    variants = {"taught": [{"distill": {**FEW, "spans": 0.1}}]}
    recipe.write_text(
        yaml.safe_dump({"name": "lacking", **lacking, "data": base["data"], "variants": variants})
    )
    said = refused("run", recipe, "-o", tmp_path / "other")
    assert "distill.spans: is for the tasks seq2seq, and this is a classifier" in said
