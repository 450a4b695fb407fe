"""Every case of the official functions: ours agree, or the one table of differences says why not."""

import pytest

from tests.helpers import scoring_cases

FOUND = list(scoring_cases.found())


@pytest.mark.parametrize("rule", scoring_cases.OURS)
def test_what_differs_is_what_the_table_lists(rule):
    differing = {(name, column, number) for name, column, number, *_ in FOUND if name == rule}
    assert differing == {entry for entry in scoring_cases.listed() if entry[0] == rule}


def test_every_column_of_every_rule_is_claimed_or_said_not_to_be():
    claimed = {(rule, column.partition(".")[0]) for rule, columns in scoring_cases.OURS.items() for column in columns}
    refused = {
        (entry["rule"], column)
        for entry in scoring_cases.table()["not_claimed"]
        for column in entry.get("columns", scoring_cases.columns_of(entry["rule"]))
    }
    assert not claimed & refused
    assert claimed | refused == {
        (rule, column) for rule in scoring_cases.rules() for column in scoring_cases.columns_of(rule)
    }


def test_the_table_names_rules_that_exist_and_gives_reasons():
    table = scoring_cases.table()
    entries = [*table["differences"], *table["beyond_the_cases"], *table["not_claimed"]]
    assert {entry["rule"] for entry in entries} | set(table["nothing_found"]) <= set(scoring_cases.rules())
    assert all(len(entry["reason"]) > 20 for entry in entries)


def test_the_stored_cases_are_all_there_and_name_their_source():
    stored = scoring_cases.rules().values()
    assert all(rule["n"] == len(rule["cases"]) > 0 for rule in stored)
    assert sum(rule["n"] for rule in stored) == 259
    assert all("@" in rule["source"] or "mathruler 0.1.0" in rule["source"] for rule in stored)


def test_the_page_prints_the_table():
    assert scoring_cases.page() in scoring_cases.DOCS.read_text(encoding="utf-8")
