"""What is published is a complete run of one version, with the command that makes it again."""

import json
from pathlib import Path

import pytest

from cpt_rft.errors import UserError
from scripts.publish import publish
from tests.helpers.tiny_run import Tiny, edited, reference


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Tiny:
    """Complete and reported, to be spoiled."""
    tiny = reference(tmp_path_factory.getbasetemp()).copy(tmp_path)
    status, _, errors = tiny.command("report")
    assert status == 0, errors
    return tiny


def test_a_complete_run_is_kept_with_its_command_and_versions(own: Tiny, tmp_path: Path) -> None:
    publish(own.directory, tmp_path / "kept", "bash scripts/publish.sh tiny kept")
    text = (tmp_path / "kept/README.md").read_text()
    assert "`bash scripts/publish.sh tiny kept`" in text
    assert "torch " in text
    assert "| sft |" in text
    for name in ("results.json", "report.html", "config.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (own.directory / name).read_bytes()


def test_a_partial_run_is_refused(own: Tiny, tmp_path: Path) -> None:
    with edited(own.directory / "results.json") as results:
        results["missing"] = ["grpo, seed 0"]
    with pytest.raises(UserError, match="not complete"):
        publish(own.directory, tmp_path / "kept", "x")
    assert not (tmp_path / "kept").exists()


def test_stages_of_two_versions_are_refused(own: Tiny, tmp_path: Path) -> None:
    manifest = next(own.directory.glob("*/order*/seed*/*/manifest.json"))
    made = json.loads(manifest.read_text())
    made["provenance"]["versions"]["torch"] = "0.0.1"
    manifest.write_text(json.dumps(made))
    with pytest.raises(UserError, match="2 versions"):
        publish(own.directory, tmp_path / "kept", "x")
