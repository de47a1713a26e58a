"""Definitions, against a few lines of transformers and float64 that share nothing with the package."""

from math import exp, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.measure import latency, quality

V, L = 37, 12


def tiny(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.6,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def forward(model):
    def run(tokens):
        with torch.inference_mode():
            return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

    return run


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, V, (5, L)).astype(np.int32)


@pytest.fixture(scope="module")
def models():
    return tiny(0), tiny(1)


def independent(base, variant, windows):
    nats, base_nats, kl, agree, count = 0.0, 0.0, 0.0, 0, 0
    for window in torch.from_numpy(windows.astype(np.int64)):
        with torch.inference_mode():
            p = base(window[None]).logits[0].double().log_softmax(-1)
            q = variant(window[None]).logits[0].double().log_softmax(-1)
        for i in range(L - 1):
            nats -= q[i, window[i + 1]].item()
            base_nats -= p[i, window[i + 1]].item()
            kl += (p[i].exp() * (p[i] - q[i])).sum().item()
            agree += int(p[i].argmax() == q[i].argmax())
            count += 1
    return nats, base_nats, kl, agree, count


def test_definitions_agree_with_an_independent_script(models, windows, tmp_path):
    base, variant = models
    base_scores = quality.score(forward(base), windows, keep=tmp_path)
    scores = quality.score(forward(variant), windows, base=tmp_path, threads=2)
    found = quality.summarise(scores, base_scores, text_bytes=321)
    nats, base_nats, kl, agree, count = independent(base, variant, windows)
    assert found.nll == pytest.approx(nats / count, rel=1e-5)
    assert found.perplexity == pytest.approx(exp(nats / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / (log(2) * 321), rel=1e-5)
    assert found.delta_nll == pytest.approx((nats - base_nats) / count, abs=1e-5)
    assert found.kl_to_base == pytest.approx(kl / count, rel=1e-5)
    assert found.top1_agreement == agree / count
    for value, interval in [
        (found.nll, found.nll_ci95),
        (found.delta_nll, found.delta_nll_ci95),
        (found.kl_to_base, found.kl_ci95),
    ]:
        assert interval[0] < value < interval[1]


def test_identical_models_have_no_distance_at_all(models, windows, tmp_path):
    base = quality.score(forward(models[0]), windows, keep=tmp_path)
    same = quality.summarise(quality.score(forward(models[0]), windows, base=tmp_path), base, 100)
    assert (same.delta_nll, same.kl_to_base, same.top1_agreement) == (0.0, 0.0, 1.0)
    assert same.kl_ci95 == (0.0, 0.0)


def test_the_base_has_no_distance_to_itself_recorded(models, windows):
    alone = quality.summarise(quality.score(forward(models[0]), windows), None, 100)
    assert (alone.delta_nll, alone.kl_to_base, alone.top1_agreement) == (None, None, None)


def test_chunks_change_nothing(models, windows, monkeypatch):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 40, V)).astype(np.float32) * 5
    targets = rng.integers(0, V, 40).astype(np.int32)
    whole = quality.score_window(a, targets, b)
    monkeypatch.setattr(quality, "CHUNK_ELEMENTS", 3 * V)
    np.testing.assert_allclose(quality.score_window(a, targets, b, threads=2), whole, rtol=1e-7)


def test_windows_that_share_a_call_score_as_they_do_alone(models, windows, monkeypatch):
    calls = []

    def counting(tokens):
        calls.append(len(tokens))
        return forward(models[1])(tokens)

    alone = quality.score(counting, windows)
    assert calls == [1] * 5
    shared = quality.score(counting, windows, together=3)
    assert calls[5:] == [1, 3, 1]  # the first one tells how large an answer is
    np.testing.assert_allclose(shared.nats, alone.nats, rtol=1e-6)
    monkeypatch.setattr(quality, "TOGETHER_BYTES", 2 * 4 * V * (L - 1))
    quality.score(counting, windows, together=3)
    assert calls[8:] == [1, 2, 2]


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert quality.score_window(logits, np.array([0], np.int32), logits) == (0.0, 0.0, 1.0)


def test_broken_and_incomparable_models_are_refused(windows, models, tmp_path):
    with pytest.raises(FloatingPointError, match="window 0"):
        quality.score(lambda tokens: np.full((1, L - 1, V), np.nan, np.float32), windows)
    quality.score(forward(models[0]), windows, keep=tmp_path)
    with pytest.raises(ValueError, match="no comparison"):
        quality.score(lambda tokens: np.zeros((1, L - 1, V + 1), np.float32), windows, base=tmp_path)


def test_a_disk_without_room_is_noticed_before_it_is_full(windows, models, tmp_path, monkeypatch):
    monkeypatch.setattr(quality.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="logits need"):
        quality.score(forward(models[0]), windows, keep=tmp_path)


class CountingRuntime:
    """Remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def prefill(self, tokens):
        self.calls.append(("prefill", tokens.shape))
        return "state"

    def decode(self, state, tokens):
        assert state == "state"
        self.calls.append(("decode", tokens.tolist()))
        return "state"


def test_a_round_warms_up_and_times_what_it_says():
    runtime = CountingRuntime()
    following = np.arange(2 * 8, dtype=np.int32).reshape(2, 8)
    samples = latency.time_round(runtime, np.zeros((2, 6), np.int32), following, repetitions=4, warm_up=3)
    assert (len(samples.prefill), len(samples.decode)) == (4, 8 - 3)
    assert [name for name, _ in runtime.calls] == ["prefill"] * 5 + ["decode"] * 8
    assert runtime.calls[5][1] == [0, 8]  # one token per row


def test_latency_fields_and_absent_percentiles():
    fields = latency.summarise(latency.Samples([0.5] * 30, [0.01] * 99), prompt_tokens=100, batch=2)
    assert fields["prefill_tokens_per_second"] == pytest.approx(400)
    assert fields["decode_tokens_per_second"] == pytest.approx(200)
    assert fields["prefill_seconds_p95"] == 0.5
    assert fields["decode_seconds_p99"] is None
    assert latency.summarise(latency.Samples([0.5], [0.1] * 100), 1, 1)["decode_seconds_p99"] == 0.1


def test_every_variant_is_first_equally_often():
    orders = [latency.round_order("abcd", number) for number in range(8)]
    assert all(sorted(order) == list("abcd") for order in orders)
    for place in range(4):
        assert sorted(order[place] for order in orders) == sorted("abcd" * 2)
