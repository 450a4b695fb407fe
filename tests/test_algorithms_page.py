"""The page of algorithms lists every function of ``cpt_rft.algos``, its source, and tests that exist."""

import ast
import re

from tests.helpers.tree import ROOT

PAGE = (ROOT / "docs" / "algorithms.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| `")]


def sources() -> dict[str, str]:
    """What follows ``Source:`` in the docstring of each public ``module.function``, on one line."""
    found = {}
    for path in sorted((ROOT / "cpt_rft" / "algos").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                paragraph = (ast.get_docstring(node) or "").partition("Source: ")[2].partition("\n\n")[0]
                found[f"{path.stem}.{node.name}"] = " ".join(paragraph.split()).partition(" Differs from: ")[0]
    return found


def test_every_function_has_one_row() -> None:
    assert sorted(row[0].strip("`") for row in ROWS) == sorted(sources())


def test_sources_are_those_of_the_code() -> None:
    assert {row[0].strip("`"): f"{row[2]}." for row in ROWS} == sources()


def test_every_row_has_an_equation_and_names_tests_that_exist() -> None:
    for function, equation, _, checks in ROWS:
        assert equation.startswith("`"), function
        for check in checks.split(", "):
            file, _, name = check.strip("`").partition("::")
            assert f"def {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), (function, check)


def test_what_is_not_offered_is_on_the_page() -> None:
    from cpt_rft.algos.losses import LOSSES, NOT_OFFERED

    listed = dict(re.findall(r"^- `(\w+)`: (.*)$", PAGE, re.MULTILINE))
    assert {name: reason for name, reason in listed.items() if name in NOT_OFFERED} == {
        name: f"{reason}." for name, reason in NOT_OFFERED.items()
    }
    assert set(LOSSES) | set(NOT_OFFERED) == set(listed)
