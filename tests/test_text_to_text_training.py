"""Learning texts of texts: the loss, what padding does, early stopping, and a teacher's soft targets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from seq2seq_models import tiny_seq2seq
from text_to_text_models import forced, text_examples, text_labels
from training_set import tiny_context

from compress.artifact.labels import labelled_for
from compress.errors import UserError
from compress.passes.distill import Distill
from compress.passes.finetune import Finetune
from compress.tasks.seq2seq import start_token
from compress.tasks.written import row_scores
from compress.training.example_batches import ExampleBatches
from compress.training.objectives.base import Moment
from compress.training.objectives.losses import forward_kl
from compress.training.objectives.texts import greedy, heldout_texts, pairs_of, texts_of_texts
from compress.training.teaching.by_task import teaching_objective

KINDS = ["t5", "bart"]
MOMENT = Moment(0, 1, np.arange(6))


def batch(bundle, count=6, padding=3):
    """A padded batch of unlike lengths, as the loop has it: (rows, what else, its items)."""
    examples = text_examples(bundle, count)
    (part,) = ExampleBatches(examples, count, 0, padding).micro_batches(0, 1)
    more = {name: torch.from_numpy(value) for name, value in part.more.items()}
    assert (more["targets"] == -1).any()
    assert not more["attention_mask"].all()
    return torch.from_numpy(part.rows), more, [examples[n] for n in part.numbers.tolist()]


@pytest.mark.parametrize("name", KINDS)
class TestLoss:
    def test_it_is_that_of_stock_transformers(self, name):
        bundle = tiny_seq2seq(name)
        rows, more, _ = batch(bundle)
        labels = more["targets"].masked_fill(more["targets"] == -1, -100)
        stock = bundle.model(input_ids=rows, attention_mask=more["attention_mask"], labels=labels)
        objective = texts_of_texts(bundle.model, None, text_examples(bundle), bundle.tokenizer)
        asked = objective.ask(rows, more, MOMENT)
        found = objective.loss(bundle.model(**asked.inputs), asked.inputs, asked.targets, MOMENT)
        assert found.item() == pytest.approx(stock.loss.item(), rel=1e-5)
        found.backward()
        ours = {n: p.grad.clone() for n, p in bundle.model.named_parameters() if p.grad is not None}
        bundle.model.zero_grad()
        stock.loss.backward()
        for n, p in bundle.model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(ours[n], p.grad, rtol=1e-3, atol=1e-6)

    def test_padding_changes_nothing(self, name):
        bundle = tiny_seq2seq(name)
        rows, more, items = batch(bundle)
        ask = pairs_of(start_token(bundle.model), 3)
        other = pairs_of(start_token(bundle.model), 7)
        filled = rows.masked_fill(more["attention_mask"] == 0, 7)
        with torch.inference_mode():
            together = bundle.model(**ask(rows, more, MOMENT).inputs).logits
            again = bundle.model(**other(filled, more, MOMENT).inputs).logits
            for row, item in enumerate(items):
                ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in (item.ids, item.targets))
                alone = bundle.model(input_ids=ids, labels=labels).logits[0]
                for found in (together, again):
                    torch.testing.assert_close(found[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)

    def test_smoothing_spreads_a_share_over_the_vocabulary(self, name):
        bundle = tiny_seq2seq(name)
        rows, more, _ = batch(bundle)
        objective = texts_of_texts(bundle.model, None, text_examples(bundle), bundle.tokenizer, smoothing=0.2)
        asked = objective.ask(rows, more, MOMENT)
        logits = bundle.model(**asked.inputs).logits
        found = objective.loss(SimpleNamespace(logits=logits), asked.inputs, asked.targets, MOMENT)
        log_p, counts = logits.log_softmax(-1), asked.targets != -1
        right = log_p.gather(-1, asked.targets.clamp(min=0)[..., None])[..., 0]
        naive = -(0.8 * right + 0.2 * log_p.mean(-1))[counts].mean()
        assert found.item() == pytest.approx(naive.item(), rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
class TestHeldOut:
    def test_texts_of_a_padded_batch_are_those_that_stock_transformers_generates(self, name):
        for bundle in (tiny_seq2seq(name), forced(name, 9)):
            rows, more, items = batch(bundle)
            first = bundle.model.generation_config.forced_bos_token_id
            with torch.inference_mode():
                found = greedy(bundle.model, rows, more["attention_mask"], 7, {1, 2}, first)
                for item, ids in zip(items, found, strict=True):
                    written = bundle.model.generate(
                        torch.from_numpy(item.ids.astype(np.int64))[None], max_new_tokens=7, do_sample=False,
                        num_beams=1, min_length=0, eos_token_id=[1, 2],
                    )[0, 1:].tolist()  # fmt: skip
                    assert ids == [token for token in written if token not in (1, 2)]

    def test_loss_and_score_are_those_that_measuring_has(self, name):
        bundle = tiny_seq2seq(name)
        examples = text_examples(bundle, 70)  # several batches
        found = heldout_texts(bundle.model, examples, bundle.tokenizer, "float32", "loss")
        total = 0.0
        with torch.inference_mode():
            for item in examples.items:
                ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in (item.ids, item.targets))
                total += float(bundle.model(input_ids=ids, labels=labels).loss) * labels.numel()
        assert found == pytest.approx(total / sum(len(item.targets) for item in examples.items), rel=1e-5)
        limit = max(len(item.targets) for item in examples.items)
        texts = []
        with torch.inference_mode():
            for item in examples.items:
                ids = torch.from_numpy(item.ids.astype(np.int64))[None]
                (text,) = greedy(bundle.model, ids, torch.ones_like(ids), limit, {1, 2})
                texts.append(bundle.tokenizer.decode(text, skip_special_tokens=True))
        right = [examples.rows[place].label for place in examples.order]
        score = heldout_texts(bundle.model, examples, bundle.tokenizer, "float32", "score")
        assert score == pytest.approx(1 - float(row_scores(texts, right).mean()))


@pytest.mark.parametrize("name", KINDS)
def test_what_follows_from_the_source_is_learnt_and_written(name):
    bundle = tiny_seq2seq(name)
    tuned = bundle.apply(
        Finetune(epochs=15, batch=8, learning_rate=4e-3, precision="float32"), labelled=text_labels()
    )
    assert tuned.notes["heldout_after"] < 0.2 < 0.8 < tuned.notes["heldout_before"], "one minus ROUGE-L"
    assert (tuned.notes["stop_by"], tuned.notes["cut_off"]) == ("score", 0)
    data = labelled_for(bundle.model, bundle.tokenizer, text_labels()).evaluation
    tuned.model.generation_config.eos_token_id = [1, 2]
    hits = 0
    for number, item in enumerate(data.items):
        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        written = tuned.model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=1, min_length=0)
        text = tuned.tokenizer.decode(written[0, 1:], skip_special_tokens=True)
        hits += text == data.rows[data.order[number]].label
    assert hits > 0.8 * len(data)


def test_adapters_learn_texts_too():
    labels, bundle = text_labels(), tiny_seq2seq("t5")
    tuned = bundle.apply(
        Finetune(epochs=3, batch=16, learning_rate=5e-3, stop_by="loss", lora={"rank": 4}), labelled=labels
    )
    assert tuned.notes["heldout_after"] < 0.8 * tuned.notes["heldout_before"]
    assert tuned.notes["lora"]["layers"] == 32


class TestTeacher:
    def context(self, tmp_path, teacher, labels=True):
        context = tiny_context(teacher, tmp_path, teacher)
        data = context.data
        found = labelled_for(teacher.model, teacher.tokenizer, text_labels()) if labels else None
        context.data = type(data)(**{**vars(data), "labelled": found})
        return context

    def test_its_soft_targets_are_learnt_where_tokens_are_no_padding(self, tmp_path):
        teacher, student = tiny_seq2seq("t5"), tiny_seq2seq("t5", seed=4)
        settings = Distill(epochs=1, batch=8, temperature=2.0, cross_entropy=0.3, stop_by="loss")
        objective = teaching_objective(settings, student, self.context(tmp_path, teacher))
        assert objective.notes["examples"] == 48
        rows, more, items = batch(student)
        asked = objective.ask(rows, more, MOMENT)
        found = objective.loss(student.model(**asked.inputs), asked.inputs, asked.targets, MOMENT)
        soft = hard = 0.0
        tokens = 0
        with torch.inference_mode():
            for item in items:
                ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in (item.ids, item.targets))
                y, z = (m.model(input_ids=ids, labels=labels).logits[0] for m in (teacher, student))
                soft += float(forward_kl(z, y, 2.0)) * len(z)
                hard += float(F.cross_entropy(z, labels[0])) * len(z)
                tokens += len(z)
        assert found.item() == pytest.approx((0.7 * soft + 0.3 * hard) / tokens, rel=1e-4)
        assert objective.heldout is not None

    def test_plain_text_is_learnt_between_and_alone(self, tmp_path):
        teacher = tiny_seq2seq("t5")
        student = tiny_seq2seq("t5", seed=4)
        for share, plain in ((0.0, [False] * 4), (0.5, [False, True] * 2), (1.0, [True] * 4)):
            settings = Distill(tokens=512, batch=8, unlabelled=share, spans=0.0)
            objective = teaching_objective(settings, student, self.context(tmp_path, teacher))
            kinds = []
            for step in range(4):
                (part,) = objective.material.micro_batches(step, 1)
                more = {name: torch.from_numpy(value) for name, value in part.more.items()}
                asked = objective.ask(torch.from_numpy(part.rows), more, Moment(step, 4, part.numbers))
                kinds.append("attention_mask" not in asked.inputs)
            assert kinds == plain
            assert ("stop_by" in objective.notes) == (share < 1)

    def test_without_such_rows_it_is_taught_by_spans_and_a_share_is_refused(self, tmp_path):
        teacher, student = tiny_seq2seq("t5"), tiny_seq2seq("t5", seed=4)
        context = self.context(tmp_path, teacher, labels=False)
        settings = Distill(tokens=512, batch=8, spans=0.0)
        assert "spans" in teaching_objective(settings, student, context).notes
        with pytest.raises(UserError, match=r"distill.unlabelled: there are no labelled rows with targets"):
            teaching_objective(settings.model_copy(update={"unlabelled": 0.5}), student, context)

    def test_a_student_learns_from_rows(self):
        labels, teacher = text_labels(), tiny_seq2seq("t5")
        student = tiny_seq2seq("t5", seed=4)
        step = Distill(epochs=2, batch=16, learning_rate=3e-3, stop_by="loss")
        taught = student.apply(step, labelled=labels, base=teacher)
        assert taught.notes["heldout_after"] < taught.notes["heldout_before"]
        assert taught.notes["examples"] == 48
