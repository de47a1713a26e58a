"""The recurrent reference: the equations, its size, what it learns, and that it is fitted once."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from compress.measure import baselines
from compress.measure.baselines import Training, fit_references
from compress.measure.ngrams import Unigram
from compress.measure.recurrent import Recurrent, _batches, parameters_of, train_recurrent, width_for
from compress.records.manifest import PassRecord
from compress.records.run import Reference
from compress.text.windows import TextData, Windows, digest

WORDS = ("the cat sat on the mat and the dog sat on the log " * 100).split()
IDS = {word: number for number, word in enumerate(sorted(set(WORDS)))}
STREAM = np.array([IDS[word] for word in WORDS], np.int32)
V = len(IDS)
LIKE = {"tokens": 12_000, "batch": 4, "window": 20}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_probabilities_are_those_of_the_equations():
    model = Recurrent(7, 3, seed=5)
    with torch.no_grad():  # all terms of the equations are there
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    named = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    table, w, u, b, c = (
        named[name]
        for name in (
            "embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"
        )
    )  # fmt: skip
    window, wanted = [4, 0, 6, 6, 2], []
    h, cell = np.zeros(3), np.zeros(3)
    for token, following in pairwise(window):
        i, f, g, o = np.split(w @ (np.sqrt(3) * table[token]) + b + u @ h + c, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(cell)
        logits = table @ h + named["bias"]
        wanted.append(np.log(np.exp(logits).sum()) - logits[following])
    found = model.window_nll(np.array([window, window[::-1]]))
    assert found.shape == (2, 4)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "vocabulary"), [(1_049_728, 2048), (30_000_000, 32_000), (250_000, 300), (3_000_000, 8192)]
)
def test_it_has_as_many_parameters(parameters, vocabulary):
    width = width_for(parameters, vocabulary)
    assert parameters_of(vocabulary, width) == pytest.approx(parameters, rel=0.05)
    nearer = [abs(parameters_of(vocabulary, w) - parameters) for w in (width - 1, width, width + 1)]
    assert min(nearer) == nearer[1]


def test_the_count_is_that_of_torch():
    for vocabulary, width in ((7, 3), (50, 8), (300, 17)):
        model = Recurrent(vocabulary, width)
        assert sum(p.numel() for p in model.parameters()) == parameters_of(vocabulary, width)
    assert width_for(10, 300) == 1


def test_it_learns_what_a_unigram_cannot_and_leaves_the_process_alone():
    before = torch.random.get_rng_state()
    model, tokens = train_recurrent(STREAM, V, 1500, **LIKE)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tokens == 12_000
    windows = STREAM[:120].reshape(6, 20)
    nll = model.window_nll(windows)
    assert nll.mean() < 0.5 * Unigram.fit(STREAM, V).window_nll(windows).mean()
    again, _ = train_recurrent(STREAM, V, 1500, **LIKE)
    np.testing.assert_array_equal(again.window_nll(windows), nll)
    other, _ = train_recurrent(STREAM, V, 1500, **LIKE, seed=1)
    assert not np.array_equal(other.window_nll(windows), nll)


def test_an_epoch_visits_every_window_once_and_windows_begin_as_texts_do():
    def drawn(seed, begin=()):
        batches = _batches(np.arange(50), 2, 8, begin, seed)
        return np.concatenate(list(islice(batches, 5)))  # five windows an epoch: two epochs

    rows = drawn(3)
    assert rows.shape == (10, 9)
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in (rows[:5], rows[5:]):
        places = np.sort(epoch[:, 0])
        assert (np.diff(places) == 8).all()
        assert 0 <= places[0] < 8
    assert not np.array_equal(rows, drawn(4))
    framed = drawn(3, (99, 98))
    assert (framed[:, :2] == (99, 98)).all()
    np.testing.assert_array_equal(framed[:, 2:], rows[:, :7])


def text_data():
    train, windows = STREAM, STREAM[:120].reshape(6, 20)
    part = Windows(windows, 500, digest(windows))
    return TextData("tokens", 20, train, digest(train), part, part, part)


def step(name, notes=None, **config):
    return PassRecord(
        name=name, kind="train", config=config, seconds=1.0, peak_rss_bytes=None, parent=None,
        fingerprint=name, seed=0, notes=notes or {},
    )  # fmt: skip


def test_it_is_trained_as_the_base_was():
    created, curve = step("create", preset="1m"), [[1, 64, 2.0, None]]
    train = step("train", {"tokens": 640, "loss_curve": curve}, batch=4, accumulate=2, window=None)
    more = step("train", {"tokens": 320, "loss_curve": curve}, batch=1)
    tuned = step("tune", {"tokens": 5})
    known = {"parameters": 1500, "window": 20, "seed": 3}
    assert Training.of([created, train, tuned, more], **known) == Training(1500, 960, 8, 20, 3)
    wide = train.model_copy(update={"config": {**train.config, "window": 40}})
    assert Training.of([created, wide], **known) == Training(1500, 640, 8, 40, 3)
    assert Training.of([step("checkpoint", checkpoint="x"), train], **known) is None
    assert Training.of([created, tuned], **known) is None
    assert Training.of([created, train], parameters=None, window=20, seed=3) is None


def test_each_is_fitted_once(tmp_path, monkeypatch):
    training, data, lines = Training(1500, 12_000, 4, 20, 0), text_data(), []
    every, kept = ("unigram", "trigram", "lstm"), tmp_path / "references.json"
    found = fit_references(every, data, V, training, kept=kept, say=lines.append)
    unigram, trigram, lstm = found
    assert [r.label for r in found][:2] == ["unigram", "Kneser-Ney trigram"]
    assert lstm.label == f"LSTM of {lstm.parameters / 1e3:.1f} k parameters"
    assert lstm.parameters == pytest.approx(1500, rel=0.05)
    assert (unigram.tokens, lstm.tokens) == (len(STREAM), 12_000)
    assert lstm.nll < unigram.nll
    nll = Unigram.fit(STREAM, V).window_nll(data.evaluation.tokens).mean()
    assert unigram.nll == pytest.approx(nll)
    assert unigram.perplexity == pytest.approx(np.exp(nll))
    assert unigram.bits_per_byte == pytest.approx(nll * 114 / (np.log(2) * 500))
    assert len(lines) == 2
    # cut off or finished before: nothing is fitted again, and another seed only what is drawn by it
    monkeypatch.setattr(baselines, "train_recurrent", None)
    assert fit_references(every, data, V, training, kept=kept) == found
    assert fit_references(every[::-1], data, V, training, earlier=found) == found[::-1]
    with pytest.raises(TypeError):
        fit_references(every, data, V, Training(1500, 12_000, 4, 20, 1), earlier=found)
    kept.write_text("{", encoding="utf-8")
    assert fit_references(("unigram",), data, V, None, kept=kept) == [unigram]
    # only where there is a base like it, and where it was asked for
    assert fit_references(every, data, V, None, earlier=found) == [unigram, trigram]
    assert fit_references((), data, V, training) == []
    old = Reference(name="unigram", nll=3.0, perplexity=20.1, bits_per_byte=2.0)
    assert fit_references(("unigram",), data, V, None, earlier=[old]) == [unigram]


def test_one_that_diverges_is_left_out_and_said(monkeypatch):
    class Broken:
        def window_nll(self, windows):
            return np.full((len(windows), windows.shape[1] - 1), np.nan)

    monkeypatch.setattr(baselines, "train_recurrent", lambda *_, **__: (Broken(), 12_000))
    lines = []
    found = fit_references(
        ("unigram", "lstm"), text_data(), V, Training(1500, 640, 4, 20, 0), say=lines.append
    )
    assert [r.name for r in found] == ["unigram"]
    assert lines[-1].endswith("left out, since its training diverged")
