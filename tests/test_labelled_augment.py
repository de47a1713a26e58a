"""Words changed at a rate with their tags beside them; weights and orders against imbalance."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.errors import UserError
from compress.text.labelled.augment import Rates, Vocabulary, augmented, augmented_row, augmented_words
from compress.text.labelled.base import Row
from compress.text.labelled.weights import balanced_order, class_weights

few = settings(max_examples=60, deadline=None)
NEW = ("new1", "new2", "new3")
LONG = [f"w{i}" for i in range(20_000)]


def rng(seed=0):
    return np.random.default_rng(seed)


class TestText:
    @pytest.mark.parametrize("change", ["replace", "delete", "insert", "swap"])
    def test_the_rate_is_the_share_of_words(self, change):
        words = augmented(" ".join(LONG), rng(), Rates(**{change: 0.1}), NEW).split()
        new = sum(word in NEW for word in words)
        left = [word for word in words if word not in NEW]
        within = pytest.approx(2000, abs=150)  # 3.5 standard deviations
        if change == "replace":
            assert (new, len(words)) == (within, len(LONG))
        elif change == "delete":
            assert (new, len(LONG) - len(words)) == (0, within)
        elif change == "insert":
            assert (new, left) == (within, LONG)
        else:
            assert sorted(words) == sorted(LONG)
            moved = [abs(int(word[1:]) - i) for i, word in enumerate(words)]
            assert max(moved) == 1
            assert sum(moved) / 2 == pytest.approx(
                2000 * 10 / 11, abs=150
            )  # what was swapped has had its turn
        if change != "swap":
            assert left == sorted(left, key=lambda word: int(word[1:]))  # in their order

    def test_nothing_asked_changes_nothing(self):
        text = "  two\tspaces   stay "
        assert augmented(text, rng(), Rates(), NEW) == text

    def test_a_word_is_left(self):
        assert augmented("one", rng(), Rates(delete=1), NEW) == "one"
        for seed in range(20):
            assert len(augmented("one two three", rng(seed), Rates(delete=1), NEW).split()) == 1

    def test_the_seed_decides(self):
        rates, text = Rates(replace=0.2, delete=0.1, insert=0.1, swap=0.1), " ".join(LONG[:50])
        assert augmented(text, rng(1), rates, NEW) == augmented(text, rng(1), rates, NEW)
        assert augmented(text, rng(1), rates, NEW) != augmented(text, rng(2), rates, NEW)

    def test_a_word_is_replaced_by_another(self):
        assert augmented("a a a a", rng(), Rates(replace=1), ("a", "b")) == "b b b b"

    def test_what_is_refused(self):
        with pytest.raises(ValidationError, match=r"come to 1\.2; a word takes one change at most"):
            Rates(replace=0.6, delete=0.6)
        with pytest.raises(UserError, match=r"augmentation: replace and insert need the words of training"):
            augmented("a b", rng(), Rates(insert=0.5), ())


TAGS = ("O", "B-x", "I-x", "B-y")


class TestTags:
    @few
    @given(st.lists(st.sampled_from("OBIY"), min_size=1, max_size=40), st.integers(0, 1000))
    def test_tags_follow_their_words_and_names_stay_whole(self, letters, seed):
        tags: list[str] = []
        for letter in letters:
            tag = {"O": "O", "B": "B-x", "I": "I-x", "Y": "B-y"}[letter]
            if tag == "I-x" and (not tags or tags[-1] not in ("B-x", "I-x")):
                tag = "B-x"
            tags.append(tag)
        words = [f"{tag}:{i}" for i, tag in enumerate(tags)]
        vocabulary = {tag: (f"{tag}:new",) for tag in TAGS}
        rates = Rates(replace=0.2, delete=0.2, insert=0.2, swap=0.2)
        new_words, new_tags = augmented_words(words, tags, rng(seed), rates, vocabulary)
        assert len(new_words) == len(new_tags) >= 1
        last = "O"
        for word, tag in zip(new_words, new_tags, strict=True):
            own = word.split(":")[0]
            assert tag == own or (own == "I-x" and tag == "B-x")  # the first of its name is gone
            assert tag != "I-x" or last in ("B-x", "I-x")
            assert tag == "O" or not word.endswith("new") or own == tag or own == "I-x"
            last = tag

    def test_other_tags_than_names(self):
        words, tags = augmented_words(
            ["a", "b"], ["N", "V"], rng(), Rates(insert=1), {"N": ["n"], "V": ["v"]}
        )
        assert (words, tags) == (("a", "n", "b", "v"), ("N", "N", "V", "V"))

    def test_rows(self):
        rows = [Row("a b", ("O", "B-x"), None, ("a", "b")), Row("c d", "y"), Row("e", "y", "f g")]
        vocabulary = Vocabulary.of(rows)
        assert vocabulary.words == tuple("abcdefg")
        assert vocabulary.tagged == {"O": ("a",), "B-x": ("b",)}
        rates = Rates(insert=1)
        found = augmented_row(rows[0], rng(), rates, vocabulary)
        assert (found.words, found.label) == (("a", "a", "b", "a"), ("O", "O", "B-x", "O"))
        assert found.text == "a a b a"
        found = augmented_row(rows[2], rng(), rates, vocabulary)
        assert (len(found.text.split()), len((found.pair or "").split()), found.label) == (2, 4, "y")
        span = Row("who now", ((0, "f"),), "f g")
        found = augmented_row(span, rng(), rates, vocabulary)
        assert (found.label, found.pair, len(found.text.split())) == (span.label, "f g", 4)


class TestWeights:
    def test_balanced(self):
        rows = [Row("t", "a")] * 6 + [Row("t", "b")] * 2
        assert class_weights(rows, ["b", "a"]) == [8 / (2 * 2), 8 / (2 * 6)]
        assert class_weights(rows, ["b", "a", "never"]) == [*class_weights(rows, ["b", "a"]), 0]
        weights = dict(zip("ab", class_weights(rows, ["a", "b"]), strict=True))
        assert np.mean([weights[str(row.label)] for row in rows]) == pytest.approx(1)

    def test_of_tags_and_several_labels(self):
        rows = [Row("x y z", ("O", "O", "B"), None, ("x", "y", "z"))]
        assert class_weights(rows, ["O", "B"]) == [3 / 4, 3 / 2]
        assert class_weights([Row("t", ("a", "b")), Row("t", ("a",)), Row("t", ())], ["a", "b"]) == [
            3 / 4,
            3 / 2,
        ]

    def test_a_label_that_is_no_name(self):
        with pytest.raises(UserError, match="labelled: a row has the label 'c', which is none of the names"):
            class_weights([Row("t", "c")], ["a"])

    @few
    @given(
        st.lists(st.sampled_from("aaaaabbc"), max_size=80),
        st.floats(0, 1),
        st.integers(0, 200),
        st.integers(0, 99),
    )
    def test_orders(self, labels, strength, count, seed):
        order = balanced_order(labels, rng(seed), strength, count)
        assert len(order) == (count if labels else 0)
        counts = Counter(labels)
        weight = {label: n ** (1 - strength) for label, n in counts.items()}
        for label in counts:
            wanted = count * weight[label] / sum(weight.values())
            assert abs(sum(labels[i] == label for i in order) - wanted) < 1
            times = Counter(i for i in order if labels[i] == label)
            if times:
                fewest = min(times[i] for i, one in enumerate(labels) if one == label)
                assert max(times.values()) - fewest <= 1  # in turns

    def test_ends(self):
        assert sorted(balanced_order(list("aab"), rng(), 0.0)) == [0, 1, 2]
        order = balanced_order(["a"] * 90 + ["b"] * 10, rng(3))
        assert sum(i >= 90 for i in order) == 50
        assert order != balanced_order(["a"] * 90 + ["b"] * 10, rng(4))
        with pytest.raises(UserError, match=r"strength: 2 given; it lies between 0"):
            balanced_order(["a"], rng(), 2.0)
