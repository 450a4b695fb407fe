"""What is published is a complete run of one version, with the command that makes it again."""

import json
from pathlib import Path

import pytest

from cpt_rft.errors import UserError
from scripts.publish import publish, settings
from tests.helpers.tiny_run import Tiny, edited, reference
from tests.helpers.tree import ROOT


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
    assert (tmp_path / "kept/results.json").read_bytes() == (own.directory / "results.json").read_bytes()


def test_the_settings_are_kept_without_the_place_where_they_were_run(own: Tiny, tmp_path: Path) -> None:
    publish(own.directory, tmp_path / "kept", "x")
    ran, kept = (json.loads((place / "config.json").read_text()) for place in (own.directory, tmp_path / "kept"))
    assert ran.pop("output") == str(own.directory)
    assert kept == ran


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/config.json")), ids=lambda path: path.parent.name)
def test_every_published_result_has_the_settings_that_publishing_writes(path: Path) -> None:
    text = path.read_text()
    assert text == settings(json.loads(text))


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
