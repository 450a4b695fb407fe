"""Keep what a complete run found under results/: every table, results.json, its settings and how it was made.

Usage: python scripts/publish.py RUN_DIRECTORY RESULTS_DIRECTORY --command TEXT
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cpt_rft.errors import UserError
from cpt_rft.files import write_text_atomic
from eval import explain_table
from eval.table import markdown

RESULTS, CONFIG = "results.json", "config.json"


def makers(run: Path) -> dict[str, Any]:
    """Code hash and library versions of the run, which must be the same for all of its stages.

    Raises:
        UserError: The run has no stages, or they were made by different code or libraries.
    """
    found = {
        json.dumps({"code": made["code"], **made["versions"]}, sort_keys=True)
        for manifest in run.glob("*/order*/seed*/*/manifest.json")
        for made in [json.loads(manifest.read_text())["provenance"]]
    }
    if len(found) != 1:
        raise UserError(f"The stages of {run} were made by {len(found)} versions.", "delete it and run it anew")
    return dict(json.loads(found.pop()))


def page(results: dict[str, Any], made: dict[str, Any], command: str) -> str:
    """The README of a published run."""
    versions = ", ".join(f"{name} {value}" for name, value in made.items() if name != "code")
    return (
        f"# {results['experiment']}: preliminary results\n\n"
        f"Made by `{command}`. Code {made['code'][:12]} (a hash of the sources), {versions}.\n"
        "`results.json` holds every number and more, `config.json` is what was run; of the run\n"
        "directory `cpt-rft report` draws a page.\n\n"
        f"{markdown(results)}\n{explain_table.markdown(results)}"
    )


def settings(config: dict[str, Any]) -> str:
    """What was run, as it is kept: without the run directory, a place of the machine that decided nothing."""
    return json.dumps({key: value for key, value in config.items() if key != "output"}, indent=2) + "\n"


def publish(run: Path, out: Path, command: str) -> None:
    """Copy what is kept and write the page.

    Raises:
        UserError: The run is not complete.
    """
    results = json.loads((run / RESULTS).read_text())
    if results["missing"] or not (run / CONFIG).is_file():
        raise UserError(f"{run} is not complete.", "give its 'cpt-rft run' command again")
    text = page(results, makers(run), command)
    kept = settings(json.loads((run / CONFIG).read_text()))
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / RESULTS, out / RESULTS)
    write_text_atomic(out / CONFIG, kept)
    write_text_atomic(out / "README.md", text)


def main() -> int:
    """Publish one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a complete run")
    parser.add_argument("out", type=Path, help="directory under results/")
    parser.add_argument("--command", required=True, help="what a reader types to make the run again")
    arguments = parser.parse_args()
    try:
        publish(arguments.run, arguments.out, arguments.command)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
