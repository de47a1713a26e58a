"""A sample of the campaign: damaged inputs of every kind, and hostile files, in a process of its own."""

import re

from campaign.core import Outcome, distinct, table
from cli_helpers import ROOT, python


def test_a_sample():
    done = python(
        "-m", "tests.campaign", "mutations", "hostile", "--count", 30, "--seed", 7, path=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| **all**")]
    assert len(rows) == 2
    for row in rows:
        cases, *verdicts = (int(cell) for cell in re.findall(r"\d+", row))
        assert (cases, sum(verdicts), len(verdicts)) == (30, 30, 2)  # refused, right
        assert min(verdicts) > 0


def test_bad_ones_are_told_apart_and_counted():
    outcomes = [
        Outcome("a", "right"),
        Outcome("a", "hang", "one\ntwo", "x"),
        Outcome("a", "hang", "three\ntwo", "y"),
        Outcome("b", "hang", "two", "z"),
    ]
    assert [o.again for o in distinct(outcomes)] == ["x", "z"]
    assert table(outcomes).splitlines()[2:] == [
        "| a | 3 | 1 | 2 |",
        "| b | 1 | 0 | 1 |",
        "| **all** | 4 | 1 | 3 |",
    ]
