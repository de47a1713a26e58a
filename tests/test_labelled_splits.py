"""Parts of labelled rows: stratified, the same in any order, and nothing in two of them."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_files import SUBJECTS, every, load, rows_csv, sentence, write
from test_labelled_formats import refused

from compress.text.labelled.duplicates import SIMILAR, WORDS, found_in, grouped, normal_form
from compress.text.labelled.splits import cut, sampled

few = settings(max_examples=60, deadline=None)
LABELS = "abcde"


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, ...]]]:
    """Texts with repeats and near repeats, and labels of very unlike frequency."""
    count = draw(st.integers(8, 120))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    words = draw(st.sampled_from([3, 8, 30, 400]))  # of the vocabulary: few make many repeats
    texts, labels = [], []
    for _ in range(count):
        if texts and rng.random() < 0.2:  # a text from before with one word more
            text = texts[int(rng.integers(len(texts)))] + f" w{rng.integers(words)}"
        else:
            text = " ".join(f"w{rng.integers(words)}" for _ in range(int(rng.integers(1, 15))))
        texts.append(text)
        labels.append((LABELS[min(int(rng.exponential(1.2)), 4)],))
    return texts, labels


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def near(one: str, other: str) -> bool:
    """By the definition."""
    a, b = shingles(one), shingles(other)
    return one == other or bool(a and b and len(a & b) >= SIMILAR * len(a | b) - 1e-9)


class TestDuplicates:
    @few
    @given(rows())
    def test_groups_are_those_of_the_definition(self, made):
        texts, _ = made
        group = list(range(len(texts)))
        for i in range(len(texts)):
            for j in range(i):
                if near(texts[i], texts[j]):
                    old, new = max(group[i], group[j]), min(group[i], group[j])
                    group = [new if g == old else g for g in group]
        assert grouped(texts) == group

    @few
    @given(rows(), rows())
    def test_found_in_others(self, one, two):
        texts, others = one[0], two[0]
        for text, found in zip(texts, found_in(texts, others), strict=True):
            candidates = [i for i, other in enumerate(others) if near(text, other)]
            assert (found is None) == (not candidates)
            assert found is None or found in candidates

    def test_case_spaces_and_punctuation(self):
        texts = ["Where is  my CARD?", "where is my card?", "where is my card"]
        assert grouped([normal_form(t) for t in texts]) == [0, 0, 2]  # fewer than five words: as they stand
        texts = ["Where is my new card, please?", "where is my new card please"]
        assert grouped([normal_form(t) for t in texts]) == [0, 0]
        assert grouped([normal_form("a", "b"), normal_form("a b"), normal_form("b", "a")]) == [0, 1, 2]
        long = "one two three four five six seven"
        assert grouped([normal_form(long, "x"), normal_form(long, "y"), normal_form(long, "x")]) == [0, 1, 0]

    def test_groups_are_closed(self):
        words = ["a0", "z1", "b2", *(f"w{i}" for i in range(20))]
        ends, middle = (" ".join(words[i : i + 21]) for i in (0, 2)), " ".join(words[1:22])
        one, other = ends
        assert grouped([one, other]) == [0, 1]
        assert grouped([one, other, middle]) == [0, 0, 0]

    def test_a_template_of_thousands_takes_no_time(self):
        head = " ".join(SUBJECTS * 5)
        assert len(set(grouped([f"{head} {i}" for i in range(3000)]))) == 1

    def test_nothing(self):
        assert grouped([]) == found_in([], ["a"]) == []
        assert found_in(["a"], []) == [None]


class TestCut:
    @few
    @given(rows(), st.integers(0, 100), st.randoms(use_true_random=False))
    def test_what_always_holds(self, made, seed, random):
        texts, labels = made
        n = len(texts)
        found = cut(texts, labels, seed, n // 5, n // 10)
        parts = found.train, found.heldout, found.evaluation
        assert sorted(row for part in parts for row in part) == list(range(n))  # each row once
        assert all(part == sorted(part) for part in parts)
        of = {row: number for number, part in enumerate(parts) for row in part}
        groups = grouped(texts)
        assert all(of[row] == of[groups[row]] for row in range(n))  # duplicates together
        assert {label for (label,) in labels} == {labels[row][0] for row in found.train}  # every label trains
        # no part gets more than its share of a label, but for rounding and what clusters come to
        for part, share in ((found.evaluation, (n // 5) / n), (found.heldout, (n // 10) / n)):
            assert len(part) <= share * n + 1
        # another order of the rows: the same texts in the same parts
        order = list(range(n))
        random.shuffle(order)
        again = cut([texts[i] for i in order], [labels[i] for i in order], seed, n // 5, n // 10)
        for part, other in zip(parts, (again.train, again.heldout, again.evaluation), strict=True):
            assert sorted(order[i] for i in other) == sorted(part)

    @few
    @given(rows(), st.integers(0, 100), st.integers(1, 40))
    def test_groups_stay_together(self, made, seed, files):
        texts, labels = made
        groups = [f"file {i % files}" for i in range(len(texts))]
        found = cut(texts, labels, seed, len(texts) // 5, len(texts) // 10, groups=groups)
        held = [{groups[row] for row in part} for part in (found.train, found.heldout, found.evaluation)]
        assert len(set.union(*held)) == sum(map(len, held))

    def test_each_label_in_its_proportion(self):
        labels = [("a",)] * 100 + [("b",)] * 50 + [("c",)] * 10 + [("d",)] * 2 + [("e",)]
        found = cut([sentence(i) for i in range(163)], labels, 3, 33, 16)
        for part, share in ((found.evaluation, 0.2), (found.heldout, 0.1)):
            counts = Counter(labels[row][0] for row in part)
            for label, rows_of in (("a", 100), ("b", 50), ("c", 10)):
                assert abs(counts[label] - share * rows_of) <= 1.5
        assert "e" not in {labels[row][0] for part in (found.evaluation, found.heldout) for row in part}

    def test_the_seed_decides(self):
        texts, labels = [sentence(i) for i in range(100)], [("a",)] * 100
        assert cut(texts, labels, 0, 20, 10) == cut(texts, labels, 0, 20, 10)
        assert cut(texts, labels, 0, 20, 10).evaluation != cut(texts, labels, 1, 20, 10).evaluation

    def test_rare_tags_come_into_training(self):
        labels = [("O",)] * 40 + [("O", "B-x"), ("O", "B-y")]
        for seed in range(20):
            found = cut([sentence(i) for i in range(42)], labels, seed, 20, 10)
            assert {40, 41} <= set(found.train)

    def test_a_tag_that_is_beside_rarer_ones_only(self):
        labels = [(name, "z") if first else (name,) for name in "abcd" for first in (True, False)]
        for seed in range(40):
            found = cut([sentence(i) for i in range(8)], labels, seed, 4, 0)
            assert any("z" in labels[row] for row in found.train)

    def test_no_more_is_brought_into_training_than_is_needed(self):
        found = cut([sentence(i) for i in range(5)], [("z",)] * 5, 0, 5, 0)
        assert (len(found.train), len(found.evaluation)) == (1, 4)

    def test_many_small_labels_come_to_the_share(self):
        found = cut([sentence(i) for i in range(200)], [(f"l{i // 2}",) for i in range(200)], 0, 40, 20)
        assert (len(found.train), len(found.heldout), len(found.evaluation)) == (140, 20, 40)

    def test_what_a_label_cannot_give_is_not_taken_from_others(self):
        labels = [("a",)] * 100 + [("b",)] * 100
        groups = [f"file {i // 50 if i < 100 else i}" for i in range(200)]
        for seed in range(10):
            found = cut([sentence(i) for i in range(200)], labels, seed, 40, 0, groups=groups)
            assert 20 <= len(found.evaluation) <= 21  # of b alone: the files of a are too large

    @few
    @given(rows(), st.integers(1, 60))
    def test_samples(self, made, most):
        texts, labels = made
        kept = sampled(texts, labels, 0, most)
        assert len(kept) == min(most, len(texts))
        assert kept == sorted(set(kept))
        if most >= len(set(labels)):
            assert {labels[i] for i in kept} == set(labels)


class TestLoaded:
    def test_parts_that_are_cut(self, tmp_path):
        lines = [f"{sentence(i)},{'ab'[i % 2]}" for i in range(100)]
        lines += [
            f"{sentence(0).upper()},a",
            f"A much longer {sentence(1)} than five words,b",
            f"a much longer {sentence(1)} than five words!,b",
        ]
        data = load(write(tmp_path / "r.csv", "\n".join(["text,label", *lines])))
        told = data.notes["duplicates"]
        assert [told[name] for name in ("same", "near", "largest", "other_labels")] == [1, 1, 2, 0]
        assert told["example"]["place"] == f"{tmp_path}/r.csv:104"
        assert told["example"]["like"].startswith("A much")
        assert data.notes["rows"] == {"evaluation": 21, "heldout": 10, "train": 72}
        assert data.notes["split"] == {"heldout": "cut", "evaluation": "cut"}
        assert data == load(str(tmp_path / "r.csv"))
        assert data.evaluation != load(str(tmp_path / "r.csv"), seed=1).evaluation

    def test_the_order_of_the_file_decides_nothing(self, tmp_path):
        lines = [f"{sentence(i % 60)},{'ab'[i % 2]}" for i in range(100)]
        one = load(write(tmp_path / "r.csv", "\n".join(["text,label", *lines])))
        two = load(write(tmp_path / "s.csv", "\n".join(["text,label", *lines[::-1]])))
        for part in ("train", "heldout", "evaluation"):
            assert Counter(getattr(one, part)) == Counter(getattr(two, part))

    def test_given_parts_are_compared_and_left(self, tmp_path):
        train = rows_csv(tmp_path / "r.csv", 40)
        lines = ["text,label", f"{sentence(3).upper()},a", "a text of its own altogether,b"]
        dev = write(tmp_path / "dev.csv", "\n".join(lines))
        data = load(train, evaluation=dev, heldout=dev)
        assert [len(part) for part in (data.train, data.heldout, data.evaluation)] == [40, 2, 2]
        told = data.notes["overlaps"]
        assert (told["evaluation"]["same"], told["evaluation"]["near"]) == (2, 0)
        assert told["heldout"]["same"] == 1
        assert told["heldout"]["example"]["like_place"] == f"{train}:5"
        assert "duplicates" not in data.notes

    def test_limits(self, tmp_path):
        file = rows_csv(tmp_path / "r.csv", 100)
        data = load(file, evaluation_rows=6, heldout_rows=4, train_rows=20)
        assert [len(part) for part in (data.train, data.heldout, data.evaluation)] == [20, 4, 6]
        for part in (data.train, data.heldout, data.evaluation):
            assert set(Counter(row.label for row in part).values()) == {len(part) // 2}
        assert len(load(file, evaluation=file, evaluation_rows=6).evaluation) == 6
        few_rows = rows_csv(tmp_path / "s.csv", 60, "abcdef")
        refused(r"labelled\.(heldout|evaluation): \S+:\d+ has the label .+", few_rows, train_rows=2)

    def test_too_few_rows(self, tmp_path):
        file = write(tmp_path / "r.csv", "text,label\none,a\ntwo,b\n")
        refused(
            rf"labelled\.evaluation: none of the 2 rows of {file} can be cut off, since every label .+", file
        )
        file = write(tmp_path / "s.csv", "text,label\n" + "the same,a\n" * 9 + "other,b\n" * 9)
        refused(rf"labelled\.evaluation: none of the 18 rows of {file} can be cut off, .+", file)

    def test_texts_with_several_labels_are_counted(self, tmp_path):
        lines = [f"{sentence(i % 20)},{'ab'[i // 20]}" for i in range(40)]
        data = load(write(tmp_path / "r.csv", "\n".join(["text,label", *lines])))
        assert data.notes["duplicates"]["other_labels"] == 20


class TestMixed:
    def files(self, folder):
        one, two = rows_csv(folder / "one.csv", 100), folder / "two.jsonl"
        rows_two = [{"text": f"{sentence(500 + i)} over there", "label": "ab"[i % 2]} for i in range(60)]
        write(two, "\n".join(map(json.dumps, rows_two)))
        return one, str(two)

    def test_shares(self, tmp_path):
        one, two = self.files(tmp_path)
        data = load([{"source": one, "share": 3}, two])
        counts = Counter("over there" in row.text for row in data.train)
        assert counts[False] == pytest.approx(3 * counts[True], abs=2)
        assert len(data.evaluation) == 32  # of all rows

    def test_a_proxy_trains_only(self, tmp_path):
        one, two = self.files(tmp_path)
        copy = write(tmp_path / "three.csv", (tmp_path / "one.csv").read_text())
        data = load([{"source": one}, {"source": two, "share": 0.5, "proxy": True}])
        assert not any("over there" in row.text for row in data.evaluation + data.heldout)
        assert any("over there" in row.text for row in data.train)
        assert len(data.evaluation) == 20
        both = load([{"source": one}, {"source": copy, "proxy": True}])
        assert not {row.text for row in both.evaluation} & {row.text for row in both.train}
        assert both.notes["duplicates"]["proxies_left_out"] == 30
        assert len(every(both)) == 70 + 70 + 30
