"""Campaigns have names; what they found is kept, passed or not, and the page says what the files say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.campaign import RESULTS, page
from tests.helpers.tree import ROOT

TINY = """
import pytest

@pytest.mark.campaign(name="tiny")
def test_it(record_property):
    record_property("rows", {"in": 3})
    assert WHAT

@pytest.mark.campaign(name="other")
def test_another():
    pass
"""


def campaign(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "campaign.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_every_campaign_has_a_name() -> None:
    nameless = "mark.campaign" + "(?!\\(name=)"
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name != "test_campaigns.py"]
    assert [path.name for path in files if re.search(nameless, path.read_text())] == []


def test_help_and_an_unknown_name_list_the_names() -> None:
    told = campaign("--help")
    assert told.returncode == 0
    for name in ("fuzz_scoring", "kill_prepare", "prepare_80000", "scale_prepare", "speed_scoring"):
        assert name in told.stdout
    refused = campaign("nope")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: There is no campaign 'nope'. Fix: use one of ")
    assert "scale_prepare" in refused.stderr


@pytest.mark.parametrize("passes", [True, False])
def test_what_a_campaign_found_is_kept_passed_or_not(tmp_path: Path, passes: bool) -> None:
    (tmp_path / "test_tiny.py").write_text(TINY.replace("WHAT", str(passes)))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = campaign\n")
    code = (
        "import sys; from pathlib import Path; from scripts import campaign as c\n"
        "c.TESTS, c.RESULTS = Path('.'), Path('kept'); sys.exit(c.main('tiny'))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (not passes), done.stderr
    kept = json.loads((tmp_path / "kept/tiny.json").read_text())
    assert kept["passed"] is passes
    assert kept["command"] == "bash scripts/campaign.sh tiny"
    assert [(test["test"], test["figures"]) for test in kept["tests"]] == [
        ("test_tiny.py::test_it", {"rows": {"in": 3}})
    ]
    assert kept["versions"]["pillow"]
    assert ("tiny: passed" if passes else "tiny: FAILED") in (tmp_path / "kept/README.md").read_text()


def test_the_page_says_what_the_files_say() -> None:
    assert (RESULTS / "README.md").read_text() == page()
    for path in RESULTS.glob("*.json"):
        kept = json.loads(path.read_text())
        assert kept["passed"], path
        assert not kept["commit"].endswith("-dirty"), path
