"""Combinations of labelled texts that no part of them shows alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chat_models import chat_bundle, labelled, row
from pair_examples import bundle as sentence_bundle
from taught_models import labelled_context, labelled_examples, tiny_classifier

from compress.errors import UserError
from compress.formats import Int8
from compress.passes.finetune import Finetune
from compress.passes.quantize_rare_rows import QuantizeRareRows
from compress.passes.quantize_round import QuantizeRound
from compress.run.label_checks import epoch_tokens
from compress.structured.probes import Text, answer
from compress.tasks.base import UNKNOWN
from compress.text.encode import asked_by, cut_by, encode
from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.encoded import LabelledData, encoded
from compress.text.prompts import Prompt
from compress.training.example_batches import ExampleBatches


def test_a_label_that_nobody_has_weighs_nothing():
    """n / (k n_c) over the k labels that there are; others are not balanced."""
    parts = [labelled_examples("class", 96, seed) for seed in range(3)]
    wide = [type(part)("class", (*part.names, "never"), part.items) for part in parts]
    data = LabelledData("labels", *wide)
    counts = np.bincount([int(item.targets[0]) for item in parts[0].items], minlength=5)
    found = Finetune(class_weights="balanced")._weights(data)
    assert found is not None
    np.testing.assert_allclose(found[:4], 96 / (4 * counts[:4]))
    assert found[4] == 0


def test_a_step_of_chats_is_the_same_however_it_is_divided():
    """Its mean is over answer tokens, of which each chat has others."""
    bundle = chat_bundle()
    rows = labelled(40).train
    examples = encode(rows, "chat", (), bundle.tokenizer, 128)
    batches = ExampleBatches(examples, 8, 0, 0)

    def loss(parts, ranks=1):
        total = 0.0
        for rank in range(ranks):
            for part in batches.micro_batches(0, parts, rank, ranks):
                ids, mask, targets = (
                    torch.from_numpy(x)
                    for x in (part.rows, part.more["attention_mask"], part.more["targets"])
                )
                logits = bundle.model(input_ids=ids, attention_mask=mask).logits
                asked = targets != UNKNOWN
                total += part.share * float(F.cross_entropy(logits[asked], targets[asked].long()))
        return total

    with torch.no_grad():
        whole = loss(1)
        assert loss(4) == pytest.approx(whole, rel=1e-5)
        assert loss(2, ranks=2) == pytest.approx(whole, rel=1e-5)
    assert len({len(item.ids) for item in examples.items}) > 2


def test_prompts_of_pairs_know_their_queries():
    bundle = chat_bundle(None)
    rows = tuple(
        Row(f"{word} alpha", label, pair=f"{'beta ' * (n % 5)}{word}")
        for n, (word, label) in enumerate(
            (word, label) for word in ("delta", "omega", "sigma") for label in ("0", "1", "0")
        )
    )
    examples = encode(rows, "class", ("0", "1"), bundle.tokenizer, 128)
    found = asked_by(examples, Prompt("{text} {pair}: {label}"), bundle.tokenizer, 128)
    assert found.groups == tuple(place // 3 for place in found.order)


def test_texts_are_cut_again_for_a_shorter_context():
    bundle = chat_bundle(None)
    examples = encode(
        [Row("alpha beta gamma delta " * 6, "x"), Row("omega", "y")],
        "class",
        ("x", "y"),
        bundle.tokenizer,
        128,
    )
    assert cut_by(examples, bundle.tokenizer, examples.length) is examples
    assert cut_by(examples, bundle.tokenizer, 8).length == 8


def test_rare_rows_are_taken_once(tmp_path):
    bundle = tiny_classifier("class")
    context = labelled_context("class", tmp_path, bundle)
    once = QuantizeRareRows(coverage=0.7)(QuantizeRound(format=Int8())(bundle, context), context)
    with pytest.raises(UserError, match="in two formats already"):
        QuantizeRareRows(coverage=0.5)(once, context)


@pytest.mark.parametrize(("pooling", "place"), [("cls", 0), ("lasttoken", -1)])
def test_where_a_text_lies_is_told_by_the_state_that_embeds_it(pooling, place, tmp_path):
    bundle = sentence_bundle(tmp_path, pooling)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        states = bundle.model(input_ids=ids)[0][0]
        found = answer(bundle.model, Text({"input_ids": ids}))
    torch.testing.assert_close(found[0], F.normalize(states[place], dim=0))


def test_targets_that_are_texts_count_in_an_epoch():
    rows = (Row("a" * 40, "b" * 20), Row("c" * 8, "d" * 4))
    assert epoch_tokens(Labelled("x", "text", (), rows, (), rows), 100) == 12 + 7 + 4 + 3
    assert epoch_tokens(Labelled("x", "text", (), rows, (), rows), 5) == 5 + 5 + 4 + 3


def test_answers_that_all_lie_beyond_the_context_are_told():
    bundle = chat_bundle()
    rows, long = (
        labelled(40),
        row([{"role": "user", "content": "alpha " * 90}, {"role": "assistant", "content": "beta"}]),
    )
    for part in ("train", "heldout"):
        with pytest.raises(
            UserError, match=f"labelled.{part}: of all 3 rows of tiny the answers lie beyond the 40 tokens"
        ):
            encoded(replace(rows, **{part: (long,) * 3}), (), bundle.tokenizer, 40)


@pytest.mark.parametrize(
    ("kind", "field", "said"),
    [
        ("pair", {"label_smoothing": 0.1}, "label_smoothing: is for labels, and these are pairs"),
        (
            "number",
            {"class_weights": "balanced"},
            "class_weights: labels of the kind 'number' have no classes",
        ),
        ("span", {"sampling": "balanced"}, "sampling: balanced is for one label per text, not 'span'"),
        ("chat", {"augment": {}}, "augment: is for texts with labels"),
        ("chat", {"label_smoothing": 0.1}, None),
        ("class", {"class_weights": "balanced", "sampling": "balanced", "augment": {}}, None),
    ],
)
def test_settings_of_other_labels_are_known_before_any_work(kind, field, said):
    found = Finetune(**field).refuses_labels(kind)
    assert found is None if said is None else said in found
