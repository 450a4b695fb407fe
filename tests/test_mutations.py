"""The list of mutations fits the tree, and the harness tells a killed mutation from a survivor."""

import pytest

from tests.helpers.tree import ROOT
from tests.mutations.harness import Mutation, campaign, read_list

LISTED = read_list()


def test_there_are_at_least_thirty():
    assert len(LISTED) >= 30


@pytest.mark.parametrize("mutation", LISTED, ids=str)
def test_a_listed_mutation_matches_once_and_names_tests_that_exist(mutation):
    assert mutation.matches(ROOT)
    assert all((ROOT / test.partition("::")[0]).exists() for test in mutation.tests)


def test_the_harness_reports_killed_survived_and_unmatched(tmp_path):
    (tmp_path / "doubling.py").write_text("def double(x):\n    return x + x\n")
    (tmp_path / "test_it.py").write_text("from doubling import double\n\ndef test():\n    assert double(2) == 4\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    edits = [("x + x", "x - x"), ("x + x", "x * 2"), ("absent", "present"), ("x + x", "x +")]
    mutations = [Mutation("doubling.py", old, new, ("test_it.py",)) for old, new in edits]
    outcomes = [outcome for _, outcome in campaign(tmp_path, mutations, jobs=1)]
    assert outcomes == ["killed", "survived", "no match", "killed"]
    assert (tmp_path / "doubling.py").read_text() == "def double(x):\n    return x + x\n"


def test_tests_that_fail_before_the_mutation_prove_nothing(tmp_path):
    (tmp_path / "doubling.py").write_text("x = 1\n")
    (tmp_path / "test_it.py").write_text("def test():\n    assert False\n")
    mutation = Mutation("doubling.py", "1", "2", ("test_it.py",))
    assert campaign(tmp_path, [mutation], jobs=1) == [(mutation, "tests broken")]
