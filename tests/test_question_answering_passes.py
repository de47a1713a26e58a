"""Models that find answers are trained, taught, pruned and rounded as others are."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from question_models import answers, finder, labelled, questions

import compress
from compress.errors import UserError
from compress.formats import Int8, QuantizedLinear
from compress.measure.quality import score, summarise
from compress.models.heads import labels_of, with_head
from compress.structured.probes import Prober, answer, distance, one_answer, unit
from compress.structured.probes import loss as probed_loss
from compress.tasks.question_answering import QUESTION_ANSWERING
from compress.tasks.registry import task_of
from compress.text.labelled.base import Labelled, Row
from compress.training.augmentation import Augment, Augmented
from compress.training.example_batches import padded, padded_targets
from compress.training.objectives.labelled import heldout_loss, label_loss, unpadded
from compress.training.teaching.soft_labels import rows_for, soft_loss

TUNED = {"epochs": 12, "batch": 16, "learning_rate": 5e-3, "heldout_points": 2}


def given(train=60, seed=0, **options) -> Labelled:
    rows = tuple(questions(train + 60, seed, **options))
    return Labelled("tiny", "span", (), rows[:train], rows[train : train + 20], rows[train + 20 :])


def judged(bundle, data):
    return summarise(score(answers(bundle), data.evaluation, task=task_of(bundle.model.config)), None, 0)


def padded_batch(items):
    ids, mask, types = padded(items, 0)
    targets = padded_targets(items, ids.shape[1], "span")
    ids, mask, types, targets = (torch.from_numpy(each) for each in (ids, mask, types, targets))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_of_a_padded_batch_is_the_mean_of_its_texts_alone(smoothing):
    bundle, data = finder(), labelled(finder())
    items = [data.train[0], data.train[len(data.train) - 1], data.train[20]]
    inputs, targets = padded_batch(items)
    assert not inputs["attention_mask"].all(), "the case that is meant"
    loss = label_loss("span", smoothing)
    with torch.inference_mode():
        said = QUESTION_ANSWERING.given(bundle.model(**inputs))
        together = loss(unpadded(QUESTION_ANSWERING, said, inputs["attention_mask"]), targets)
        alone = []
        for item in items:
            own, right = padded_batch([item])
            out = bundle.model(**own)
            alone += [
                float(F.cross_entropy(logits, right[:, end], label_smoothing=smoothing))
                for end, logits in enumerate((out.start_logits, out.end_logits))
            ]
    assert float(together) == pytest.approx(np.mean(alone), abs=1e-5)


def test_its_gradient_is_finite_and_leaves_padding_alone():
    logits = torch.zeros(2, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    label_loss("span", 0.1)(
        unpadded(QUESTION_ANSWERING, logits, mask), torch.tensor([[1, 2], [0, 0]])
    ).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[1, 3:].any()
    assert logits.grad[1, :3].all()


def test_the_held_out_score_is_that_of_measuring():
    bundle, data = finder(), labelled(finder(), longest=24)
    assert len(data.evaluation) > len(data.evaluation.rows), "long contexts are among them"
    found = heldout_loss(bundle.model, QUESTION_ANSWERING, data.evaluation, 0, "float32", "score")
    assert 1 - found == pytest.approx(judged(bundle, data).score)
    found = heldout_loss(bundle.model, QUESTION_ANSWERING, data.evaluation, 0, "float32", "loss")
    assert found == pytest.approx(judged(bundle, data).nll, rel=1e-5)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_a_new_head_stands_on_the_same_body_and_stock_transformers_loads_it(family, tmp_path):
    body = finder(family, head="ForMaskedLM")
    model = with_head(body.model, QUESTION_ANSWERING, (), 0)
    assert type(model).__name__ == f"{family}ForQuestionAnswering"
    assert task_of(model.config) is QUESTION_ANSWERING
    assert labels_of(model.config) == ()
    assert model.config.num_labels == 2
    own = body.model.base_model.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, own[name])
    assert with_head(model, QUESTION_ANSWERING, (), 1) is model
    body.evolve(model=model).save(tmp_path / "saved")
    again = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(7, 30)[None]
    with torch.inference_mode():
        one, other = model(input_ids=ids), again(input_ids=ids)
    torch.testing.assert_close(one.start_logits, other.start_logits)
    torch.testing.assert_close(one.end_logits, other.end_logits)
    loaded = compress.load(tmp_path / "saved")
    assert task_of(loaded.model.config) is QUESTION_ANSWERING


@pytest.fixture(scope="module")
def tuned():
    """A model that learnt to find answers, and the data."""
    data = given(240)
    return finder(head="ForMaskedLM").apply(compress.Finetune(**TUNED), labelled=data), data


def test_fine_tuning_learns_to_find_answers_and_to_find_none(tuned):
    bundle, data = tuned
    assert bundle.notes["task"] == "question-answering"
    assert bundle.notes["head"] == "new"
    assert bundle.notes["cut_off"] == 0
    quality = judged(bundle, labelled_of(bundle, data))
    assert quality.score > 0.7
    assert quality.metrics["no_answer_accuracy"] > 0.5
    assert 1 - bundle.notes["heldout_after"] > 0.7, "it stops by F1"


def labelled_of(bundle, data):
    from compress.artifact.labels import labelled_for

    return labelled_for(bundle.model, bundle.tokenizer, data)


def test_a_student_is_taught_both_ends(tuned):
    teacher, data = tuned
    student = teacher.apply(compress.Student(blocks=1, weights="random"))
    fields = {"epochs": 8, "batch": 16, "optimizer": "adamw", "learning_rate": 5e-3, "temperature": 2}
    taught = student.apply(compress.Distill(**fields, hidden=1), labelled=data, base=teacher)
    own = labelled_of(teacher, data)
    before, after = (judged(each, own).score for each in (student, taught))
    assert after > before + 0.2
    assert taught.notes["task"] == "question-answering"


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_the_soft_loss_is_the_mean_over_ends_of_each_text_alone(divergence):
    student, teacher, data = finder(), finder(seed=1), labelled(finder())
    items = [data.train[0], data.train[len(data.train) - 1]]

    def soft(items):
        inputs, _ = padded_batch(items)
        with torch.inference_mode():
            rows = [
                rows_for("span", unpadded(QUESTION_ANSWERING, QUESTION_ANSWERING.given(each.model(**inputs)),
                                          inputs["attention_mask"]))
                for each in (student, teacher)
            ]  # fmt: skip
        return float(soft_loss("span", *rows, divergence, 2.0))

    assert soft(items) == pytest.approx(np.mean([soft([item]) for item in items]), abs=1e-5)
    if divergence == "forward_kl":
        inputs, _ = padded_batch(items[:1])
        with torch.inference_mode():
            wanted = 0.0
            for name in ("start_logits", "end_logits"):
                p, q = ((getattr(m.model(**inputs), name) / 2).log_softmax(-1) for m in (teacher, student))
                wanted += 4 * float((p.exp() * (p - q)).sum()) / 2
        assert soft(items[:1]) == pytest.approx(wanted, abs=1e-5)


def test_plain_text_alone_teaches_what_the_teacher_says_of_it(tuned, tmp_path):
    teacher, data = tuned
    student = teacher.apply(compress.Student(blocks=1, weights="random"))
    (tmp_path / "plain.txt").write_text("\n".join(f"{row.text} {row.pair}" for row in data.train * 4))
    fields = {"tokens": 6000, "window": 16, "batch": 8, "optimizer": "adamw", "learning_rate": 5e-3}
    taught = student.apply(
        compress.Distill(unlabelled=1, **fields), text=tmp_path / "plain.txt", base=teacher
    )
    assert taught.notes["heldout_after"] < 0.5 * taught.notes["heldout_before"]


def test_a_pruned_model_is_judged_by_its_answers_and_heals(tuned):
    bundle, data = tuned
    pruned = bundle.apply(compress.PruneStructured(neurons=0.5, importance="taylor"), labelled=data)
    assert pruned.model.config.intermediate_size == 32
    assert type(pruned.model).__name__ == "BertForQuestionAnswering"
    healed = pruned.apply(compress.Finetune(**{**TUNED, "epochs": 3}), labelled=data)
    assert healed.notes.get("head") is None, "it keeps the head it has"
    assert judged(healed, labelled_of(bundle, data)).score > 0.6


def test_probes_of_answers_equal_their_definitions():
    bundle, other, data = finder(), finder(seed=1), labelled(finder())
    texts = Prober(data).texts(bundle.model, torch.zeros(4, 16, dtype=torch.long))
    assert unit(QUESTION_ANSWERING) == "nats per end"
    scale = []
    for text in texts[:6]:
        with torch.no_grad():
            p, q = answer(bundle.model, text), answer(other.model, text)
            out = bundle.model(
                **text.inputs, start_positions=text.targets[:1], end_positions=text.targets[1:]
            )
            logits = torch.cat((out.start_logits, out.end_logits))
        torch.testing.assert_close(p, logits.log_softmax(-1))
        assert probed_loss(bundle.model, text).item() == pytest.approx(float(out.loss), abs=1e-5)
        wanted = np.mean(
            [float(F.kl_div(q[end], p[end], log_target=True, reduction="sum")) for end in (0, 1)]
        )
        assert distance(QUESTION_ANSWERING, p, q) == pytest.approx(wanted, abs=1e-5)
        even = torch.full_like(p, 1 / p.shape[1]).log()
        scale.append(distance(QUESTION_ANSWERING, p, even))
    with torch.no_grad():
        wanted = [answer(bundle.model, text) for text in texts[:6]]
    assert one_answer(QUESTION_ANSWERING, wanted) == pytest.approx(np.mean(scale), abs=1e-5)


def test_a_target_is_met_by_the_loss_of_answers(tuned):
    bundle, data = tuned
    target = {"parameters": 0.9, "take": ["neurons"], "fit_windows": 1, "judge_windows": 1, "largest_loss": 5}
    pruned = bundle.apply(compress.PruneStructured(target=target), labelled=data)
    assert pruned.notes["target"]["loss"] >= 0


def test_rounding_takes_the_head_too(tuned):
    bundle, data = tuned
    coded = bundle.apply(compress.QuantizeGPTQ(format=Int8()), labelled=data)
    assert isinstance(coded.model.qa_outputs, QuantizedLinear)
    own = labelled_of(bundle, data)
    assert judged(coded, own).score == pytest.approx(judged(bundle, own).score, abs=0.05)


def test_questions_are_changed_and_contexts_stay():
    data = labelled(finder(), train=40, longest=24, none=0.3)
    assert len(data.train) > len(data.train.rows)
    settings = Augment(replace=0.5, share=1.0)
    tokenizer = finder().tokenizer
    changed = Augmented(data.train, settings, tokenizer, 24, 0).changed(0)
    assert changed
    for number, item in changed.items():
        own = data.train[number]
        row = data.train.rows[data.train.order[number]]
        assert item.passage.text in row.pair
        assert item.passage.answers == own.passage.answers
    assert any(item.ids[1:6].tolist() != data.train[n].ids[1:6].tolist() for n, item in changed.items())


def test_what_fits_no_answers_is_refused_in_one_line(tmp_path):
    bundle, data = finder(head="ForMaskedLM"), given(30)
    for fields, match in (
        ({"class_weights": "balanced"}, "finetune.class_weights: labels of the kind 'span' have no classes"),
        ({"sampling": "balanced"}, "finetune.sampling: balanced is for one label per text, not 'span'"),
    ):
        with pytest.raises(UserError, match=match):
            bundle.apply(compress.Finetune(**fields), labelled=data)
    rows = tuple(Row(f"cup {number}", "ab"[number % 2]) for number in range(9))
    classes = Labelled("tiny", "class", ("a", "b"), rows, rows, rows)
    with pytest.raises(UserError, match="of the kind 'class', and the model is a model that finds answers"):
        finder().apply(compress.Distill(epochs=1), labelled=classes, base=finder())
    swapped = finder().apply(compress.Finetune(epochs=1), labelled=classes)
    assert type(swapped.model).__name__ == "BertForSequenceClassification", "a new head"
    finder().save(tmp_path / "finder")
    with pytest.raises(UserError, match="finds answers .*labels of the kind 'class' do not judge"):
        compress.measure(tmp_path / "finder", labelled=classes)
    swapped.save(tmp_path / "classifier")
    with pytest.raises(UserError, match="is a classifier .*labels of the kind 'span' do not judge"):
        compress.measure(tmp_path / "classifier", labelled=data)
