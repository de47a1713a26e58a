"""Labelled rows from the standard library: no network, whole files in one part, the same each time."""

import ast
import keyword
import time
from collections import Counter

import pytest
from labelled_files import every, load

from compress.text.labelled import standard
from compress.text.labelled.duplicates import grouped, normal_form

KINDS = {"stdlib:package": "class", "stdlib:kinds": "tags", "stdlib:docstring": "text"}
PASSAGES = "stdlib:passages"


@pytest.fixture(scope="module")
def loaded():
    begun = time.perf_counter()
    data = {name: load(name) for name in standard.NAMES}
    assert time.perf_counter() - begun < 120  # seconds on any machine
    return data


@pytest.mark.parametrize("name", KINDS)
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
    def key(text, second):
        text = text if isinstance(text, str) else " ".join(text)
        return (text, second) if name == PASSAGES else text  # a line may be said of functions of two files

    of = {key(*values[:2]): file for _, values, file in standard._rows(name)}
    data = loaded[name]
    files = [
        {of[key(row.text, row.pair)] for row in part} for part in (data.train, data.heldout, data.evaluation)
    ]
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


def test_passages(loaded):
    data, functions = loaded[PASSAGES], load("stdlib:docstring")
    own = {(row.label, row.text) for row in every(functions)}
    queries: dict[str, list] = {}
    for row in every(data):
        assert (row.label == "1") == ((row.text, row.pair) in own)
        queries.setdefault(row.text, []).append(row)
    assert 5000 < len(every(data)) < 15_000
    for rows in queries.values():
        labels = Counter(row.label for row in rows)
        assert labels["1"] >= 1
        assert labels["0"] >= 1
    assert sum(len(rows) >= 4 for rows in queries.values()) > 0.7 * len(queries)
    parts = [{row.text for row in part} for part in (data.train, data.heldout, data.evaluation)]
    assert len(set.union(*parts)) == sum(map(len, parts)), "all passages of a query are in one part"
