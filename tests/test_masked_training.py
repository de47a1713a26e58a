"""Masked tokens and spans: what is hidden, what is asked, and that it is learnt."""

import numpy as np
import pytest
import torch
from encoder_models import tiny_encoder
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.models.running import native_precision
from compress.passes.train import Train
from compress.tasks.base import UNKNOWN
from compress.tasks.masked import hide
from compress.tasks.spans import spans_of, take_out
from compress.text.windows import TextData
from compress.training.objectives.base import Moment
from compress.training.objectives.losses import cross_entropy
from compress.training.objectives.masked import heldout_masked, masked_text

MASK, VOCABULARY = 4, 50


def draws(count, seed=0):
    return [np.random.default_rng([seed, row]) for row in range(count)]


def data(window=32, begin=(), end=()):
    """Counts of five: what is hidden follows from its neighbours."""
    rng = np.random.default_rng(0)
    stream = np.concatenate([np.arange(5) + rng.integers(5, 30) for _ in range(1200)]).astype(np.int32)
    held = stream[: 4 * window].reshape(4, window)
    return TextData.of_tokens(window, train=stream, heldout=held, calibration=held, begin=begin)


def test_fifteen_percent_are_hidden_and_of_those_eighty_masked_ten_random_ten_kept():
    rows = np.full((400, 100), 7)
    inputs, targets = hide(rows, draws(400), MASK, VOCABULARY)
    hidden = targets != UNKNOWN
    assert (hidden.sum(1) == 15).all()
    assert (inputs[~hidden] == 7).all()
    masked, kept = (inputs[hidden] == value for value in (MASK, 7))
    assert masked.mean() == pytest.approx(0.8 + 0.1 / VOCABULARY, abs=0.02)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.02)
    assert len(np.unique(inputs[hidden])) == VOCABULARY, "others are drawn from all tokens"
    again, _ = hide(rows, draws(400), MASK, VOCABULARY)
    assert np.array_equal(inputs, again)
    assert not np.array_equal(inputs, hide(rows, draws(400, 1), MASK, VOCABULARY)[0])


def test_specials_are_never_hidden():
    rows = np.arange(20)[None].repeat(50, 0)
    kept = np.zeros_like(rows, dtype=bool)
    kept[:, [0, -1]] = True
    _, targets = hide(rows, draws(50), MASK, VOCABULARY, 0.5, kept)
    assert (targets[:, [0, -1]] == UNKNOWN).all()
    assert ((targets != UNKNOWN).sum(1) == 9).all(), "half of the eighteen that may be"


@given(st.lists(st.integers(1, 4), min_size=3, max_size=12), st.integers(0, 100))
def test_whole_words_are_hidden_whole(lengths, seed):
    words = np.repeat(np.arange(len(lengths)), lengths)[None]
    _, targets = hide(words + 10, draws(1, seed), MASK, VOCABULARY, 0.3, words=words)
    hidden = targets[0] != UNKNOWN
    for word in range(len(lengths)):
        assert len(set(hidden[words[0] == word].tolist())) == 1
    assert hidden.any()


@given(st.integers(8, 200), st.integers(0, 50))
def test_spans_and_what_is_left_make_up_the_window(length, seed):
    taken, count = spans_of(length)
    sentinels = list(range(10_000, 10_000 + count))
    rows = np.arange(length)[None] + 100
    sources, targets = take_out(rows, draws(1, seed), sentinels, end=1)
    assert sources.shape == (1, length - taken + count + 1)
    assert targets.shape == (1, taken + count + 1)
    assert sources[0, -1] == targets[0, -1] == 1
    spans: dict[int, list[int]] = {}
    for token in targets[0, :-1].tolist():
        if token in sentinels:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    whole = [t for token in sources[0, :-1].tolist() for t in (spans.get(token) or [token])]
    assert whole == rows[0].tolist(), "each sentinel stands for its span"
    assert all(spans.values())


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_the_loss_is_that_of_the_hidden_positions_alone(name, make_context):
    """A head that is given the hidden positions only says what it says of them among all."""
    bundle = tiny_encoder(name)
    model, context = bundle.model, make_context(bundle)
    context.data = data()
    objective = masked_text(Train(batch=3), model, bundle.tokenizer, context)
    part = next(objective.material.micro_batches(0, 1))
    moment = Moment(0, 10, part.numbers)
    with objective.watch(model):
        asked = objective.ask(torch.from_numpy(part.rows), {}, moment)
        loss = objective.loss(model(**asked.inputs), asked.inputs, asked.targets, moment)
        plain = model(**asked.inputs).logits  # outside a step all positions are there
    hidden = asked.targets != UNKNOWN
    assert plain.shape[:2] == asked.targets.shape
    torch.testing.assert_close(loss, cross_entropy(plain[hidden], asked.targets[hidden]))
    later = objective.ask(torch.from_numpy(part.rows), {}, moment._replace(step=5))
    assert not torch.equal(asked.targets, later.targets), "hidden anew"


def test_an_encoder_learns_and_is_judged_by_fixed_draws():
    bundle = tiny_encoder("bert")
    before = heldout_masked(bundle.model, data().heldout.tokens, MASK, native_precision())
    settings = Train(tokens=30_000, optimizer="adamw", learning_rate=3e-3, heldout_points=2)
    trained = bundle.apply(settings, text=data())
    assert trained.notes["heldout_before"] == pytest.approx(before, abs=1e-6)
    after = heldout_masked(trained.model, data().heldout.tokens, MASK, native_precision())
    assert trained.notes["heldout_after"] == pytest.approx(after, abs=1e-5)
    assert after < before - 1
    again = bundle.apply(settings, text=data())
    assert all(
        torch.equal(a, b) for a, b in zip(trained.model.parameters(), again.model.parameters(), strict=True)
    )


def test_what_cannot_be_trained_so_is_refused():
    bundle = tiny_encoder("bert")
    with pytest.raises(UserError, match=r"train\.spans: is for an encoder-decoder, and this is an encoder"):
        Train(spans=0.1).layers(bundle.model)
    bundle.tokenizer.mask_token = None
    with pytest.raises(UserError, match="no mask token"):
        bundle.apply(Train(tokens=100), text=data())
