"""What a model answers, and what is said of it beside a base, against stock calls and loops."""

import numpy as np
import pytest
import torch
from question_models import answers, cut_rows, finder, long_row, questions

from compress.measure.flips import NO_ANSWER, OTHER, PART, RIGHT, flips_of
from compress.measure.quality import Scores, score, summarise
from compress.measure.turns import Target
from compress.tasks.answers import NO_PLACE, worth
from compress.tasks.base import longest_text
from compress.tasks.question_answering import MOST_TOKENS, QUESTION_ANSWERING, Answers, best_span
from compress.tasks.registry import task_labelled, task_of
from compress.text.labelled.base import Row


def test_the_best_span_is_that_of_its_definition():
    draw = np.random.default_rng(0)
    for _ in range(20):
        rows, inside = draw.normal(size=(2, 60)).astype(np.float32), np.arange(7, 58)
        wanted = max(
            ((i, j) for i in inside for j in inside if i <= j < i + MOST_TOKENS),
            key=lambda ij: float(rows[0, ij[0]]) + float(rows[1, ij[1]]),
        )
        assert best_span(rows, inside) == wanted
    assert best_span(rows, np.zeros(0, np.int64)) is None


def by_hand(bundle, rows, silent):
    """Of each row the characters of the answer, by stock calls and loops."""
    found, longest = [], longest_text(bundle.model)
    for row in rows:
        cut = bundle.tokenizer(
            row.text, row.pair, truncation="only_second", max_length=longest, stride=(longest - 3) // 4,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best, least = (-1e30, -1, -1), 1e30
        for text, ids in enumerate(cut["input_ids"]):
            given = {"input_ids": torch.tensor([ids])}
            if "token_type_ids" in cut:
                given["token_type_ids"] = torch.tensor([cut["token_type_ids"][text]])
            with torch.inference_mode():
                said = bundle.model(**given)
            start, end = said.start_logits[0].tolist(), said.end_logits[0].tolist()
            least = min(least, start[0] + end[0])
            inside = [n for n, of in enumerate(cut.sequence_ids(text)) if of == 1]
            for i in inside:
                for j in range(i, min(i + 30, inside[-1] + 1)):
                    if start[i] + end[j] > best[0]:
                        places = cut["offset_mapping"][text]
                        best = (start[i] + end[j], places[i][0], places[j][1])
        found.append((-1, -1) if silent and least > best[0] else best[1:])
    return found


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_answers_are_those_of_the_stock_model_over_all_texts_of_a_question(family):
    bundle = finder(family)
    task = task_of(bundle.model.config)
    assert task is task_labelled("span") is QUESTION_ANSWERING
    rows = [*questions(12), long_row(), long_row(90, 3, seed=9)]
    cut = cut_rows(rows, longest_text(bundle.model), bundle.tokenizer)
    assert len(cut) > len(rows)
    scores = score(answers(bundle), cut, task=task, together=4)
    judged = judged_of(scores)
    found = Answers.of(judged)
    wanted = by_hand(bundle, rows, silent=True)
    assert list(zip(found.first.tolist(), found.last.tolist(), strict=True)) == wanted
    told = [worth(row.pair[max(a, 0) : max(b, 0)], [t for _, t in row.label])
            for row, (a, b) in zip(rows, wanted, strict=True)]  # fmt: skip
    assert found.exact.tolist() == [bool(exact) for exact, _ in told]
    assert found.f1.tolist() == pytest.approx([f1 for _, f1 in told])
    quality = summarise(scores, None, 0)
    assert (quality.score_name, quality.score) == ("answer_f1", pytest.approx(np.mean([f for _, f in told])))
    assert quality.metrics["answer_exact_match"] == pytest.approx(np.mean([e for e, _ in told]))
    assert quality.score_ci95[0] <= quality.score <= quality.score_ci95[1]


def judged_of(scores: Scores):
    from dataclasses import asdict

    from compress.tasks.decisions import Judged

    return Judged.of(asdict(scores))


def test_where_every_question_has_an_answer_none_is_never_said():
    rows, task = questions(8, none=0), QUESTION_ANSWERING

    def first(tokens, types=None):
        rows = np.zeros((*tokens.shape, 2), np.float32)
        rows[:, 0] = 9.0
        return rows

    found = Answers.of(judged_of(score(first, cut_rows(rows), task=task)))
    assert (found.first >= 0).all()
    some = [*rows, Row("how many are there?", (), "the cup.")]
    scores = score(first, cut_rows(some), task=task)
    found = Answers.of(judged_of(scores))
    assert (found.first == NO_PLACE).all()
    assert found.exact.tolist() == [False] * 8 + [True]
    p = np.exp(18) / (np.exp(9) + len(cut_rows(rows)[0].ids) - 1) ** 2
    assert found.confidence[cut_rows(rows).order[0]] == pytest.approx(p)
    metrics = summarise(scores, None, 0).metrics
    assert metrics["answer_f1_answerable"] == 0
    assert metrics["no_answer_accuracy"] == 1


def told(*rows):
    """Scores by hand: question, first, last, logits of both, exact, F1, answerable, how sure of both."""
    decisions = [list(map(float, row[:7])) for row in rows]
    count = [1.0] * len(rows)
    names = (
        QUESTION_ANSWERING.name,
        decisions,
        [[float(row[7])] for row in rows],
        [list(row[8]) for row in rows],
    )
    return Scores(count, [2] * len(rows), None, None, None, *names)


def test_of_several_texts_the_surest_answer_counts_and_the_least_sure_of_none():
    """Question 0 stands in two texts: only one of them is sure that there is no answer in it."""
    found = Answers.of(
        judged_of(
            told(
                (0, 3, 9, 4.0, 7.0, 0, 0.5, 1, (0.2, 0.9)),
                (1, 1, 2, 1.0, 2.0, 0, 0.0, 0, (0.1, 0.6)),
                (0, 30, 39, 5.0, 1.0, 1, 1.0, 1, (0.7, 0.01)),
            )
        )
    )
    assert found.text.tolist() == [0, 1]
    assert found.first.tolist() == [30, NO_PLACE]
    assert found.last.tolist() == [39, NO_PLACE]
    assert found.exact.tolist() == [True, True]
    assert found.confidence.tolist() == [0.7, 0.6]


def test_answers_that_are_right_in_both_have_not_changed():
    base = told((0, 0, 9, 4.0, 0.0, 1, 1.0, 1, (0.5, 0.1)), (1, 0, 9, 4.0, 0.0, 0, 0.4, 1, (0.5, 0.1)))
    ours = told((0, 4, 9, 4.0, 0.0, 1, 1.0, 1, (0.5, 0.1)), (1, 4, 9, 4.0, 0.0, 0, 0.4, 1, (0.5, 0.1)))
    differ = QUESTION_ANSWERING.scoring.differ(judged_of(ours), judged_of(base))
    assert differ.tolist() == [False, True]


def test_how_sure_a_model_is_is_the_probability_of_both_ends():
    (item,) = cut_rows(questions(1, none=0)).items
    rows = np.random.default_rng(0).normal(size=(2, len(item.ids))).astype(np.float32)
    decided = QUESTION_ANSWERING.scoring.chosen(rows, item.passage)
    p = torch.from_numpy(rows).softmax(-1)
    i, j = best_span(rows, item.passage.inside)
    assert decided.confidences == pytest.approx([float(p[0, i] * p[1, j]), float(p[0, 0] * p[1, 0])])


def test_the_loss_is_that_of_the_stock_model():
    bundle = finder()
    cut = cut_rows(questions(12))
    scores = score(answers(bundle), cut, task=QUESTION_ANSWERING)
    for item, nats, count in zip(cut.items, scores.nats, scores.tokens, strict=True):
        start, end = (torch.tensor([int(place)]) for place in item.targets)
        with torch.inference_mode():
            said = bundle.model(
                torch.from_numpy(item.ids)[None].long(),
                token_type_ids=torch.from_numpy(item.types)[None].long(),
                start_positions=start, end_positions=end,
            )  # fmt: skip
        assert nats / count == pytest.approx(float(said.loss), abs=1e-5)


def compared(tmp_path, rows):
    base, other = finder(), finder()
    with torch.no_grad():
        other.model.qa_outputs.weight += 0.4 * torch.randn(
            other.model.qa_outputs.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    cut = cut_rows(rows)
    before = score(answers(base), cut, task=QUESTION_ANSWERING, keep=tmp_path)
    after = score(answers(other), cut, task=QUESTION_ANSWERING, base=tmp_path)
    return base, other, cut, before, after


def test_against_a_base_there_are_flips_divergence_and_paired_intervals(tmp_path):
    rows = [*questions(60), long_row()]
    base, other, cut, before, after = compared(tmp_path, rows)
    quality = summarise(after, before, 0)
    a, b = by_hand(base, rows, True), by_hand(other, rows, True)
    told = [[worth(row.pair[max(i, 0) : max(j, 0)], [t for _, t in row.label])
             for row, (i, j) in zip(rows, own, strict=True)] for own in (a, b)]  # fmt: skip
    was, now = (np.array([exact for exact, _ in each]) for each in told)
    moved = np.array([x != y for x, y in zip(a, b, strict=True)]) & ~((was == 1) & (now == 1))
    assert moved.any()
    assert quality.flips == pytest.approx(moved.mean())
    assert quality.flips_lost == pytest.approx(((was == 1) & (now == 0)).mean())
    assert quality.flips_gained == pytest.approx(((was == 0) & (now == 1)).mean())
    f1 = [np.mean([f for _, f in each]) for each in told]
    assert quality.delta_score == pytest.approx(f1[1] - f1[0])
    assert quality.delta_score_ci95[0] <= quality.delta_score <= quality.delta_score_ci95[1]
    kl, same, ends = 0.0, 0, 0
    for item in cut.items:
        p, q = (
            torch.from_numpy(answers(m)(item.ids[None], item.types[None])[0]).log_softmax(0)
            for m in (base, other)
        )
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(0) == q.argmax(0)).sum())
        ends += 2
    assert quality.kl_to_base == pytest.approx(kl / ends, rel=1e-4)
    assert quality.top1_agreement == pytest.approx(same / ends)


