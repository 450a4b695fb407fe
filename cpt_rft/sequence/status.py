"""The verbs that only look: plan and status."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cpt_rft.config.load import find_directory
from cpt_rft.config.schema import Experiment
from cpt_rft.data.prepare import check_prepared
from cpt_rft.errors import UserError
from cpt_rft.files import list_tree
from cpt_rft.manifest import code_sha256
from cpt_rft.sequence.lineage import is_evaluated, survey
from cpt_rft.sequence.native import native_lines, native_plan
from cpt_rft.sequence.plan import Chain, Selection, describe, disk_bytes
from cpt_rft.sequence.pool import worker_count
from cpt_rft.sequence.rundir import Run, read_run
from cpt_rft.sequence.sizes import measured

Json = dict[str, Any]


def plan(experiment: Experiment, selection: Selection) -> Json:
    """What a run would do: every stage, and the disk space at the peak."""
    directory = Path(experiment.output)
    chains = selection.chains(experiment, directory)
    base = find_directory(experiment.base_model)
    size = sum((base / name).stat().st_size for name in list_tree(base)) if base.is_dir() else 0
    workers = worker_count(experiment.asked_workers, len(chains), experiment.cores, size)
    existing = next(path for path in [directory.absolute(), *directory.absolute().parents] if path.exists())
    keys = ("chain", "stage", "parent", "rows", "steps", "tokens")
    outside = native_plan(experiment, chains, base)
    work = max((engine["work_bytes"] for engine in outside.values() if "work_bytes" in engine), default=None)
    return {
        "experiment": experiment.name,
        "output": experiment.output,
        "base_model": str(base) if base.is_dir() else f"{base} (missing)",
        "workers": workers,
        "disk_peak_bytes": disk_bytes(experiment, chains, size, workers, work),
        "disk_free_bytes": shutil.disk_usage(existing).free,
        "at_most": sorted({chain.method.name for chain in chains if not chain.method.knows_its_rows}),
        "guessed": not measured(experiment.data, experiment.tasks),
        "stages": [dict(zip(keys, row, strict=True)) for row in describe(experiment, chains)],
        **({"native": outside} if outside else {}),
    }


def plan_table(result: Json) -> tuple[Table, str]:
    """A plan for the terminal: the table and the line under it."""
    table = Table(
        "sequence", "stage", "from", title=f"{result['experiment']} into {result['output']}", title_justify="left"
    )
    for name in ("rows", "steps", "tokens, about"):
        table.add_column(name, justify="right")
    last = None
    for row in result["stages"]:
        if last not in (None, row["chain"]):
            table.add_section()
        first = row["chain"] if row["chain"] != last else ""
        table.add_row(first, row["stage"], row["parent"], f"{row['rows']:,}", f"{row['steps']:,}", f"{row['tokens']:,}")
        last = row["chain"]
    total = sum(row["tokens"] for row in result["stages"])
    line = (
        f"base model {result['base_model']}; {len(result['stages']) - 1} stages, about {total:,} tokens;"
        f" {result['workers']} side by side;"
        f" disk at the peak about {_mib(result['disk_peak_bytes'])}, free {_mib(result['disk_free_bytes'])}"
    )
    if result["guessed"]:
        line += "; rows and tokens are guesses until the data is prepared"
    bounds = [f"at most these rows and steps: {', '.join(result['at_most'])} (rollouts choose the rows)"]
    more = [*(bounds if result["at_most"] else []), *native_lines(result.get("native", {}))]
    return table, "\n".join([line, *more])


def status(experiment: Experiment, selection: Selection, *, verify: bool) -> Json:
    """Where everything stands. Names and sizes are looked at; with ``verify`` every file is read.

    Raises:
        UserError: There is no run, or it is of another configuration.
    """
    directory = Path(experiment.output)
    run = read_run(directory, experiment)
    narrowed = Selection(
        selection.methods or tuple(experiment.methods),
        selection.orders or tuple(range(len(experiment.all_orders))),
        selection.seeds or experiment.seeds,
    )
    problems = [problem for problem in (_problem(run.base.check, full=verify), _data_problem(run, verify)) if problem]
    base_done = is_evaluated(run, run.base_directory / "eval", run.base.sha256, full=verify)
    code = code_sha256()
    stages: list[Json] = [{"chain": "base", "stage": "evaluate", "state": "done" if base_done else "missing"}]
    for chain in narrowed.chains(run.experiment, directory):
        stages += _chain_status(run, chain, code, verify)
    problems += [stage["problem"] for stage in stages if "problem" in stage]
    return {
        "experiment": experiment.name,
        "output": experiment.output,
        "complete": not problems and all(stage["state"] == "done" for stage in stages),
        "report": str(directory / "report.html") if (directory / "report.html").is_file() else None,
        "problems": problems,
        "stages": stages,
    }


def _chain_status(run: Run, chain: Chain, code: str, verify: bool) -> list[Json]:
    rows = []
    for state in survey(run, chain, full=verify):
        row: Json = {"chain": chain.label, "stage": f"{state.stage.index}_{state.stage.name}", "state": state.word}
        if state.manifest is not None:
            row["train_seconds"] = state.manifest.provenance["train_seconds"]
            row["stale_code"] = state.is_stale(code)
        if state.problem is not None:
            row["problem"] = str(state.problem)
        rows.append(row)
    return rows


def status_table(result: Json) -> tuple[Table, Sequence[str]]:
    """A status for the terminal: the table and the lines under it."""
    table = Table(
        "sequence", "stage", "state", title=f"{result['experiment']} in {result['output']}", title_justify="left"
    )
    table.add_column("seconds", justify="right")
    last = None
    for row in result["stages"]:
        if last not in (None, row["chain"]):
            table.add_section()
        state = f"{row['state']}, stale-code" if row.get("stale_code") else row["state"]
        seconds = f"{row['train_seconds']:.0f}" if "train_seconds" in row else ""
        table.add_row(row["chain"] if row["chain"] != last else "", row["stage"], state, seconds)
        last = row["chain"]
    lines = [f"error: {problem}" for problem in result["problems"]]
    if any(row.get("stale_code") for row in result["stages"]):
        lines.append("stale-code: made by other code than this; 'cpt-rft run --rerun-stale' makes such stages anew")
    done = sum(row["state"] == "done" for row in result["stages"])
    lines.append("complete" if result["complete"] else f"{done} of {len(result['stages'])} done")
    return table, lines


def _problem(check: Any, **arguments: bool) -> str | None:
    try:
        check(**arguments)
    except UserError as error:
        return str(error)
    return None


def _data_problem(run: Run, verify: bool) -> str | None:
    return _problem(lambda: check_prepared(run.data)) if verify else None


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
