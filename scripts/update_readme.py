"""Write the headline table of a published run into README.md, between its two markers; no number there is typed.

Usage: python scripts/update_readme.py [--check]
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from eval.table import about, arms_sheet
from eval.words import verdict

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "results/miniature/results.json"
BEGIN, END = "<!-- results: begin (scripts/update_readme.py) -->\n", "<!-- results: end -->\n"


def block() -> str:
    """The answer, what qualifies it, and every method in its native style; before publication, one line."""
    if not RESULTS.exists():
        return "No run is published yet; `bash scripts/demo.sh` makes one.\n"
    results = json.loads(RESULTS.read_text())
    found = verdict(results)
    sheet = arms_sheet(results)
    native = replace(sheet, rows=tuple(row for row in sheet.rows if row[1].endswith("native")))
    details = "\n".join(f"- {detail}" for detail in (*found.details, about(results)))
    where = RESULTS.parent.relative_to(ROOT)
    return (
        f"**{found.answer}**\n\n{details}\n\n{native.markdown()}\n"
        f"Preliminary. Both prompt styles, the paired comparison and the command: [{where}]({where}).\n"
    )


def updated(readme: str) -> str:
    """The README with the block of today between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README} has lost its markers. Fix: put {BEGIN.strip()} and {END.strip()} back.")
    return before + begin + block() + end + after


def main() -> int:
    """Update, or with --check say whether an update is needed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is stale")
    check = parser.parse_args().check
    old = README.read_text()
    new = updated(old)
    if check:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
