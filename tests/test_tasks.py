"""Tasks: whose a model is, what it is asked, and a new one in one file."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers

from compress.errors import UserError
from compress.export.onnx import encoder_check
from compress.export.onnx.encoder_check import EncoderAgreement
from compress.measure.quality import Scores, score, summarise
from compress.passes.base import Pass
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_round import QuantizeRound
from compress.passes.train import Train
from compress.passes.tune_blocks import TuneBlocks
from compress.tasks import registry
from compress.tasks.base import Question, Task
from compress.tasks.causal import CAUSAL
from compress.tasks.embedding import EMBEDDING
from compress.tasks.masked import MASKED
from compress.tasks.next_sentence import MASKED_NEXT
from compress.tasks.question_answering import QUESTION_ANSWERING
from compress.tasks.registry import ONE_STACK, TASKS, auto_class, task_named, task_of
from compress.tasks.scoring import Scoring
from compress.tasks.seq2seq import SEQ2SEQ, halves, shifted
from compress.tasks.sequence_classification import MULTI_LABEL, REGRESSION, SEQUENCE_CLASSIFICATION
from compress.tasks.token_classification import TOKEN_CLASSIFICATION

MULTI = "multi_label_classification"
WINDOW = np.arange(10, 20, dtype=np.int32)


def config(architecture: str | None, model_type: str = "bert", **fields):
    named = None if architecture is None else [architecture]
    return SimpleNamespace(architectures=named, model_type=model_type, **fields)


@pytest.mark.parametrize(
    ("found", "task"),
    [
        (config("LlamaForCausalLM", "llama"), CAUSAL),
        (config(None, "llama"), CAUSAL),
        (config("LlamaModel", "llama"), CAUSAL),  # a decoder without its head: the head is the embedding
        (config("BertForMaskedLM"), MASKED),
        (config("BertModel"), EMBEDDING),
        (config("BertForSequenceClassification", num_labels=3), SEQUENCE_CLASSIFICATION),
        (config("BertForSequenceClassification", num_labels=1), REGRESSION),
        (config("BertForSequenceClassification", id2label={0: "a"}, problem_type=MULTI), MULTI_LABEL),
        (config("BertForTokenClassification"), TOKEN_CLASSIFICATION),
        (config("BertForQuestionAnswering"), QUESTION_ANSWERING),
        (config("BartForQuestionAnswering", "bart", is_encoder_decoder=True), SEQ2SEQ),
        (config("T5ForConditionalGeneration", "t5", is_encoder_decoder=True), SEQ2SEQ),
        (config("BartForSequenceClassification", "bart", is_encoder_decoder=True), SEQ2SEQ),
    ],
)
def test_a_configuration_says_whose_it_is(found, task):
    assert task_of(found) is task
    assert auto_class(found) is getattr(transformers, task.auto_class)


@pytest.mark.parametrize("head", ["NextSentencePrediction", "MultipleChoice"])
def test_heads_of_another_kind_are_refused_by_name(head):
    with pytest.raises(UserError, match=f"architectures: BertFor{head} is neither"):
        task_of(config(f"BertFor{head}"))


@pytest.mark.parametrize("task", sorted(TASKS, key=str))
class TestEveryTask:
    def test_is_found_by_its_name_and_none_else_has_it(self, task):
        assert task_named(task.name) is task
        assert str(task) == task.name
        assert [each for each in TASKS if each.name == task.name] == [task]
        assert task_named(f"un{task.name}") is None
        assert hasattr(transformers, task.auto_class)
        assert task.noun.startswith(("a ", "an "))

    def test_asks_for_tokens_that_the_answer_has_rows_for(self, task):
        asked = task.question(WINDOW, 3, mask_token=1)
        rows = len(halves(WINDOW)[1]) if task.stacks == 2 else 1 if task.pooled else len(asked.inputs)
        rows += task.pairs  # whether they follow
        assert len(np.arange(rows)[asked.rows]) == len(asked.targets)
        if task.predicts or task.embeds:
            assert set(asked.targets[: len(asked.targets) - task.pairs].tolist()) <= set(WINDOW.tolist())
        else:
            assert task.scoring.decided(np.zeros((rows, 3), np.float32), asked.targets) is None
        again = task.question(WINDOW, 3, mask_token=1)
        assert np.array_equal(asked.inputs, again.inputs)
        assert WINDOW[0] == 10, "the window itself is left alone"

    def test_only_what_continues_writes_and_predicts(self, task):
        assert task.writes or not task.continues
        assert task.predicts or not task.writes
        assert not task.predicts or task.output == "logits"
        assert task.predicts == (task.labels in (None, "text") and not task.embeds)

    def test_round_and_gptq_take_all_and_training_takes_what_learns_from_text(self, task):
        assert QuantizeRound.takes(task)
        assert QuantizeGPTQ.takes(task)
        assert Train.takes(task) == (task in {CAUSAL, MASKED, MASKED_NEXT, SEQ2SEQ})
        assert TuneBlocks.takes(task) == (task.stacks == 1) == (task in ONE_STACK)


def test_questions_are_those_the_definitions_tell():
    assert CAUSAL.question(WINDOW, 0).inputs.tolist() == list(range(10, 19))
    assert CAUSAL.question(WINDOW, 0).targets.tolist() == list(range(11, 20))
    assert SEQ2SEQ.question(WINDOW, 0).targets.tolist() == [15, 16, 17, 18, 19]
    assert EMBEDDING.question(WINDOW, 0).inputs is WINDOW
    hidden = MASKED.question(WINDOW, 0, mask_token=1)
    assert len(hidden.targets) == 1, "15 % of eight"
    assert (hidden.inputs == 1).sum() == 1
    assert hidden.inputs[[0, -1]].tolist() == [10, 19]
    assert WINDOW[hidden.rows].tolist() == hidden.targets.tolist()


def test_what_a_decoder_reads_is_a_token_behind_what_it_gives():
    targets = torch.tensor([[5, 6, 7]])
    assert shifted(targets, 0).tolist() == [[0, 5, 6]]
    assert targets.tolist() == [[5, 6, 7]]


def test_a_pass_may_name_tasks_as_plugins_did():
    class Old(Pass):
        tasks: ClassVar[frozenset[str]] = frozenset({"causal", "masked"})

    assert [Old.takes(task) for task in (CAUSAL, MASKED, EMBEDDING, SEQ2SEQ)] == [True, True, False, False]


class Backwards(Task):
    """To give every token from those after it: a task nobody has, in one file."""

    name: ClassVar[str] = "backwards"
    noun: ClassVar[str] = "a mirror"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def claims(self, config, architecture):
        return architecture.endswith("ForBackwardsLM")

    def question(self, window, index, mask_token=None):
        return Question(window[::-1][:-1], slice(None), window[::-1][1:])


def test_a_new_task_is_one_class_and_a_line_in_the_registry(monkeypatch):
    new = Backwards()
    monkeypatch.setattr(registry, "_IN_ORDER", (new, *registry._IN_ORDER))
    assert task_of(config("LlamaForBackwardsLM", "llama")) is new
    assert auto_class(config("LlamaForBackwardsLM", "llama")) is transformers.AutoModelForCausalLM
    assert task_named("backwards") is new

    def forward(ids):  # knows that a token is followed by the one below it
        logits = np.zeros((*ids.shape, 32), np.float32)
        np.put_along_axis(logits, ids[..., None] - 1, 50.0, axis=-1)
        return logits

    quality = summarise(score(forward, np.stack([WINDOW, WINDOW]), task=new), None, 20)
    assert quality.nll == pytest.approx(0.0, abs=1e-9)
    assert quality.bits_per_byte is None, "not every token of a text is predicted from those before it"


class Hits(Scoring):
    """Whether the most likely token is the one wanted: under a name that records have."""

    distance_name: ClassVar[str] = "share of other tokens"
    tolerances: ClassVar[dict[str, float]] = {"float32": 0.1, "weights": 0.2, "activations": 0.3}

    def sums(self, rows, targets, base):
        return (float((rows.argmax(-1) == targets).sum()),)

    def columns(self, windows, *, compared):
        return {"nats": [], "agreements": [int(hits) for (hits,) in windows]}

    def summary(self, scores, base, text_bytes, interval):
        return {"top1_agreement": sum(scores["agreements"]) / sum(scores["tokens"])}

    def distance(self, expected, found):
        return float((expected.argmax(-1) != found.argmax(-1)).mean())


class Ranked(Backwards):
    """A task with a score of its own, in the same file."""

    name: ClassVar[str] = "ranked"
    scoring: ClassVar[Scoring] = Hits()


def test_a_new_task_may_bring_its_score(monkeypatch):
    monkeypatch.setattr(registry, "_IN_ORDER", (Ranked(), *registry._IN_ORDER))

    def forward(ids):  # right about all but the first of nine
        logits = np.zeros((*ids.shape, 32), np.float32)
        np.put_along_axis(logits, ids[..., None] - 1, 1.0, axis=-1)
        logits[:, 0, 31] = 2.0
        return logits

    scores = score(forward, np.stack([WINDOW] * 3), task=Ranked())
    assert (scores.agreements, scores.tokens, scores.task) == ([8, 8, 8], [9, 9, 9], "ranked")
    quality = scores.quality(None, 20)
    assert (quality.top1_agreement, quality.nll) == (8 / 9, None)
    answer, other = np.eye(2, 4, dtype=np.float32), np.eye(2, 4, 1, dtype=np.float32)
    result = EncoderAgreement("weights", "ranked", 0.2, 2, 1.0, 1.0, loss=1.0, loss_padded=1.0)
    assert encoder_check._loss(Ranked(), [answer, answer], [answer, other]) == 0.5
    assert "share of other tokens is 1, of padded texts 1;" in encoder_check._failure(result, Ranked())


def test_scores_of_a_task_that_nobody_registered_are_refused():
    with pytest.raises(ValueError, match="task: 'ranked' is unknown"):
        summarise(Scores([], [9], agreements=[8], task="ranked"), None, 20)


def test_distances_of_answers_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 70, 11)).astype(np.float32)  # more positions than are widened at once
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (a, b))
    assert CAUSAL.scoring.distance(a, b) == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-12
    )
    means = torch.from_numpy(a).double().mean(0), torch.from_numpy(b).double().mean(0)
    cosine = float(torch.nn.functional.cosine_similarity(*means, dim=0))
    assert EMBEDDING.scoring.distance(a, b) == pytest.approx(1 - cosine, abs=1e-12)
    for task in TASKS:
        assert np.isnan(task.scoring.distance(a, np.full_like(b, np.nan)))
        assert task.scoring.distance(a, a) == pytest.approx(0, abs=1e-12)
