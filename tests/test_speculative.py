"""A draft changes how fast a text is written, and nothing about the text."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from cli_helpers import ROOT, invoke, refused
from export_models import MODELS, exported, session_entry, tiny_bundle, tiny_model, tokens, torch_logits
from training_set import tiny_bundle as other_tokenizer

from compress.errors import UserError
from compress.generation.counts import Counts
from compress.generation.generator import TextGenerator
from compress.generation.plain import continue_tokens
from compress.generation.sampling import Chooser, Sampling
from compress.generation.speculative import DraftLength, accept, best_length, speculate
from compress.measure.speedup import measure_speedup
from compress.runtimes import open_text_runtime

PROMPT = [3, 14, 15, 92, 65]


@pytest.fixture(autouse=True)
def only_bytes_cost(monkeypatch):
    monkeypatch.setattr("compress.generation.speculative._CHECK", 0.0)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """(model, seed) -> its folder in torch; its graph lies in `onnx` inside."""
    found = {}
    for name, seed in (("llama", 0), ("llama", 1), ("mistral_window", 0)):
        bundle = tiny_bundle(name).evolve(model=tiny_model(name, seed))
        folder = found[name, seed] = tmp_path_factory.mktemp("models") / name
        bundle.save(folder)
        exported(bundle, folder / "onnx")
    return found


def runtime(artifacts, kind, name, seed, cheap=False):
    model = open_text_runtime(artifacts[name, seed] / ("onnx" if kind == "onnxruntime" else "."), 1)
    if cheap:  # as a draft it seems to cost nothing, and guesses as far ahead as it may
        model.step_bytes = 1
    return model


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
@pytest.mark.parametrize(
    ("target", "draft"),
    [("torch", "torch"), ("onnxruntime", "onnxruntime"), ("onnxruntime", "torch"), ("torch", "onnxruntime")],
)
def test_greedy_is_token_for_token_what_the_target_alone_writes(artifacts, name, target, draft):
    model = runtime(artifacts, target, name, 0)
    limit = 30
    alone = list(continue_tokens(model, PROMPT, Chooser(Sampling()), limit))
    assert len(set(alone)) > 5, "a model that repeats itself proves nothing"
    for other in ((name, 0), ("llama", 1)):
        guesser = runtime(artifacts, draft, *other, cheap=True)
        for longest in (1, 5) if other[1] == 0 else (5,):
            counts = Counts()
            guesses = speculate(
                model, guesser, PROMPT, Chooser(Sampling()), limit, longest=longest, counts=counts
            )
            assert list(guesses) == alone
            assert counts.tokens == limit == counts.decoded + 1
            if other == (name, 0):  # the draft is the target itself: every guess is right
                assert counts.acceptance == 1
                assert counts.calls == -(-(limit - 1) // (longest + 1))
            else:
                assert counts.acceptance < 0.5


@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
def test_an_end_token_inside_a_draft_ends_the_text(artifacts, kind):
    model, draft = runtime(artifacts, kind, "llama", 0), runtime(artifacts, kind, "llama", 0, cheap=True)
    alone = list(continue_tokens(model, PROMPT, Chooser(Sampling()), 20))
    end = next(t for i, t in enumerate(alone) if i > 3 and t not in alone[:i])
    found = list(speculate(model, draft, PROMPT, Chooser(Sampling()), 20, [end], longest=5))
    assert found == alone[: alone.index(end)]


@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
def test_the_repetition_penalty_sees_the_guesses_before_a_token(artifacts, kind):
    model = runtime(artifacts, kind, "llama", 0)
    sampling = Sampling(repetition_penalty=1.5)
    alone = list(continue_tokens(model, PROMPT, Chooser(sampling), 30))
    assert alone != list(continue_tokens(model, PROMPT, Chooser(Sampling()), 30))
    for seed in (1, 0):
        guesser = runtime(artifacts, kind, "llama", seed, cheap=True)
        counts = Counts()
        guesses = speculate(model, guesser, PROMPT, Chooser(sampling), 30, longest=4, counts=counts)
        assert list(guesses) == alone
    assert counts.acceptance == 1, "the target's own guesses, penalised alike"


@pytest.mark.parametrize("name", MODELS)
def test_appending_and_stepping_back_give_the_logits_of_the_text(name, tmp_path):
    bundle = tiny_bundle(name)
    bundle.save(tmp_path / "torch")
    ids, wrong = tokens(batch=1, length=40)[0], tokens(batch=1, length=4, seed=9)[0]
    expected = torch_logits(bundle.model, ids[None])[0]
    for model in (exported(bundle, tmp_path / "onnx"), open_text_runtime(tmp_path / "torch", 1)):
        assert model.rewinds
        state = model.prefill(ids[None, :12])
        for start in range(12, 40, 4):
            state, _ = model.append(state, wrong[:2])
            state, _ = model.append(state, wrong[2:])
            state = model.rewind(state, start)
            state, logits = model.append(state, ids[start : start + 4])
            state = model.rewind(state, start + 4)
            assert np.abs(logits - expected[start : start + 4]).max() < 1e-5 * np.abs(expected).max()
            assert state.length == start + 4


def drawn(p, q, seed):
    """Of many rounds with drafts from q: the tokens of each round."""
    choose = Chooser(Sampling(temperature=1.0, seed=seed))
    rounds = []
    for _ in range(6_000):
        drafted = [choose.draw(row) for row in q]
        kept, following = accept(drafted, q, p, choose)
        rounds.append([*drafted[:kept], following])
    return rounds


@pytest.mark.parametrize("seed", range(2))
def test_sampled_tokens_have_exactly_the_target_s_distribution(seed):
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.ones(4), size=3), random.dirichlet(np.ones(4), size=2)
    p[1, 2] = 0  # what the target forbids
    p[1] /= p[1].sum()
    rounds = drawn(p, q, seed)
    for place in range(3):
        # a token stands here only if those before were kept, and must not depend on that
        found = np.array([tokens[place] for tokens in rounds if len(tokens) > place])
        assert len(found) > 500
        counts = np.bincount(found, minlength=4)
        expected = p[place] * len(found)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        chi2 = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi2 < 21.1, "a chance of 1 in 10,000 with 3 degrees of freedom"
    # theorem 3.5 of Leviathan et al.: a guess is kept with probability sum min(p, q)
    kept = np.mean([len(tokens) > 1 for tokens in rounds])
    assert kept == pytest.approx(np.minimum(p[0], q[0]).sum(), abs=0.02)


def test_a_sampled_text_has_the_target_s_distribution_through_real_models(artifacts):
    target, draft = (runtime(artifacts, "onnxruntime", "llama", seed, cheap=True) for seed in (0, 1))
    sampling = Sampling(temperature=3.0, top_k=3)
    state = target.prefill(np.asarray([PROMPT], dtype=np.int32))
    first = int(sampling.distribution(state.logits[0]).argmax())
    p = sampling.distribution(target.decode(state, np.asarray([first])).logits[0])
    found = np.zeros(len(p))
    for seed in range(400):
        chosen = Sampling(temperature=3.0, top_k=3, seed=seed)
        text = list(speculate(target, draft, PROMPT, Chooser(chosen), 2, longest=2))
        if text[0] == first:
            found[text[1]] += 1
    assert found.sum() > 100
    possible = p > 0
    assert found[~possible].sum() == 0
    expected = p[possible] * found.sum()
    assert ((found[possible] - expected) ** 2 / expected).sum() < 18.4  # 1 in 10,000 with 2 degrees


def test_the_same_seed_writes_the_same_text(artifacts):
    target, draft = (runtime(artifacts, "onnxruntime", "llama", seed) for seed in (0, 1))

    def text(seed):
        choose = Chooser(Sampling(temperature=2.0, seed=seed))
        return list(speculate(target, draft, PROMPT, choose, 30))

    assert text(1) == text(1) != text(2)


def test_a_text_outgrows_the_draft_s_context(artifacts, tmp_path):
    small = tiny_bundle("llama")
    small.model.config.max_position_embeddings = 16
    exported(small, tmp_path)
    draft = open_text_runtime(tmp_path, 1)
    draft.step_bytes = 1
    target = runtime(artifacts, "onnxruntime", "llama", 0)
    for prompt in (PROMPT, PROMPT * 4):
        alone = list(continue_tokens(target, prompt, Chooser(Sampling()), 30))
        counts = Counts()
        assert list(speculate(target, draft, prompt, Chooser(Sampling()), 30, counts=counts)) == alone
        assert counts.drafted == counts.accepted
        assert (counts.drafted == 0) == (len(prompt) > 16)
        assert counts.drafted <= 17 - len(PROMPT)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_vocabularies_may_be_padded_differently(artifacts, tmp_path, temperature):
    padded = tiny_bundle("llama")
    padded.model.resize_token_embeddings(128, mean_resizing=False)
    padded.model.lm_head.weight.data[97:] = 1e3  # the likeliest of all where it is not cut off
    exported(padded, tmp_path)
    padded, plain = open_text_runtime(tmp_path, 1), runtime(artifacts, "onnxruntime", "llama", 0)
    choose = Chooser(Sampling(temperature=temperature))
    text = list(speculate(plain, padded, PROMPT, choose, 20))
    assert max(text) < 97
    # the other way round: the target writes tokens that the draft has never heard of
    alone = list(continue_tokens(padded, PROMPT, choose, 8))
    text = list(speculate(padded, plain, PROMPT, choose, 8))
    assert len(text) == 8
    assert max(alone) > 96
    assert temperature or text == alone


def test_drafts_get_shorter_where_guesses_are_wrong_and_longer_where_they_are_right():
    length = DraftLength(longest=8, cost=0.1)
    for _ in range(20):
        drafted = length()
        length.learn(drafted, 0)
    asked = [length() for _ in range(100)]
    assert 0 < sum(asked) < 10, "a draft that is always wrong is asked now and then"
    for _ in range(400):
        drafted = length()
        length.learn(drafted, drafted)
    assert length() == 8
    assert best_length(0.8, 0.1, 8) > best_length(0.8, 0.5, 8), "a dearer draft guesses less"


def test_the_best_length_is_the_one_with_most_tokens_per_time():
    for acceptance, cost in itertools.product((0.05, 0.3, 0.77, 0.95), (0.01, 0.2, 0.9)):
        speeds = [(1 - acceptance ** (n + 1)) / ((1 - acceptance) * (n * cost + 1)) for n in range(11)]
        assert best_length(acceptance, cost, 10) == int(np.argmax(speeds))


def test_the_command_writes_the_same_with_a_draft_and_tells_what_it_gained(artifacts):
    folder, draft = artifacts["llama", 0] / "onnx", artifacts["llama", 1]
    common = ("generate", folder, "--prompt", "w3 w34 w55", "--tokens", 20, "--threads", 1)
    plain = invoke(*common, "--stats")
    drafted = invoke(*common, "--stats", "--draft", draft, "--draft-tokens", 3)
    assert plain.code == drafted.code == 0, drafted.err
    assert plain.out == drafted.out
    assert "tokens/s" in plain.err
    assert "1.00 tokens per call" in plain.err
    assert "drafted tokens accepted" in drafted.err
    assert "drafted" not in plain.err


def test_two_models_that_take_turns_do_not_wait_on_each_other_s_cores(artifacts):
    """Threads that spin after a run would keep the other model's from running; alone, spinning is faster."""
    folder = artifacts["llama", 0] / "onnx"

    pair = TextGenerator(folder, draft=folder, threads=1)
    alone = TextGenerator(folder, threads=1)
    runtimes = [pair.runtime, pair.draft, alone.runtime]
    found = [session_entry(runtime, "session.force_spinning_stop") for runtime in runtimes]
    assert found == ["1", "1", None]


