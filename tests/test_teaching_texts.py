"""A teacher of hidden tokens, of answers and of embeddings: equations, and that students come nearer."""

import numpy as np
import pytest
import torch
from encoder_models import tiny_encoder
from seq2seq_models import tiny_seq2seq
from taught_models import labelled_context, tiny_body
from training_set import equal, weights

from compress.errors import UserError
from compress.passes.distill import Distill
from compress.tasks.base import UNKNOWN
from compress.training.objectives.base import Moment
from compress.training.teaching.by_task import teaching_objective
from compress.training.teaching.embedding import cosine_distance, pooled, similarity_distance

FEW = {"epochs": 2.0, "batch": 8, "heldout_points": 2, "optimizer": "adamw", "learning_rate": 3e-3}
MOMENT = Moment(0, 10, np.arange(4))
ROWS = torch.randint(10, 90, (4, 24), generator=torch.Generator().manual_seed(0))


def kl(z, y, temperature):
    q, p = (torch.softmax(x / temperature, -1) for x in (z, y))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_embeddings_are_means_of_what_is_text():
    states = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = torch.stack([states[0, :3].mean(0), states[1].mean(0)])
    torch.testing.assert_close(pooled(states, mask), expected)
    torch.testing.assert_close(pooled(states, None), states.mean(1))


def test_distances_of_embeddings_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    s, t, wide = (torch.randn(5, width, generator=generator) for width in (6, 6, 9))
    expected = sum(1 - cosine(a, b) for a, b in zip(s, t, strict=True)) / 5
    assert float(cosine_distance(s, t)) == pytest.approx(expected, rel=1e-5)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum((cosine(s[i], s[j]) - cosine(wide[i], wide[j])) ** 2 for i, j in pairs) / len(pairs)
    assert float(similarity_distance(s, wide)) == pytest.approx(expected, rel=1e-5)
    turned = s @ torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert float(similarity_distance(turned, s)) == pytest.approx(0, abs=1e-10)
    assert float(similarity_distance(s[:1], t[:1])) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("kind", ["class", None])
@pytest.mark.parametrize("width", [32, 48])
def test_a_student_embeds_as_its_teacher(kind, width, tmp_path):
    """Of another width through a map that is thrown away."""
    teacher, student = tiny_body("BertModel", blocks=3, width=width), tiny_body("BertModel", seed=5)
    step = Distill(**{**FEW, "epochs": 4.0}, hidden=0.3, unlabelled=0.5 if kind else 0.0)
    result = step(student, labelled_context(kind, tmp_path, teacher))
    assert result.notes["heldout_after"] < 0.8 * result.notes["heldout_before"]
    assert weights(result).keys() == weights(student).keys()
    assert result.notes["learnt_from"] == ("labels" if kind else "plain text")


@pytest.mark.parametrize("width", [32, 48])
def test_padding_moves_no_embedding(width, tmp_path):
    teacher, student = tiny_body("BertModel", width=width), tiny_body("BertModel", seed=5)
    step = Distill(**FEW, hidden=1.0, relations=1.0)
    objective = teaching_objective(step, student, labelled_context("class", tmp_path, teacher))
    losses = []
    for longer in (0, 6):
        ids = torch.nn.functional.pad(ROWS, (0, longer), value=3)
        mask = torch.nn.functional.pad(torch.ones_like(ROWS), (0, longer))
        mask[0, 9:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad(), objective.watch(student.model):
            losses.append(float(objective.loss(student.model(**inputs), inputs, ids, MOMENT)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_only_one_teacher_places_texts_and_something_must_be_asked(tmp_path):
    student = tiny_body("BertModel")
    context = labelled_context("class", tmp_path, student)
    for fields, message in (
        ({"teachers": ({}, {})}, "each in its own way; give one"),
        ({"cosine": 0.0, "similarity": 0.0}, "with all weights at 0 nothing is learnt"),
        ({"cross_entropy": 0.5}, "distill.cross_entropy: is for the tasks"),
    ):
        with pytest.raises(UserError, match=message):
            Distill(**FEW, **fields)(student, context)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_hidden_tokens_are_taught_at_their_positions_alone(family, tmp_path):
    teacher, student = tiny_encoder(family), tiny_encoder(family, seed=4)
    step = Distill(**FEW, temperature=2.0, cross_entropy=0.25)
    context = labelled_context(None, tmp_path, teacher)
    objective = teaching_objective(step, student, context)
    with torch.no_grad():
        with objective.watch(student.model):
            asked = objective.ask(ROWS, {}, MOMENT)
            outputs = student.model(**asked.inputs)
            found = objective.loss(outputs, asked.inputs, asked.targets, MOMENT)
        hidden = asked.targets != UNKNOWN
        z, y = (b.model(**asked.inputs).logits[hidden] for b in (student, teacher))
    hard = torch.nn.functional.cross_entropy(z, asked.targets[hidden])
    torch.testing.assert_close(found, 0.75 * kl(z, y, 2.0) + 0.25 * hard, rtol=1e-4, atol=1e-5)
    assert 0 < hidden.float().mean() < 0.3


def test_a_student_fills_in_as_its_teacher(tmp_path):
    teacher = tiny_body("BertForMaskedLM", blocks=3)
    student = tiny_body("BertForMaskedLM", seed=4)
    step = Distill(**{**FEW, "epochs": 3.0}, hidden=0.5, relations=0.5)
    result = step(student, labelled_context(None, tmp_path, teacher))
    assert result.notes["heldout_after"] < result.notes["heldout_before"] - 0.2
    assert result.notes["hidden_pairs"] == [[0, 1], [1, 2]]
    again = step(student, labelled_context(None, tmp_path / "again", teacher))
    assert equal(weights(result), weights(again))


def test_answers_are_taught_over_target_tokens(tmp_path):
    teacher, student = tiny_seq2seq("t5"), tiny_seq2seq("t5", seed=4)
    step = Distill(**FEW, spans=0.0, temperature=2.0, cross_entropy=0.25)
    context = labelled_context(None, tmp_path, teacher)
    objective = teaching_objective(step, student, context)
    with torch.no_grad(), objective.watch(student.model):
        asked = objective.ask(ROWS, {}, MOMENT)
        outputs = student.model(**asked.inputs)
        found = objective.loss(outputs, asked.inputs, asked.targets, MOMENT)
        y = teacher.model(**asked.inputs).logits
    z = outputs.logits
    assert torch.equal(asked.targets, ROWS[:, 12:])
    hard = torch.nn.functional.cross_entropy(z.flatten(0, 1), asked.targets.flatten())
    torch.testing.assert_close(found, 0.75 * kl(z, y, 2.0) + 0.25 * hard, rtol=1e-4, atol=1e-5)
    result = step(student, context)
    assert result.notes["heldout_after"] < result.notes["heldout_before"] - 0.1
    with pytest.raises(UserError, match=r"distill.hidden: is for .*, and this is an encoder-decoder"):
        Distill(**FEW, hidden=1.0)(student, context)
    with pytest.raises(UserError, match=r"distill.spans: windows of 32 tokens have .* spans"):
        Distill(**FEW)(student, context)
