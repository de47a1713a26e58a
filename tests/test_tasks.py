"""Tasks: whose a model is, what it is asked, and a new one in one file."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers

from compress.errors import UserError
from compress.measure.quality import score, summarise
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
from compress.tasks.registry import ONE_STACK, TASKS, auto_class, task_named, task_of
from compress.tasks.seq2seq import SEQ2SEQ, halves, shifted

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
        (config("T5ForConditionalGeneration", "t5", is_encoder_decoder=True), SEQ2SEQ),
        (config("BartForSequenceClassification", "bart", is_encoder_decoder=True), SEQ2SEQ),
    ],
)
def test_a_configuration_says_whose_it_is(found, task):
    assert task_of(found) is task
    assert auto_class(found) is getattr(transformers, task.auto_class)


@pytest.mark.parametrize("head", ["SequenceClassification", "QuestionAnswering", "MultipleChoice"])
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
        rows = len(halves(WINDOW)[1]) if task.stacks == 2 else len(asked.inputs)
        assert len(np.arange(rows)[asked.rows]) == len(asked.targets)
        assert set(asked.targets.tolist()) <= set(WINDOW.tolist())
        again = task.question(WINDOW, 3, mask_token=1)
        assert np.array_equal(asked.inputs, again.inputs)
        assert WINDOW[0] == 10, "the window itself is left alone"

    def test_only_what_continues_writes_and_predicts(self, task):
        assert task.writes or not task.continues
        assert task.predicts or not task.writes
        assert task.predicts == (task.output == "logits")

    def test_round_and_gptq_take_all_and_training_takes_decoders(self, task):
        assert QuantizeRound.takes(task)
        assert QuantizeGPTQ.takes(task)
        assert Train.takes(task) == task.continues
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
