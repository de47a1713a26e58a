"""Labelled texts given to a call: to `apply`, to `measure` and `bench`, to the command line."""

import csv
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from cli_helpers import invoke, refused
from labelled_examples import WORDS, encoder

import compress
from compress.artifact.labels import labelled_for, rows_of_labels, seed_of
from compress.errors import UserError
from compress.models.heads import labels_of
from compress.text.labelled.as_text import text_of
from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.load import load_labelled

PROTOCOL = compress.MeasureProtocol(threads=1, prefill_tokens=16, rounds=1)
TUNED = {"epochs": 2, "batch": 8, "learning_rate": 3e-3, "heldout_points": 1}


def rows(count=80, seed=0, names=("no", "yes")):
    draw = random.Random(seed)
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randrange(8, 14))
        yield " ".join(words), names[int(words[0][1:]) < 70]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows()])
    return path


@pytest.fixture
def model(tmp_path):
    encoder(blocks=1).save(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def classifier(model, file, tmp_path):
    compress.load(model).apply(compress.Finetune(**TUNED), labelled=file).save(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_a_pass_learns_a_file_a_section_or_rows(model, file):
    bundle = compress.load(model)
    config = LabelledConfig(source=str(file))
    read = load_labelled(config)
    data = labelled_for(bundle.model, bundle.tokenizer, read)
    results = [
        bundle.apply(compress.Finetune(**TUNED), labelled=given).model.state_dict()
        for given in (file, str(file), config, read, data)
    ]
    results.append(
        bundle.apply(
            compress.Finetune(**TUNED), text=compress.DataConfig(labelled=config, window=16)
        ).model.state_dict()
    )
    for other in results[1:]:
        assert all(value.equal(other[name]) for name, value in results[0].items())
    with pytest.raises(UserError, match="labelled: finetune needs texts with labels; give labelled='FILE'"):
        bundle.apply(compress.Finetune())


def test_a_pass_that_reads_text_reads_that_of_the_labels(classifier, file, monkeypatch):
    seen = []
    monkeypatch.setattr(
        compress.QuantizeGPTQ, "__call__", lambda self, b, context: (seen.append(context.data), b)[1]
    )
    bundle = compress.load(classifier)
    bundle.apply(compress.QuantizeGPTQ(), labelled=file)
    data = labelled_for(bundle.model, bundle.tokenizer, rows_of_labels(file))
    right = text_of(compress.DataConfig(window=64), data, bundle.tokenizer)
    assert np.array_equal(seen[0].calibration.tokens, right.calibration.tokens)
    monkeypatch.undo()
    done = bundle.apply(compress.QuantizeGPTQ(format=compress.Int8(group=16)), labelled=file)
    assert done.lineage.names == ("finetune", "quantize_gptq")


def test_labels_are_numbered_as_the_models_head_does(classifier):
    bundle = compress.load(classifier)
    assert labels_of(bundle.model.config) == ("no", "yes")
    own = tuple(Row(text, label) for text, label in rows(20))
    given = Labelled("mine", "class", ("yes", "no"), own, own, own)
    other = compress.Bundle(encoder().model, bundle.tokenizer, bundle.lineage)
    turned = labelled_for(other.model, other.tokenizer, given)
    assert turned.names == ("yes", "no")
    for rows_given in (given, turned):
        data = labelled_for(bundle.model, bundle.tokenizer, rows_given)
        assert data.names == ("no", "yes")
        labels = [data.names[item.targets[0]] for item in data.train.items]
        assert labels == [own[place].label for place in data.train.order]


def test_artifacts_are_judged_by_the_rows_that_training_left_out(classifier, file, tmp_path):
    bundle = compress.load(classifier)
    bundle.apply(compress.QuantizeRound(format=compress.Int8(group=16))).save(tmp_path / "int8")
    said = []
    results = compress.bench(
        [classifier, tmp_path / "int8"], compress.DataConfig(), classifier, PROTOCOL, labelled=file,
        say=said.append,
    )  # fmt: skip
    assert said[0] == f"judged by 16 texts of {file}, the part that is left out of training"
    data = labelled_for(bundle.model, bundle.tokenizer, rows_of_labels(file)).evaluation
    hits = 0
    for item in data.items:
        logits = bundle.model(torch.from_numpy(item.ids.astype(np.int64))[None]).logits
        hits += int(logits.argmax()) == int(item.targets[0])
    assert results[0].score == pytest.approx(hits / len(data))
    measured = compress.measure(tmp_path / "int8", base=classifier, labelled=file, protocol=PROTOCOL)
    assert [r.score for r in measured] == [r.score for r in results]


def test_other_labels_and_no_labels_are_refused(classifier, model, file, tmp_path):
    with pytest.raises(
        UserError, match=r"encoder: is an encoder.* which labels of the kind 'class' do not judge"
    ):
        compress.measure(model, labelled=file)
    shutil.copytree(classifier, tmp_path / "turned")
    (tmp_path / "turned" / "manifest.json").unlink()
    config = (tmp_path / "turned" / "config.json").read_text()
    turned = config.replace('"0": "no"', '"0": "yes"').replace('"1": "yes"', '"1": "no"')
    assert turned != config
    (tmp_path / "turned" / "config.json").write_text(turned)
    told = "turned: has other labels than .*, or in another order .yes, no; no, yes.; measure it on its own"
    with pytest.raises(UserError, match=told):
        compress.measure([tmp_path / "turned"], base=classifier, labelled=file)


def test_the_command_line_takes_a_file_of_labels(model, file, tmp_path):
    recipe = {
        "name": "tiny", "seed": 3, "model": {"checkpoint": str(model)},
        "data": {"labelled": {"source": "nowhere.csv", "heldout_share": 0}, "window": 16},
        "base": [{"finetune": TUNED}], "measure": {"prefill_tokens": 16, "rounds": 1},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    planned = invoke("run", tmp_path / "tiny.yaml", "-o", tmp_path / "run", "--labelled", file, "--dry-run")
    assert "stops by the texts it trains on, since none are held out" in " ".join(planned.out.split())
    made = invoke("run", tmp_path / "tiny.yaml", "-o", tmp_path / "run", "--labelled", file, "--no-measure")
    assert made.code == 0, made.err
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["data"]["labelled"]["source"] == str(file)
    assert written["data"]["labelled"]["heldout_share"] == 0
    assert seed_of(tmp_path / "run" / "base") == 3
    measured = invoke("bench", tmp_path / "run" / "base", "--labelled", file, "-o", tmp_path / "r.jsonl")
    assert measured.code == 0, measured.err
    assert "judged by 16 texts" in measured.err
    assert [r.score_name for r in compress.read_results(tmp_path / "r.jsonl")] == ["accuracy"]
    assert "'no.csv' does not exist" in refused("bench", tmp_path / "run" / "base", "--labelled", "no.csv")


def test_rows_are_cut_as_the_run_that_made_the_artifact_cut_them(file):
    one, other = (rows_of_labels(file, seed).evaluation for seed in (0, 3))
    assert one != other
    assert rows_of_labels(file).evaluation == one


def test_a_short_section_is_set_whole(tmp_path, file, model):
    recipe = {"name": "tiny", "model": {"checkpoint": str(model)}, "data": {"labelled": "nowhere.csv"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    found = compress.load_recipe(str(tmp_path / "tiny.yaml"), data={"labelled": {"source": str(file)}})
    assert found.data.labelled == LabelledConfig(source=str(file))
