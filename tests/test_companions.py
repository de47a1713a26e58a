"""Pooling and prompts of sentence-transformers travel with the model, and decide what it is judged by."""

import json

import numpy as np
import pytest
import torch
from encoder_models import tiny_encoder

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.formats import Int8
from compress.models.checkpoints import load_config, meta_model
from compress.passes.quantize_round import QuantizeRound
from compress.run.identity import identity
from compress.tasks.registry import task_of

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "m"
    tiny_encoder("embedding").save(place)
    (place / "manifest.json").unlink()  # somebody else's
    (place / "modules.json").write_text(json.dumps(MODULES))
    (place / "config_sentence_transformers.json").write_text('{"prompts": {"query": "find: "}}')
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (place / "1_Pooling").mkdir()
    (place / "2_Normalize").mkdir()
    return place


def pool(folder, **settings):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("settings", "task", "rows"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "embedding", range(7)),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "embedding-cls", [0]),
        ({"pooling_mode": "lasttoken"}, "embedding-last", [6]),
    ],
)
def test_a_text_is_pooled_as_the_files_say(folder, settings, task, rows):
    pool(folder, **settings)
    bundle = Bundle.load(folder)
    for config in (bundle.model.config, load_config(folder), meta_model(str(folder)).config):
        assert task_of(config).name == task
    window = np.arange(10, 17, dtype=np.int32)
    asked = task_of(bundle.model.config).question(window, 0)
    states = bundle.model(input_ids=torch.from_numpy(window.astype(np.int64))[None])[0][0].detach().numpy()
    kept = task_of(bundle.model.config).scoring.kept(states[asked.rows])
    np.testing.assert_allclose(kept[0], states[list(rows)].mean(0), rtol=1e-5, atol=1e-6)


def test_the_files_go_through_a_pass_and_come_back(folder, tmp_path):
    pool(folder, pooling_mode_cls_token=True)
    small = Bundle.load(folder).apply(QuantizeRound(format=Int8()))
    manifest = small.save(tmp_path / "small")
    assert "1_Pooling/config.json" in manifest.files
    again = Bundle.load(tmp_path / "small")
    names = [
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "modules.json",
        "sentence_bert_config.json",
    ]
    assert sorted(again.companions) == names
    assert all((tmp_path / "small" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert (tmp_path / "small" / "2_Normalize").is_dir(), "a step without settings"
    assert task_of(again.model.config).name == "embedding-cls"
    (tmp_path / "small" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    with pytest.raises(UserError, match="1_Pooling/config.json: missing or not of the"):
        Bundle.load(tmp_path / "small")


def test_they_are_part_of_what_a_checkpoint_is(folder):
    pool(folder, pooling_mode="mean")
    before = identity(str(folder), lambda file: file.read_text() if file.suffix == ".json" else "")
    pool(folder, pooling_mode="cls")
    assert before != identity(str(folder), lambda file: file.read_text() if file.suffix == ".json" else "")


def test_the_current_folder_is_a_folder_like_any_other(folder, monkeypatch):
    pool(folder, pooling_mode="cls")
    monkeypatch.chdir(folder)
    assert task_of(Bundle.load(".").model.config).name == "embedding-cls"


def test_what_is_not_applied_is_refused(folder):
    pool(folder, pooling_mode_max_tokens=True)
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: pools by max_tokens; what is applied"):
        Bundle.load(folder)
    pool(folder, pooling_mode="mean")
    step = {"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*MODULES, step]))
    with pytest.raises(UserError, match=r"modules\.json: 'Dense' is a step that nothing here applies"):
        Bundle.load(folder)
    for content in ("{}", "[1]", '[{"type": "x.Pooling", "path": "../../x"}]'):
        (folder / "modules.json").write_text(content)
        with pytest.raises(UserError, match=r"modules\.json: (a list of steps|refers to)"):
            Bundle.load(folder)
