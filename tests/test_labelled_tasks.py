"""Labels: how texts with them are cut, and what answers are worth, against the libraries that define it."""

import numpy as np
import pytest
import torch
from labelled_models import HEADS, rows_for, tiny_labeller
from scipy.stats import spearmanr
from seqeval.metrics import f1_score as span_f1
from sklearn.metrics import accuracy_score, f1_score

from compress.export.onnx.sides import on_either_side
from compress.measure.quality import Scores, score, summarise
from compress.tasks.base import UNKNOWN
from compress.tasks.decisions import calibration_error
from compress.tasks.registry import task_labelled, task_of
from compress.text.encode import encode
from compress.text.examples import Examples
from compress.text.labelled.base import Row


def forward(bundle):
    task = task_of(bundle.model.config)

    @torch.inference_mode()
    def answer(tokens, types=None):
        more = {} if types is None else {"token_type_ids": torch.from_numpy(types.astype(np.int64))}
        return task.answers(bundle.model, torch.from_numpy(tokens.astype(np.int64)), **more).float().numpy()

    return answer


def examples(kind, bundle, **options):
    return encode(rows_for(kind, **options), kind, HEADS[kind][1], bundle.tokenizer, 64)


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_decisions_are_those_of_the_stock_model_for_each_text_alone(kind, family):
    bundle = tiny_labeller(kind, family)
    task, cut = task_of(bundle.model.config), examples(kind, bundle)
    assert task is task_labelled(kind)
    scores = score(forward(bundle), cut, task=task, together=8)
    assert scores.names == cut.names
    rows = rows_for(kind)
    for place, item in zip(cut.order, range(len(cut)), strict=True):
        encoded = bundle.tokenizer(rows[place].text)
        ids, words = encoded["input_ids"], [word is not None for word in encoded.word_ids()]
        with torch.inference_mode():
            logits = bundle.model(input_ids=torch.tensor([ids])).logits[0]
        wanted = {
            "class": [int(logits.argmax(-1))] if kind == "class" else [],
            "classes": (logits > 0).int().tolist(),
            "number": logits.tolist(),
            "tags": logits.argmax(-1)[words].tolist() if kind == "tags" else [],
        }[kind]
        assert scores.decisions[item] == pytest.approx(wanted, abs=1e-5)


def judged(kind, seed=0):
    bundle = tiny_labeller(kind)
    task = task_of(bundle.model.config)
    scores = score(forward(bundle), examples(kind, bundle), task=task)
    return scores, summarise(scores, None, 0)


def flat(column):
    return [value for row in column for value in row]


def test_the_scores_are_what_the_libraries_call_so():
    scores, quality = judged("class")
    decided, right = flat(scores.decisions), flat(scores.targets)
    assert (quality.score_name, quality.score) == ("accuracy", pytest.approx(accuracy_score(right, decided)))
    assert quality.metrics["macro_f1"] == pytest.approx(f1_score(right, decided, average="macro"))
    assert quality.score_ci95[0] <= quality.score <= quality.score_ci95[1]

    scores, quality = judged("classes")
    decided, right = np.array(scores.decisions), np.array(scores.targets)
    assert quality.score == pytest.approx(f1_score(right, decided, average="micro"))
    assert quality.metrics["exact_match"] == pytest.approx(accuracy_score(right, decided))

    scores, quality = judged("number")
    decided, right = flat(scores.decisions), flat(scores.targets)
    assert quality.score == pytest.approx(spearmanr(right, decided).statistic)
    assert quality.metrics["pearson"] == pytest.approx(np.corrcoef(right, decided)[0, 1])

    scores, quality = judged("tags")
    names = HEADS["tags"][1]
    decided, right = (
        [[names[int(n)] for n in row] for row in rows] for rows in (scores.decisions, scores.targets)
    )
    assert (quality.score_name, quality.score) == ("span_f1", pytest.approx(span_f1(right, decided)))


def test_the_loss_is_torchs():
    for kind, loss in (
        ("class", torch.nn.functional.cross_entropy),
        ("classes", torch.nn.functional.binary_cross_entropy_with_logits),
    ):
        bundle = tiny_labeller(kind)
        cut, answer = examples(kind, bundle), forward(bundle)
        scores = score(answer, cut, task=task_of(bundle.model.config))
        for item, nats in zip(cut.items, scores.nats, strict=True):
            logits = torch.from_numpy(answer(item.ids[None])[0])
            target = torch.from_numpy(item.targets)
            wanted = loss(logits, target) if kind == "class" else 3 * loss(logits[0], target.float())
            assert nats == pytest.approx(float(wanted), abs=1e-5)


