"""Soft labels: equations, padding that counts for nothing, what is refused, and that students learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from taught_models import LABELS, labelled_context, labelled_examples, tiny_body, tiny_classifier
from training_set import equal, weights

from compress.context import Context
from compress.errors import UserError
from compress.passes.distill import Distill
from compress.passes.finetune import Finetune
from compress.tasks.base import UNKNOWN
from compress.training.batches import Batches
from compress.training.example_batches import ExampleBatches, padded, padded_targets
from compress.training.objectives.base import Moment
from compress.training.teaching import matching
from compress.training.teaching.by_task import teaching_objective
from compress.training.teaching.material import LabelledAndText
from compress.training.teaching.soft_labels import rows_for, soft_loss

ADAM = {"optimizer": "adamw", "learning_rate": 3e-3, "schedule": "linear"}
FEW = {"epochs": 2.0, "batch": 16, "heldout_points": 2, **ADAM}
MOMENT = Moment(0, 10, np.arange(4))


def softmax(row, temperature):
    shares = [math.exp(value / temperature) for value in row]
    return [share / sum(shares) for share in shares]


def sigmoid(value, temperature):
    return 1 / (1 + math.exp(-value / temperature))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive(kind, student, teacher, targets, temperature):
    """D by its definition, text by text and label by label."""
    found = []
    for z, y, wanted in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        if kind == "class":
            found.append(kl(softmax(y, temperature), softmax(z, temperature)))
        elif kind == "tags":
            found += [
                kl(softmax(b, temperature), softmax(a, temperature))
                for a, b, label in zip(z, y, wanted, strict=True)
                if label != UNKNOWN
            ]
        elif kind == "classes":
            for a, b in zip(z, y, strict=True):
                q, p = sigmoid(a, temperature), sigmoid(b, temperature)
                found.append(kl([p, 1 - p], [q, 1 - q]))
        else:
            found.append((z[0] - y[0]) ** 2 / temperature**2)
    return temperature**2 * sum(found) / len(found)


def one_batch(kind, longer=0):
    """Inputs and targets of four texts, padded to the longest and `longer` more."""
    items = list(labelled_examples(kind, 40).items)[8::9][:4]
    ids, mask, _ = padded(items, 3)
    targets = padded_targets(items, ids.shape[1])
    ids, mask = np.pad(ids, ((0, 0), (0, longer)), constant_values=3), np.pad(mask, ((0, 0), (0, longer)))
    if kind == "tags":
        targets = np.pad(targets, ((0, 0), (0, longer)), constant_values=UNKNOWN)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return inputs, torch.from_numpy(targets)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", list(LABELS))
def test_the_soft_loss_equals_its_definition(kind, temperature):
    generator = torch.Generator().manual_seed(0)
    shape = (4, 7, 3) if kind == "tags" else (4, LABELS[kind])
    student, teacher = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    targets = torch.randint(-1, 3, shape[:2], generator=generator)
    carries = targets != UNKNOWN if kind == "tags" else None
    rows = [rows_for(kind, logits, carries) for logits in (student, teacher)]
    found = soft_loss(kind, *rows, "forward_kl", temperature)
    expected = naive(kind, student, teacher, targets, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_words_without_a_label_have_no_soft_target_and_none_at_all_is_no_loss():
    logits = torch.randn(2, 3, 4)
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert float(soft_loss("tags", *[rows_for("tags", logits, none)] * 2, "forward_kl", 1.0)) == 0


@pytest.mark.parametrize("kind", list(LABELS))
def test_the_whole_loss_is_the_mix_and_padding_does_not_change_it(kind, tmp_path):
    teacher, student = tiny_classifier(kind, blocks=3), tiny_classifier(kind, seed=1)
    temperature = 1.0 if kind == "number" else 2.0
    step = Distill(**FEW, temperature=temperature, cross_entropy=0.3, hidden=1.0, relations=1.0)
    objective = teaching_objective(step, student, labelled_context(kind, tmp_path, teacher))
    losses, softs = [], []
    for longer in (0, 5):
        inputs, targets = one_batch(kind, longer)
        with torch.no_grad(), objective.watch(student.model):
            outputs = student.model(**inputs)
            losses.append(float(objective.loss(outputs, inputs, targets, MOMENT)))
            late = Moment(9, 10, np.arange(4))  # what is inside has faded
            softs.append(float(objective.loss(student.model(**inputs), inputs, targets, late)))
            wanted = teacher.model(**inputs).logits
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0] > softs[0] + 0.01
    z = outputs.logits
    hard = {
        "class": lambda: F.cross_entropy(z, targets.flatten()),
        "tags": lambda: F.cross_entropy(z[targets != UNKNOWN], targets[targets != UNKNOWN]),
        "classes": lambda: F.binary_cross_entropy_with_logits(z, targets.float()),
        "number": lambda: F.mse_loss(z, targets.float()),
    }[kind]()
    expected = 0.7 * naive(kind, z, wanted, targets, temperature) + 0.3 * float(hard)
    assert softs[1] == pytest.approx(expected, rel=1e-4)


def test_hidden_states_and_relations_of_padding_are_left_out():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 6, 8, generator=generator), torch.randn(2, 6, 12, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    through = torch.nn.Linear(8, 12, bias=False).requires_grad_(False)
    hidden, relations = [], []
    for row, length in ((0, 4), (1, 6)):
        own = s[row : row + 1, :length], t[row : row + 1, :length]
        hidden.append(float(matching.hidden_distance(*own, through)) * length)
        relations.append(float(matching.relation_divergence(*own, 2, causal=False)) * length)
    assert float(matching.hidden_distance(s, t, through, mask)) == pytest.approx(sum(hidden) / 10, rel=1e-5)
    found = float(matching.relation_divergence(s, t, 2, False, mask))
    assert found == pytest.approx(sum(relations) / 10, rel=1e-4)
    everything = torch.ones(2, 6)
    assert torch.allclose(
        matching.relation_divergence(s, t, 2, True, everything), matching.relation_divergence(s, t, 2, True)
    )


@pytest.mark.parametrize(
    ("kind", "family"),
    [("class", "bert"), ("classes", "distilbert"), ("number", "roberta"), ("tags", "modernbert")],
)
def test_a_student_learns_its_teachers_labels(kind, family, tmp_path):
    start = tiny_classifier(kind, family)
    few = {"batch": 16, "heldout_points": 2, "optimizer": "adamw", "learning_rate": 5e-3}
    teacher = Finetune(epochs=12.0, **few)(start, labelled_context(kind, tmp_path / "t", start))
    student = tiny_classifier(kind, family, seed=3)
    context = labelled_context(kind, tmp_path / "s", teacher)
    step = Distill(
        **{**FEW, "epochs": 8.0}, unlabelled=0.25, hidden=0.5, relations=0.5, cross_entropy=0.5,
        temperature=1.0 if kind == "number" else 2.0,
    )  # fmt: skip
    before = weights(student)
    result = step(student, context)
    notes = result.notes
    assert notes["heldout_after"] < notes["heldout_before"] - 0.05
    assert notes["stop_by"] == "score"
    assert notes["steps"] == 64  # 8 epochs of 6 batches, a quarter of plain text besides
    assert equal(before, weights(student))
    assert result.model.config.id2label == student.model.config.id2label
    again = step(student, labelled_context(kind, tmp_path / "again", teacher))
    assert equal(weights(result), weights(again))


def test_plain_text_alone_teaches_what_the_teacher_says_of_it(tmp_path):
    teacher, student = tiny_classifier("class", blocks=3), tiny_classifier("class", seed=1)
    step = Distill(**{**FEW, "epochs": 4.0}, unlabelled=1.0)
    result = step(student, labelled_context(None, tmp_path, teacher))
    assert result.notes["heldout_after"] < 0.6 * result.notes["heldout_before"]
    assert "examples" not in result.notes


def test_several_teachers_of_labels_are_the_mean_of_what_they_hold_likely(tmp_path):
    first, second = tiny_classifier("classes"), tiny_classifier("classes", seed=4)
    second.save(tmp_path / "second")
    teachers = ({"weight": 3.0}, {"model": str(tmp_path / "second")})
    step = Distill(**FEW, teachers=teachers, cross_entropy=0.0, temperature=2.0)
    student = tiny_classifier("classes", seed=1)
    objective = teaching_objective(step, student, labelled_context("classes", tmp_path, first))
    inputs, targets = one_batch("classes")
    with torch.no_grad(), objective.watch(student.model):
        outputs = student.model(**inputs)
        found = objective.loss(outputs, inputs, targets, MOMENT)
        p = [torch.sigmoid(b.model(**inputs).logits / 2) for b in (first, second)]
    p, q = 0.75 * p[0] + 0.25 * p[1], torch.sigmoid(outputs.logits / 2)
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def refused(message, fields, student, context: Context):
    with pytest.raises(UserError, match=message):
        Distill(**FEW, **fields)(student, context)


def test_labels_that_are_numbered_otherwise_are_refused(tmp_path):
    student, teacher = tiny_classifier("class"), tiny_classifier("class", seed=1)
    teacher.model.config.id2label = {0: "l0", 1: "l2", 2: "l1", 3: "l3"}
    context = labelled_context("class", tmp_path, teacher)
    refused("label 1 of the teacher 'tiny' is 'l2' and of the student 'l1'", {}, student, context)
    teacher.model.config.id2label = {0: "l0", 1: "l1"}
    refused("has 2 labels and the student 4", {}, student, context)
    student.model.config.id2label = {0: "l0", 1: "l1", 2: "l3", 3: "l2"}
    refused(r"the model has 4 labels \(l0, l1, l3 \.\.\.\)", {}, student, context)


def test_what_cannot_teach_a_classifier_is_refused(tmp_path):
    student, teacher = tiny_classifier("class"), tiny_classifier("class", seed=1)
    context = labelled_context("class", tmp_path, teacher)
    refused("none; give data.labelled", {}, student, labelled_context(None, tmp_path, teacher))
    refused("of the kind 'tags'", {}, student, labelled_context("tags", tmp_path, teacher))
    other = labelled_context("class", tmp_path, tiny_body("BertForMaskedLM"))
    refused(r"teacher 'tiny' is an encoder \(masked\)", {}, student, other)
    same = labelled_context("class", tmp_path, teacher, plain=False)
    refused("no text but that of the labelled rows", {"unlabelled": 0.5}, student, same)
    for fields, name in (
        ({"targets": "cached"}, "targets"),
        ({"on_policy": 0.5}, "on_policy"),
        ({"spans": 0.1}, "spans"),
        ({"cosine": 2.0}, "cosine"),
    ):
        refused(rf"distill.{name}: is for the tasks", fields, student, context)
    number = labelled_context("number", tmp_path, tiny_classifier("number"))
    refused("distill.temperature: is for", {"temperature": 2.0}, tiny_classifier("number"), number)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_which_steps_read_plain_text_is_spread_and_leaves_no_example_out(share):
    examples = ExampleBatches(labelled_examples("class", 64), 16, 0, 3)
    both = LabelledAndText(examples, Batches(np.arange(2000, dtype=np.int32), 8, 16, 0, after=0), share)
    steps = -(-both.windows // both.batch)
    plain = [both.plain(step) for step in range(steps)]
    assert sum(plain) == pytest.approx(share * steps, abs=1)
    seen = [
        part.numbers
        for step in range(steps)
        if not plain[step]
        for part in both.micro_batches(step, 2)
        if "targets" in part.more
    ]
    assert sorted(np.concatenate(seen).tolist()) == list(range(64))
