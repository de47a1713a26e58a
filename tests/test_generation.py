"""Generation over a runtime that is a table: what comes next is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.generation.generator import TextGenerator
from compress.generation.plain import continue_tokens
from compress.generation.sampling import Chooser, Sampling
from compress.generation.text import Writing, pieces


class Counter:
    """A runtime whose next token is the last one plus one, modulo ten."""

    name, device, weight_bytes, context = "torch", "cpu", 0, 64

    def logits(self, tokens):
        return np.eye(10, dtype=np.float32)[(tokens + 1) % 10]

    def prefill(self, tokens):
        return CounterState(tokens)

    def decode(self, state, tokens):
        return CounterState(np.concatenate((state.tokens, tokens[:, None]), axis=1))


class CounterState:
    def __init__(self, tokens):
        self.tokens = tokens
        self.length = tokens.shape[1]
        self.logits = 10 * np.eye(10, dtype=np.float32)[(tokens[:, -1] + 1) % 10]


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_greedy_follows_the_likeliest_and_stops_at_the_limit():
    assert list(continue_tokens(Counter(), [3], Chooser(Sampling()), 4)) == [4, 5, 6, 7]


def test_an_end_token_ends_the_text_and_is_not_part_of_it():
    assert list(continue_tokens(Counter(), [3], Chooser(Sampling()), 40, ends=[7])) == [4, 5, 6]


def test_the_same_seed_samples_the_same_tokens():
    def sample(seed):
        return list(continue_tokens(Counter(), [0], Chooser(Sampling(temperature=20.0, seed=seed)), 30))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_low_temperature_is_nearly_greedy():
    tokens = list(continue_tokens(Counter(), [0], Chooser(Sampling(temperature=0.05)), 20))
    assert tokens == [(i + 1) % 10 for i in range(20)]


@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=30),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1.0),
)
def test_a_distribution_sums_to_one_and_keeps_the_likeliest(logits, top_k, top_p):
    scores = np.array(logits, dtype=np.float32)  # two logits may be equal in float32 alone
    found = Sampling(1.0, top_k, top_p).distribution(scores)
    assert found.sum() == pytest.approx(1.0)
    assert found[np.argmax(scores)] == found.max() > 0
    if top_k:
        assert np.count_nonzero(found) <= top_k


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    found = Sampling(temperature=1.0, top_p=0.7).distribution(
        np.log(np.array([0.2, 0.5, 0.25, 0.05], dtype=np.float32))
    )
    assert np.round(found, 3).tolist() == [0.0, 0.667, 0.333, 0.0]


def test_split_characters_are_held_back_until_they_are_whole():
    text = "aé€b"
    found = list(pieces(Writing(Bytes(), list(b"x")), iter(text.encode())))
    assert found == ["a", "é", "€", "b"]


def test_a_folder_that_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        TextGenerator(tmp_path)
