"""Labelled rows from the standard library: no network, whole files in one part, the same each time."""

import ast
import keyword
import time
from collections import Counter

import pytest
from labelled_files import every, load

from compress.text.labelled import standard
from compress.text.labelled.duplicates import grouped, normal_form

KINDS = dict(zip(standard.NAMES, ("class", "tags", "text"), strict=True))


@pytest.fixture(scope="module")
def loaded():
    begun = time.perf_counter()
    data = {name: load(name) for name in standard.NAMES}
    assert time.perf_counter() - begun < 120  # seconds on any machine
    return data


@pytest.mark.parametrize("name", standard.NAMES)
def test_some_thousand_rows_and_no_text_twice(loaded, name):
    data = loaded[name]
    assert data.kind == KINDS[name]
    assert 1000 < len(every(data)) <= 3000
    assert min(len(data.train), len(data.heldout), len(data.evaluation)) > 50
    forms = [normal_form(row.text) for row in every(data)]
    assert grouped(forms) == list(range(len(forms)))
    assert data == load(name)
    assert data.notes["split"] == {"heldout": "cut", "evaluation": "cut"}


@pytest.mark.parametrize("name", standard.NAMES)
def test_no_file_is_in_two_parts(loaded, name):
    of = {
        values[0] if isinstance(values[0], str) else " ".join(values[0]): file
        for _, values, file in standard._rows(name)
    }
    data = loaded[name]
    files = [{of[row.text] for row in part} for part in (data.train, data.heldout, data.evaluation)]
    assert sum(map(len, files)) == len(set.union(*files))
    assert all(files)


def test_packages(loaded):
    data = loaded["stdlib:package"]
    assert len(data.names) == 10
    assert {"asyncio", "email", "xml"} <= set(data.names)
    for part in (data.train, data.heldout, data.evaluation):
        assert {row.label for row in part} == set(data.names)
    counts = Counter(row.label for row in every(data))
    assert max(counts.values()) <= 300
    assert {len(row.text.split("\n")) for row in every(data)} == {8}


def test_kinds(loaded):
    data = loaded["stdlib:kinds"]
    assert set(data.names) == {"bracket", "comment", "keyword", "name", "number", "operator", "string"}
    for row in every(data):
        assert len(row.words) == len(row.label) >= 4
        for word, kind in zip(row.words, row.label, strict=True):
            assert word == "".join(word.split())  # one word each
            assert (kind == "keyword") == keyword.iskeyword(word)
            assert kind != "comment" or word.startswith("#")
            assert kind != "name" or word.isidentifier()


def test_docstrings(loaded):
    for row in every(loaded["stdlib:docstring"]):
        (function,) = ast.parse(row.text).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert "\n" not in row.label
        assert row.label not in row.text
