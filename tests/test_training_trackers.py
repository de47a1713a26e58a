"""Trackers: none is needed, what is missing is told, and what they get is the record's curve."""

import json

import pytest
from cli_helpers import refused, write_recipe, write_text

from compress.errors import MissingExtra
from compress.passes.train import Train
from compress.run.pipeline import make
from compress.run.recipe import load_recipe
from compress.training import trackers

TRAINING = {"tokens": 1024, "batch": 4, "heldout_points": 2, "trackers": ["tensorboard"]}


def test_a_missing_package_is_told_with_its_command_before_any_work(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="'wandb' needs .* pip install wandb"):
        Train(trackers=("wandb",)).layers(None)


def test_an_unknown_tracker_and_a_variant_named_as_their_folder_are_refused(tmp_path):
    text = write_text(tmp_path / "text", 12)
    recipe = write_recipe(tmp_path / "r.yaml", text, base=[{"train": {"trackers": ["tensor"]}}])
    assert "train.trackers.0: 'tensor' is not valid" in refused("run", recipe)
    recipe = write_recipe(tmp_path / "r.yaml", text, variants={"logs": ["prune_magnitude"]})
    assert "variants.logs: the name is taken" in refused("run", recipe)


def test_tensorboard_shows_the_records_curve_in_the_runs_folder(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = write_recipe(tmp_path / "r.yaml", write_text(tmp_path / "text"), base=[{"train": TRAINING}])
    (tmp_path / "run").mkdir()
    make(load_recipe(str(recipe)), tmp_path / "run")
    folder = tmp_path / "run" / "logs" / "base-1-of-1-train"
    events = accumulator.EventAccumulator(str(folder / "compress")).Reload()
    manifest = json.loads((tmp_path / "run" / "base" / "manifest.json").read_text())
    curve = manifest["lineage"]["steps"][-1]["notes"]["loss_curve"]
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert len(curve) == 8
    assert shown == [(point[0], pytest.approx(point[2])) for point in curve]
    assert [e.value for e in events.Scalars("heldout")] == pytest.approx([p[3] for p in curve if p[3]])