def test_a_draft_of_another_tokenizer_is_refused(artifacts, tmp_path):
    other_tokenizer().save(tmp_path / "other")
    line = refused("generate", artifacts["llama", 0], "-p", "w3", "--draft", tmp_path / "other")
    assert "has another tokenizer than" in line
    assert "97 tokens" in line
    assert "no tokenizer.json" in refused("generate", artifacts["llama", 0], "-p", "w3", "--draft", tmp_path)
    with pytest.raises(UserError, match="draft_tokens: 0 is not valid"):
        TextGenerator(artifacts["llama", 0], draft=artifacts["llama", 1], draft_tokens=0)


def test_the_speed_up_is_measured_in_turns(artifacts):
    target = artifacts["llama", 0] / "onnx"
    found = measure_speedup(
        target, target, ["w3 w4", "w5 w6 w7"], tokens=30, draft_tokens=3, rounds=2, threads=1
    )
    assert found.same_text == found.acceptance == 1
    assert found.tokens == 2 * 2 * 30
    assert 1 < found.tokens_per_call < 1.2, "a draft that costs what the target does is asked now and then"
    low, high = found.speedup_ci95
    assert 0 < low <= found.speedup <= high
    with pytest.raises(UserError, match="measure nothing"):
        measure_speedup(target, target, [])


def test_the_benchmark_writes_a_line(artifacts, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "lines.jsonl"
    text.write_text(" ".join(f"w{i % 90}" for i in range(200)))
    command = [
        sys.executable, ROOT / "benchmarks" / "speculative.py", artifacts["llama", 0] / "onnx",
        artifacts["llama", 1] / "onnx", "--text", text, "--prompts", 2, "--prompt-characters", 20,
        "--tokens", 4, "--rounds", 1, "--threads", 1, "--output", output,
    ]  # fmt: skip
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    (line,) = map(json.loads, output.read_text().splitlines())
    assert line["prompts"] == 2
    assert line["tokens"] == 8
    assert line["speedup"] > 0
    assert "onnxruntime" in line["versions"]
