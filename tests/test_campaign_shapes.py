"""A sample of the campaign's shapes; and it sees what is wrong with one."""

import random

import pytest
from campaign import shape_checks, shapes
from campaign.core import Settings, table
from campaign.shape_models import SHAPES

from compress.errors import UserError


@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        ("llama-3.1-8b", "right", ""),  # three files, bfloat16, scaled positions
        ("gpt2", "right", ""),  # transposed layers, one table twice, odd heads
        ("phi-3-mini-128k", "refused", "rope_type 'longrope' changes with the text's length"),
        ("jamba", "refused", "model_type 'jamba' is not supported"),  # a state beside keys, experts
        ("minilm", "right", ""),  # traced, float16, hidden states
    ],
)
def test_right_or_refused(name, verdict, reason, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    if SHAPES[name].kind != "decoder":  # traced, which takes seconds each time
        monkeypatch.setattr(shapes, "CHAINS", {"int8": shapes.CHAINS["int8"]})
    found = shapes.outcome(name, 3, tmp_path)
    assert found.verdict == verdict, found.detail
    assert reason in found.detail
    assert found.again == f"python -m tests.campaign.shapes {name} --seed 3"


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(shape_checks, "TOLERANCE", -1.0)
        found = shapes.outcome("llama-head-of-80", 0, tmp_path / "wrong")
    assert found.verdict == "wrong"
    for place in ("base: stock reload", "base: torch logits", "int8: torch in parts", "int4: torch logits"):
        assert f"{place}: differs by" in found.detail
    for error, verdict in ((UserError("no"), "refused late"), (ValueError("no"), "traceback")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(shapes.api, "make_artifacts", fails)
        assert shapes.outcome("llama-head-of-80", 0, tmp_path / verdict).verdict == verdict


def test_every_shape_comes_once_before_one_comes_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "outcome", lambda name, seed, folder: shapes.Outcome("all", f"{name} {seed}"))
    drawn = [found.verdict for found in shapes.run(Settings(4, 7, tmp_path, jobs=2))]
    names = list(SHAPES)
    random.Random(7).shuffle(names)
    assert drawn == [f"{name} 7" for name in names[:4]]
    assert "| all | 4 |" in table(list(shapes.run(Settings(4, 7, tmp_path))))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_is_an_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "outcome", lambda *_: shapes.sys.exit(3))
    found = shapes.apart("gpt2", 0, tmp_path)
    assert (found.target, found.verdict, found.bad) == ("decoder", "died", True)