def test_against_a_base_there_are_flips_and_paired_intervals(tmp_path):
    base, other = tiny_labeller("class"), tiny_labeller("class", seed=0)
    task, cut = task_of(base.model.config), examples("class", base)
    answers = np.concatenate([forward(base)(item.ids[None])[0] for item in cut.items])
    first, second = np.argsort(answers.mean(0))[:0:-1]
    with torch.no_grad():  # so that half of them fall the other way
        other.model.classifier.bias[second] += float(np.median(answers[:, first] - answers[:, second]))
    before = score(forward(base), cut, task=task, keep=tmp_path)
    after = score(forward(other), cut, task=task, base=tmp_path)
    quality = summarise(after, before, 0)
    a, b, right = (np.array(flat(c)) for c in (before.decisions, after.decisions, before.targets))
    assert (a != b).any()
    assert quality.flips == pytest.approx((a != b).mean())
    assert quality.top1_agreement == pytest.approx((a == b).mean())
    assert quality.flips_lost == pytest.approx(((a == right) & (b != right)).mean())
    assert quality.flips_gained == pytest.approx(((a != right) & (b == right)).mean())
    assert quality.delta_score == pytest.approx((b == right).mean() - (a == right).mean())
    assert quality.delta_score_ci95[0] <= quality.delta_score <= quality.delta_score_ci95[1]
    assert quality.delta_score == pytest.approx(quality.flips_gained - quality.flips_lost)
    p, q = (torch.from_numpy(np.concatenate([forward(m)(i.ids[None])[0] for i in cut.items])).log_softmax(-1)
            for m in (base, other))  # fmt: skip
    assert quality.kl_to_base == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert summarise(Scores.joined([after, after]), None, 0).score == pytest.approx(quality.score)


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    confidences, right = rng.random(500), rng.random(500) < 0.7
    naive = 0.0
    for low in range(15):
        inside = [i for i in range(500) if low / 15 <= confidences[i] < (low + 1) / 15]
        if inside:
            naive += len(inside) / 500 * abs(np.mean(right[inside]) - np.mean(confidences[inside]))
    assert calibration_error(right, confidences) == pytest.approx(naive)


def test_the_first_piece_of_a_word_carries_its_label(pieces):
    rows = [Row("unaffable runs", ("B-x", "O"), None, ("unaffable", "runs"))]
    (item,) = encode(rows, "tags", ("B-x", "O"), pieces, 16).items
    words = pieces.convert_ids_to_tokens(item.ids.tolist())
    assert words == ["[CLS]", "un", "##aff", "##able", "runs", "[SEP]"]
    assert item.targets.tolist() == [UNKNOWN, 0, UNKNOWN, UNKNOWN, 1, UNKNOWN]


def test_pairs_are_told_apart_and_long_texts_cut_and_counted(pieces):
    rows = [Row("runs", "x", pair="un un"), Row("runs " * 20, "y", pair="runs " * 20)]
    cut = encode(rows, "class", ("x", "y"), pieces, 12)
    short, long = cut.items
    assert pieces.convert_ids_to_tokens(short.ids.tolist()) == ["[CLS]", "runs", "[SEP]", "un", "un", "[SEP]"]
    assert short.types.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(long.ids) == 12
    assert (cut.cut, cut.order) == (1, (0, 1))
    assert pieces.backend_tokenizer.truncation is None, "or it would be saved with the tokenizer"


def test_lengths_are_told_in_the_order_of_the_data(pieces):
    rows = [Row("runs un able", "x"), Row("un", "y"), Row("runs able", "x")]
    assert encode(rows, "class", ("x", "y"), pieces, 12).lengths == [5, 3, 4]


def test_examples_come_back_from_their_file_as_they_were(tmp_path, pieces):
    rows = [Row("runs un", ("a",)), Row("able", ())]
    for kind, names in (("classes", ("a", "b")), ("class", ("a", "b"))):
        own = rows if kind == "classes" else [Row(row.text, "b") for row in rows]
        cut = encode(own, kind, names, pieces, 16)
        cut.save(tmp_path / "e.npz")
        again = Examples.load(tmp_path / "e.npz")
        assert again.sha256 == cut.sha256
        assert (again.kind, again.names, len(again)) == (kind, names, 2)


@pytest.fixture(scope="module")
def pieces():
    """A WordPiece tokenizer of a few pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "runs", "able"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def test_a_pooled_answer_takes_rows_padded_on_either_side():
    bundle = tiny_labeller("class")

    def read(model, given):
        return model(**given, return_dict=False)[0]

    way, either = on_either_side(bundle.model, read, ["input_ids", "attention_mask"], pooled=True)
    assert either
    text, pad = torch.tensor([[9, 8, 7, 6]]), torch.tensor([[5, 5]])
    alone = bundle.model(input_ids=text).logits
    for ids, mask in (
        (torch.cat((pad, text), 1), torch.tensor([[0, 0, 1, 1, 1, 1]])),
        (torch.cat((text, pad), 1), torch.tensor([[1, 1, 1, 1, 0, 0]])),
    ):
        torch.testing.assert_close(way(bundle.model, {"input_ids": ids, "attention_mask": mask}), alone)
