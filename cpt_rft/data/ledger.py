"""What was kept of a task and why: written with its rows, shown as a table, compared with what is published."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from cpt_rft.data.example import Split
from cpt_rft.data.reasons import explain
from cpt_rft.data.source import Source
from cpt_rft.errors import DataError
from cpt_rft.files import read_json
from cpt_rft.tasks.base import NOT_SAMPLED, Task

LEDGER_NAME = "ledger.json"
DROPS_NAME = "drops.jsonl"
Json = dict[str, Any]


def split_entry(rows_in: int, rows_used: int, drops: Counter[str]) -> Json:
    """Counts of one split; every row is used or dropped under a reason.

    Raises:
        RuntimeError: Rows were lost: a bug of ours, never of the data.
    """
    if rows_in != rows_used + drops.total():
        raise RuntimeError(f"{rows_in} rows came in, but {rows_used} are used and {drops.total()} dropped")
    return {"rows_in": rows_in, "rows_used": rows_used, "drops": dict(sorted(drops.items()))}


def add_official_counts(splits: Mapping[Split, Json], task: Task) -> None:
    """Put beside each split how many rows its source split has, and how many are published.

    Published counts hold before carving and sampling, without the rows that the task leaves out on purpose.
    """
    left_out = set(task.config.expected_drops) - {NOT_SAMPLED}
    for split, official in task.config.official.items():
        if split not in splits:
            continue
        parts = [entry for name, entry in splits.items() if task.source_split(name) == task.source_split(split)]
        found = sum(entry["rows_in"] - sum(entry["drops"].get(r, 0) for r in left_out) for entry in parts)
        splits[split] |= {"official": official, "official_found": found}


def check_counts(splits: Mapping[Split, Json], task: Task, source: Source, max_dropped: float) -> None:
    """Refuse a set that lost rows on the way from its files, or too many rows to faults.

    Raises:
        DataError: The message shows the counts.
    """
    for name, expected in source.rows.items():
        ours = [entry for split, entry in splits.items() if task.source_split(split) == name]
        found = sum(entry["rows_in"] for entry in ours)
        if ours and found != expected:
            raise DataError(
                f"{task.config.name}: the files of {name!r} hold {expected} rows, but {found} came in.",
                "delete the downloaded files and prepare again",
            )
    for split, entry in splits.items():
        faults = {name: n for name, n in entry["drops"].items() if name not in task.config.expected_drops}
        lost = sum(faults.values())
        if lost > max_dropped * max(entry["rows_in"], 1):
            lines = "".join(f"\n  {count:>8} {name}: {explain(name)}" for name, count in sorted(faults.items()))
            raise DataError(
                f"{task.config.name}/{split}: {lost} of {entry['rows_in']} rows would be dropped"
                f" ({lost / entry['rows_in']:.1%}, at most {max_dropped:.1%} may be):{lines}\n",
                "mend the source, list the reason under the task's expected_drops, or raise max_dropped in --checks",
            )


def read_ledger(directory: Path) -> Json:
    """The ledger of a prepared task.

    Raises:
        DataError: There is none.
    """
    ledger = read_json(directory / LEDGER_NAME)
    if not ledger:
        raise DataError(f"{directory} holds no prepared task.", f"run 'cpt-rft data prepare {directory.name}'")
    return ledger


def ledger_table(ledger: Json) -> Table:
    """Counts of every split with the drops by reason, and what is published."""
    source = ledger["source"]
    origin = source["repo"] or ledger["task"]["homepage"] or "local files"
    title = f"{ledger['task']['name']}: {origin} ({ledger['task']['licence'] or 'no licence stated'})"
    table = Table("split", "rows in", "used", "dropped", "why", "published", title=title, title_justify="left")
    for split, entry in ledger["splits"].items():
        drops = entry["drops"]
        why = "\n".join(f"{count} {name}: {explain(name)}" for name, count in drops.items())
        kept = "\n".join(f"({n} {name}, kept)" for name, n in entry["kept_anyway"].items())
        table.add_row(
            split,
            str(entry["rows_in"]),
            str(entry["rows_used"]),
            str(sum(drops.values())),
            "\n".join(filter(None, (why, kept))),
            _official(entry),
        )
    return table


def _official(entry: Json) -> str:
    if "official" not in entry:
        return "-"
    if entry["official"] == entry["official_found"]:
        return f"{entry['official']}, as here"
    return f"{entry['official']}, HERE {entry['official_found']}"


def ledger_notes(ledger: Json) -> Iterator[str]:
    """Sentences that belong below the table."""
    name = ledger["task"]["name"]
    for split, entry in ledger["splits"].items():
        if entry.get("official", 0) != entry.get("official_found", 0):
            found, published = entry["official_found"], entry["official"]
            yield f"MISMATCH: {name}/{split} has {found} rows, {published} are published for this set."
        if not entry["rows_used"]:
            yield f"EMPTY: {name}/{split} has no rows."
        if entry["unproved"]:
            yield (
                f"{name}/{split}: {entry['unproved']} prompts may be longer than"
                f" {ledger['checks']['max_prompt_tokens']} tokens; name a checkpoint with --model to count their text."
            )
    for part, stated in ledger["source"]["card_rows"].items():
        counted = ledger["source"]["rows"].get(part, stated)
        if counted != stated:
            yield f"MISMATCH: {name}: the files of {part!r} hold {counted} rows, its card says {stated}."
    for pair, rows in ledger["shared_pictures"].items():
        if rows:
            other, unseen = pair.split("/")
            yield f"{name}: {rows} rows of {other} show a picture that also stands in {unseen}."
    if ledger["task"]["note"]:
        yield f"{name}: {ledger['task']['note']}"
