"""The table in the README is made from the published results, by the script that it names."""

import json

import pytest

from eval.results import build_results
from scripts import update_readme
from tests.helpers.synthetic_run import write_run


def test_the_table_in_the_readme_is_that_of_the_published_results():
    readme = update_readme.README.read_text()
    assert update_readme.updated(readme) == readme, "run: python scripts/update_readme.py"


def test_a_published_run_gives_its_answer_and_a_row_a_method(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", seeds=(0, 1), rows=12)
    results = tmp_path / "results/miniature/results.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps(build_results(run)))
    monkeypatch.setattr(update_readme, "ROOT", tmp_path)
    monkeypatch.setattr(update_readme, "RESULTS", results)
    text = update_readme.updated(f"# Title\n{update_readme.BEGIN}old\n{update_readme.END}rest\n")
    assert "old" not in text and text.startswith("# Title\n") and text.endswith("rest\n")
    assert text.count("| sft |") == text.count("| grpo |") == text.count("| multitask |") == 2
    assert "[results/miniature](results/miniature)" in text


def test_lost_markers_are_told():
    with pytest.raises(SystemExit, match="markers"):
        update_readme.updated("# Title\n")
