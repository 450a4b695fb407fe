"""Score stored records again under another scorer, without a model (`cpt-rft rescore`).

Each record holds all that it was scored by, so the result equals that of evaluating under the other scorer. The
records that are read stay as they are; the new directory is complete or absent.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console

from cpt_rft.config.contracts import Scorer
from cpt_rft.files import explain_os_error, publish_directory
from cpt_rft.prompts import Style
from eval.contract import Contract, is_forced, scorer_terms
from eval.records import Record, RecordError, accuracy, read_contracts, read_records, write_contract, write_records
from eval.scorers import score_under
from eval.table import accuracy_table

READS_NAME = "reads.json"


def rescore(records_dir: Path, scorer: Scorer, out: Path) -> dict[str, dict[str, Any]]:
    """Write the records of a directory, scored by `scorer`, to a new directory.

    Returns:
        The accuracy of each file of records, by its name.

    Raises:
        RecordError: ``out`` exists; there are no records, or they cannot be read; their contract is unknown, is
            teacher-forced, or has this very scorer already.
    """
    if out.exists():
        raise RecordError(f"{out} exists already, and nothing is overwritten.", "choose another directory with --out")
    paths = sorted(records_dir.glob("*.jsonl"))
    if not paths:
        raise RecordError(
            f"{records_dir} holds no records.", "name a directory of records, such as the eval of a stage"
        )
    contracts = read_contracts(records_dir)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir(parents=True)
        scores = {}
        for path in paths:
            records = read_records(path)
            contract = _changed(path, contracts, records[0].contract, scorer)
            name = write_contract(partial, contract)
            again = [scored_again(record, scorer, name) for record in records]
            write_records(partial / path.name, again)
            scores[path.name] = accuracy(again)
        if (records_dir / READS_NAME).is_file():
            shutil.copyfile(records_dir / READS_NAME, partial / READS_NAME)
        publish_directory(partial, out)
    except OSError as error:
        raise explain_os_error(error, out) or error from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return scores


def _changed(path: Path, contracts: dict[str, Contract], name: str, scorer: Scorer) -> Contract:
    """The contract that records will carry: theirs with another scorer."""
    contract = contracts.get(name)
    if contract is None:
        fix = "put the contracts.json back that was written with them"
        raise RecordError(f"{path}: no contracts.json explains its contract {name[:12]}.", fix)
    if is_forced(contract):
        raise RecordError(f"{path} was made by teacher forcing: its texts are no answers.", "evaluate under 'greedy'")
    if contract["scorer"] == scorer_terms(scorer):
        raise RecordError(
            f"{path} was scored by {scorer} already.", "name another scorer, or use the records as they are"
        )
    return {**contract, "scorer": scorer_terms(scorer)}


def scored_again(record: Record, scorer: Scorer, contract: str) -> Record:
    """The record under another scorer and its contract."""
    style = cast(Style, record.style)
    result = score_under(scorer, record.response, record, style=style, truncated=record.finish == "length")
    return replace(record, **result._asdict(), contract=contract)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cpt-rft rescore``."""
    parser.add_argument("records", type=Path, help="a directory of records, such as the eval of a stage")
    parser.add_argument("--scorer", choices=get_args(Scorer), required=True, help="what counts as right")
    parser.add_argument("--out", type=Path, required=True, help="directory to be made")


def main(arguments: argparse.Namespace) -> None:
    """Run ``cpt-rft rescore``."""
    scores = rescore(arguments.records, arguments.scorer, arguments.out)
    names = {name: name.removesuffix(".jsonl").split(".", 1) for name in scores}
    cells = {(task, style.replace(".", ", ")): scores[name] for name, (task, style) in names.items()}
    Console().print(accuracy_table(cells))
