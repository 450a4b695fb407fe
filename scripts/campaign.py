"""Run the tests of one campaign and keep what they found, passed or not, with the command and the versions.

Usage: python scripts/campaign.py NAME|--help|--list. A test belongs to a campaign by its mark,
``@pytest.mark.campaign(name="NAME")``, and tells its figures by pytest's ``record_property``. Each campaign is a file
of ``results/campaigns``; the page there is written from all of them (``--list`` writes only the page).
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results/campaigns"
TESTS = ROOT / "tests"
VERSIONS = ("numpy", "pillow", "pyarrow", "torch", "transformers", "math-verify", "mathruler", "sympy")
HEAD = """# Campaigns: tests too long for every day

Made by `bash scripts/campaign.sh NAME`, by hand; the page is written from the JSON files beside it. A file also names
the commit and the versions. What is claimed stands in the test that is named.
"""


class Campaigns:
    """A plug-in for pytest: the tests of every campaign by name, and what those that ran told."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = {}
        self.told: list[dict[str, Any]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note the names before the selection."""
        for item in items:
            for mark in item.iter_markers("campaign"):
                self.tests.setdefault(mark.kwargs["name"], []).append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note figures and outcome of a test that ran, or failed before it could."""
        if report.when == "call" or not report.passed:
            figures = dict(report.user_properties)
            self.told.append({"test": report.nodeid, "outcome": report.outcome, "figures": figures})


def marked_files() -> list[str]:
    """The test files with a campaign in them; the others need not be imported."""
    return [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.campaign(" in path.read_text()]


def known_campaigns() -> dict[str, list[str]]:
    """The tests of every campaign, by name."""
    found = Campaigns()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["--collect-only", "-q", "-m", "campaign", *marked_files()], plugins=[found])
    return dict(sorted(found.tests.items()))


def run(name: str, tests: list[str]) -> dict[str, Any]:
    """Run a campaign; returns what is kept of it."""
    commit = state_of_the_tree()
    started, clock = datetime.now(UTC), time.monotonic()
    found = Campaigns()
    code = pytest.main(["-m", "campaign", "-q", *tests], plugins=[found])
    return {
        "campaign": name,
        "command": f"bash scripts/campaign.sh {name}",
        "passed": code == 0 and all(test["outcome"] == "passed" for test in found.told),
        "date": started.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - clock),
        "commit": commit,
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "architecture": platform.machine()},
        "versions": {"python": platform.python_version(), **versions()},
        "tests": found.told,
    }


def versions() -> dict[str, str]:
    """Those of `VERSIONS` that are installed."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def state_of_the_tree() -> str:
    """The commit, and whether the files differed from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def page(results: Path = RESULTS) -> str:
    """The README of all campaigns that are kept."""
    sections = [HEAD]
    for path in sorted(results.glob("*.json")):
        kept = json.loads(path.read_text())
        machine = kept["machine"]
        sections.append(
            f"## {kept['campaign']}: {'passed' if kept['passed'] else 'FAILED'}\n\n"
            f"`{kept['command']}`, {kept['date']}, {kept['seconds']} s on {machine['cores']} cores "
            f"({machine['system']}, {machine['architecture']})\n"
        )
        for test in kept["tests"]:
            figures = "".join(f"- {figure}\n" for figure in flat(test["figures"]))
            sections.append(f"`{test['test']}`: {test['outcome']}\n\n{figures}")
    return "\n".join(sections)


def flat(figures: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name: value`` of every figure, nested ones by their whole name.

    >>> flat({"rows": 3, "peak": {"mib": 1.5, "where": []}})
    ['rows: 3', 'peak mib: 1.5', 'peak where: []']
    """
    lines = []
    for name, value in figures.items():
        words = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict) and value:
            lines += flat(value, f"{words} ")
        else:
            lines.append(f"{words}: {value}")
    return lines


def main(argument: str) -> int:
    """Run a campaign by name, or tell the names."""
    if argument != "--list":
        known = known_campaigns()
        names = ", ".join(known)
        if argument in ("-h", "--help"):
            print(f"usage: scripts/campaign.sh NAME\n\nNAME is one of: {names}\n\nKept in results/campaigns.")
            return 0
        if argument not in known:
            print(f"error: There is no campaign {argument!r}. Fix: use one of {names}", file=sys.stderr)
            return 2
        kept = run(argument, known[argument])
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{argument}.json").write_text(json.dumps(kept, indent=2) + "\n")
    (RESULTS / "README.md").write_text(page())
    return 0 if argument == "--list" or kept["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "--help"))
