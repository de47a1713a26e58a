"""The list of changes that tests must notice (mutants.py): it fits the code, and is long enough."""

import ast
from pathlib import Path

import pytest
from mutants import MUTANTS

import compress

PACKAGE = Path(compress.__file__).parent


@pytest.mark.parametrize("where", sorted({mutant.where for mutant in MUTANTS}))
def test_every_change_can_still_be_made_and_is_python(where):
    for mutant in MUTANTS:
        if mutant.where == where:
            ast.parse(mutant.applied(PACKAGE))


def test_every_change_names_tests_that_exist_and_is_there_once():
    assert all((Path(__file__).parent / mutant.test).is_file() for mutant in MUTANTS)
    assert len(set(MUTANTS)) == len(MUTANTS) >= 60
    assert all(mutant.old != mutant.new for mutant in MUTANTS)
