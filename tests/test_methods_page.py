"""The page of methods lists every file of ``configs/methods`` that is no rival, and files that exist."""

from tests.helpers.tree import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_method_has_one_row_or_stands_among_the_rivals() -> None:
    listed = [row[0].strip("`") for row in ROWS]
    assert len(set(listed)) == len(listed)
    rivals = (ROOT / "docs" / "rivals.md").read_text()
    for path in (ROOT / "configs" / "methods").glob("*.yaml"):
        rival = f"| `{path.stem.partition('_')[2]}` |" in rivals
        assert (path.stem in listed) != rival, path.stem
    assert all((ROOT / "configs" / "methods" / f"{name}.yaml").is_file() for name in listed)


def test_every_row_names_a_file_that_exists() -> None:
    for row in ROWS:
        assert len(row) == 4 and (ROOT / row[3].strip("`")).is_file(), row
