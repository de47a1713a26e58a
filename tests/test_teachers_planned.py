"""Whether a teacher can teach is known before the first step: a dry run refuses what the step would."""

import json
import shutil

import pytest
from cli_helpers import invoke, refused
from training_set import documents, tiny_bundle


@pytest.fixture
def plan(bundle, tmp_path):
    """`plan(teacher, step, *more)`: the words of a dry run whose variant learns from a folder."""
    bundle.save(tmp_path / "student")
    text = tmp_path / "text.txt"
    text.write_text("".join(document.text for document in documents()), encoding="utf-8")

    def words(teacher, before=(), **step):
        content = {
            "name": "taught",
            "model": {"checkpoint": str(tmp_path / "student")},
            "data": {"text": str(text), "window": 32, "evaluation_windows": 4, "heldout_windows": 2},
            "variants": {"small": [*before, {"distill": {"teachers": [{"model": str(teacher)}], **step}}]},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return ("run", tmp_path / "recipe.yaml", "--dry-run", "-o", tmp_path / "out")

    return words


def test_a_teacher_of_another_tokenizer_is_refused_by_the_dry_run(plan, tmp_path):
    folder = tmp_path / "teacher"
    tiny_bundle(seed=3).save(folder)
    assert invoke(*plan(folder)).code == 0
    shutil.rmtree(folder)
    tiny_bundle(vocab_size=290).save(folder)
    line = refused(*plan(folder))
    assert f"variants.small.distill: the teacher '{folder}' has another tokenizer (290 tokens)" in line
    assert "(300)" in line
    # as many tokens, two of them exchanged
    other = shutil.copytree(tmp_path / "student", tmp_path / "swapped")
    content = json.loads((other / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["x"], ids["a"] = ids["a"], ids["x"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "has another tokenizer (300 tokens)" in refused(*plan(other))


def test_a_teacher_of_a_shorter_context_is_refused_by_the_dry_run(plan, tmp_path):
    tiny_bundle(seed=3, context=48).save(tmp_path / "teacher")
    assert invoke(*plan(tmp_path / "teacher", window=48)).code == 0
    line = refused(*plan(tmp_path / "teacher", window=64))
    assert f"distill.window: 64 tokens, but the teacher '{tmp_path / 'teacher'}' takes at most 48" in line