def test_intervals_are_over_questions_however_many_texts_each_is():
    """The bootstrap of the mean over questions has the width that their spread says."""
    task, rng = QUESTION_ANSWERING, np.random.default_rng(0)
    f1 = rng.random(200)
    rows = []
    for number, value in enumerate(f1):  # every third question in three texts, of which the last is best
        for text in range(3 if number % 3 == 0 else 1):
            rows.append(([number, 0, 5, float(text), -9.0, 0.0, value if text == 2 or number % 3 else 0.0],
                         [1.0], [0.5, 0.1]))  # fmt: skip
    decisions, targets, confidences = (list(column) for column in zip(*rows, strict=True))
    count = len(rows)
    scores = Scores([1.0] * count, [2] * count, None, None, None, task.name, decisions, targets, confidences)
    quality = summarise(scores, None, 0)
    assert quality.score == pytest.approx(f1.mean())
    low, high = quality.score_ci95
    assert (high - low) / (2 * 1.96) == pytest.approx(f1.std() / np.sqrt(len(f1)), rel=0.15)


def test_what_changed_is_told_by_kind_and_the_worst_as_it_is(tmp_path):
    rows = [*questions(60), long_row()]
    _, _, cut, before, after = compared(tmp_path, rows)
    found = flips_of(Target("small", "torch", tmp_path, "print"), after, before, cut, None)
    quality = summarise(after, before, 0)
    assert found.decisions == len(rows)
    assert found.changed == round(quality.flips * len(rows))
    assert found.lost == round(quality.flips_lost * len(rows))
    assert found.gained == round(quality.flips_gained * len(rows))
    kinds = {RIGHT, PART, OTHER, NO_ANSWER}
    assert sum(change.count for change in found.changes) == found.changed
    for change in found.changes:
        assert {change.label, change.before, change.now} <= kinds
        assert change.label in (RIGHT, NO_ANSWER)


def test_a_lost_answer_is_shown_beside_the_right_one():
    row = Row("which colour is it?", ((400, "white"),), "lamp " * 80 + "white and green cup.")
    cut = cut_rows([row], 512)
    names = QUESTION_ANSWERING.name

    def scores(first, last, exact, f1, sure):
        decided = [[0.0, first, last, 3.0, -3.0, exact, f1]]
        return Scores([1.0], [2], None, None, None, names, decided, [[1.0]], [[sure, 0.1]])

    ours, base = scores(410, 415, 0.0, 0.0, 0.7), scores(400, 405, 1.0, 1.0, 0.9)
    found = flips_of(Target("small", "torch", None, "print"), ours, base, cut, None)
    assert (found.decisions, found.lost, found.gained, found.otherwise) == (1, 1, 0, 0)
    (flip,) = found.worst
    assert (flip.text, flip.label, flip.before, flip.now) == (row.text, "white", "white", "green")
    assert "white and green cup." in flip.pair
    assert (flip.confidence_before, flip.confidence_now) == (0.9, 0.7)
    (change,) = found.changes
    assert (change.label, change.before, change.now, change.count) == (RIGHT, RIGHT, OTHER, 1)
