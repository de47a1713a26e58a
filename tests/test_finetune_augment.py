"""Texts that are changed anew in every epoch: whose, how, and that nothing but (seed, epoch, row) decides."""

from itertools import chain

import numpy as np
import pytest
from labelled_examples import WORDS, context_of, encoder, labelled
from training_set import equal, tiny_bundle, weights

from compress.passes.finetune import Finetune
from compress.text.encode import encode
from compress.text.labelled.augment import Vocabulary, augmented_row
from compress.training import checkpoint
from compress.training.augmentation import Augment, Augmented
from compress.training.example_batches import ExampleBatches, padded_targets

RATES = {"replace": 0.2, "delete": 0.2, "insert": 0.1, "swap": 0.1, "share": 0.5}
KINDS = ("class", "classes", "number", "tags", "pairs")


def augmented(data, tokenizer, seed=1, **rates):
    return Augmented(data.train, Augment(**{**RATES, **rates}), tokenizer, 64, seed)


def same(one, other):
    pairs = ((one.ids, other.ids), (one.targets, other.targets), (one.types, other.types))
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_examples_are_those_of_changed_rows(kind):
    """The rows changed one by one, and cut into tokens one by one."""
    bundle = encoder()
    data = labelled(bundle, kind, rows=200)
    train, settings = data.train, Augment(**RATES)
    vocabulary = Vocabulary.of(train.rows)
    for epoch in (0, 3):
        found = augmented(data, bundle.tokenizer).changed(epoch)
        drawn = 0
        for number, place in enumerate(train.order):
            draw = np.random.default_rng([1, epoch, place])
            if draw.random() >= 0.5:
                assert number not in found
                continue
            drawn += 1
            row = augmented_row(train.rows[place], draw, settings, vocabulary)
            (right,) = encode([row], train.kind, train.names, bundle.tokenizer, 64).items
            assert same(found.get(number, train[number]), right)
        assert 70 < drawn < 130
        assert 0.8 * drawn < len(found) <= drawn
        if kind != "tags":
            assert all(np.array_equal(found[n].targets, train[n].targets) for n in found)


def test_tags_go_with_their_words():
    bundle = encoder()
    for item in augmented(labelled(bundle, "tags", rows=60), bundle.tokenizer).changed(0).values():
        right = [0 if token < 70 else 1 for token in item.ids]  # of each word by itself
        assert item.targets.tolist() == right


def test_every_epoch_and_seed_has_changes_of_its_own_and_the_rest_stays():
    bundle = encoder()
    data = labelled(bundle, rows=60)
    first, second = (augmented(data, bundle.tokenizer).changed(epoch) for epoch in (0, 1))
    other = augmented(data, bundle.tokenizer, seed=2).changed(0)
    assert set(first) != set(second)
    assert set(first) != set(other)
    again = augmented(data, bundle.tokenizer).changed(0)
    assert first.keys() == again.keys()
    assert all(same(first[n], again[n]) for n in first)
    batches = ExampleBatches(data.train, 8, 1, 3, None, augmented(data, bundle.tokenizer))
    for step in (8, 0, 9, 1):  # of two epochs, in any order
        changed = (first, second)[step // 8]
        numbers = batches.numbers(step)
        for item, number in zip(batches.items(step, numbers), numbers.tolist(), strict=True):
            assert same(item, changed.get(number, data.train[number]))


def test_words_come_from_the_training_texts():
    bundle = encoder()
    data = labelled(bundle, rows=60)
    known = {i for item in data.train.items for i in item.ids.tolist()}
    changed = augmented(data, bundle.tokenizer, replace=0.5, insert=0.5, delete=0, swap=0).changed(0)
    assert {*chain.from_iterable(item.ids.tolist() for item in changed.values())} <= known
    assert len(WORDS) > len(known) / 2


def test_settings_and_texts_are_part_of_what_a_checkpoint_is_known_by():
    bundle = encoder()
    data, other = labelled(bundle), labelled(bundle, seed=5)
    made = [
        ExampleBatches(data.train, 8, 1, 3),
        ExampleBatches(data.train, 8, 1, 3, None, augmented(data, bundle.tokenizer)),
        ExampleBatches(data.train, 8, 1, 3, None, augmented(data, bundle.tokenizer, delete=0.1)),
        ExampleBatches(data.train, 8, 1, 3, None, augmented(other, bundle.tokenizer)),
    ]
    assert len({batches.identity([]) for batches in made}) == 4


def finetuned(bundle, folder, kind="class", heldout=8, **settings):
    step = Finetune(**{"epochs": 3, "batch": 8, "learning_rate": 1e-3, "heldout_points": 2, **settings})
    return step(bundle, context_of(bundle, folder, labelled(bundle, kind, heldout=heldout)))


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_learn_with_it_and_go_on_after_a_kill(kind, tmp_path, monkeypatch):
    bundle = encoder(blocks=1)
    settings = {"augment": RATES, "checkpoint_seconds": 0.0}
    whole = finetuned(bundle, tmp_path / "whole", kind, **settings)
    assert not equal(weights(whole), weights(finetuned(bundle, tmp_path / "plain", kind)))
    save, calls = checkpoint.save, []

    def interrupted(*arguments):
        save(*arguments)
        calls.append(arguments[3]["step"])
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    for _ in range(5):
        try:
            result = finetuned(bundle, tmp_path / "cut", kind, **settings)
            break
        except KeyboardInterrupt:
            continue
    assert calls == list(range(1, 15))
    assert equal(weights(whole), weights(result))


def test_a_text_of_one_token_has_one_label():
    """A decoder's tokenizer puts nothing around it, so that its label is as long as its text."""
    data = labelled(tiny_bundle(), rows=20)
    short = list(data.train.items[:1])
    short[0] = type(short[0])(short[0].ids[:1], short[0].targets)
    assert padded_targets([short[0], data.train[5]], 9, "class").shape == (2, 1)


def test_it_is_said_what_decides_which_weights_to_keep(tmp_path):
    bundle = encoder(blocks=1)
    notes = [finetuned(bundle, tmp_path / str(n), heldout=n).notes for n in (0, 8)]
    assert [n["judged_by"] for n in notes] == ["training texts: none are held out", "held-out texts"]
