"""What each contract would have reported for one checkpoint (`cpt-rft audit`): the cost of every choice.

Answers are generated once a decoding and prompt style and scored in every way. Records are ordinary ones, so a killed
audit goes on where it was; dev is read unless test is asked for, and every read leaves its trace beside the records.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from cpt_rft.config.contracts import CONTRACTS, Scorer
from cpt_rft.config.load import dump, load_experiment
from cpt_rft.config.schema import Experiment
from cpt_rft.data.parquet import read_split
from cpt_rft.data.prepare import prepare
from cpt_rft.errors import CheckpointError, StageError
from cpt_rft.files import DirectoryLock, explain_os_error, hash_tree, read_json, tree_sha256, write_json_atomic
from cpt_rft.manifest import differences
from cpt_rft.progress import make_display
from cpt_rft.prompts import Style
from eval.contract import evaluation_contract, fingerprint
from eval.harness import READS_NAME, Job, Subject, do_jobs
from eval.records import COUNTED_APART, Record, counts, read_records
from eval.rescore import scored_again
from eval.table import Sheet
from eval.words import NONE, number, short, signed

Json = dict[str, Any]
AUDIT_NAME, KEY_NAME, SECONDS_NAME = "audit.json", "key.json", "seconds.json"
VERSION = 1
DECODINGS = {"greedy": "greedy", "paper": "T=0.5", "teacher_forced": "teacher forced"}
#: How the two scores of a record are called under each decoding.
WRITTEN = {"strict": "strict", "lenient": "any form"}
FORCED = {"strict": "as released", "lenient": "no newline"}


@dataclass(frozen=True)
class Audit:
    """One audit and the directory that it lives in.

    Attributes:
        checkpoint: What is audited.
        experiment: Tasks, abilities, data, limits and prompts; its evaluation section names the split.
        out: Where records and results go.
    """

    checkpoint: Path
    experiment: Experiment
    out: Path

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks, then general abilities."""
        return (*self.experiment.tasks, *self.experiment.evaluation.general)

    def jobs(self, data: dict[str, Path]) -> list[Job]:
        """A file of records for every decoding, style and task; without rationales no label can be forced in cot."""
        bare = {name for name, path in data.items() if any(row.rationale is None for row in read_split(path))}
        return [
            Job(name, style, CONTRACTS[contract].decoding, self.out / contract)
            for contract in DECODINGS
            for style in self.experiment.evaluation.styles
            for name in self.names
            if not (CONTRACTS[contract].decoding.forced and style == "cot" and name in bare)
        ]

    def key(self, sha256: str) -> Json:
        """All that decides the records."""
        experiment = self.experiment
        return {
            "checkpoint": sha256,
            "tasks": list(experiment.tasks),
            "data": dump(experiment.data),
            "evaluation": dump(experiment.evaluation),
        }

    def run(self, device: str) -> Json:
        """Make what is missing, score it in every way, write ``audit.json`` and return its content."""
        sha256 = tree_sha256(hash_tree(self.checkpoint))
        self._claim(sha256)
        experiment, split = self.experiment, self.experiment.evaluation.split
        prepared = prepare(
            experiment.data, experiment.tasks, experiment.evaluation.general, self.out / "data", splits=(split,)
        )
        data = {name: prepared.path(name, split) for name in self.names}
        jobs = self.jobs(data)
        subject = Subject(self.checkpoint, experiment.evaluation, experiment.data.prompt_preset, device)
        with make_display({"audit": 1.0}) as display:

            def progress(done: int, total: int, what: str) -> None:
                display.update("audit", done / total, what)

            do_jobs(subject, jobs, data, progress=progress, finished=self._note_seconds)
        result: Json = {
            "version": VERSION,
            "checkpoint": str(self.checkpoint),
            "sha256": sha256,
            "experiment": experiment.name,
            "split": split,
            "reads": {contract: read_json(self.out / contract / READS_NAME) for contract in DECODINGS},
            "lines": self._lines(jobs),
        }
        result["contracts"] = {line["contract"]: line.pop("terms") for line in result["lines"]}
        write_json_atomic(self.out / AUDIT_NAME, result)
        return result

    def _claim(self, sha256: str) -> None:
        """Records of another checkpoint, or of other rows, would be taken for these."""
        key, path = self.key(sha256), self.out / KEY_NAME
        there = read_json(path)
        if path.exists() and there != key:
            found = "; ".join(differences(there, key)[:3])
            raise StageError(f"{self.out} holds another audit: {found}.", "choose another directory with --out")
        write_json_atomic(path, key)

    def _note_seconds(self, job: Job, seconds: float) -> None:
        path = self.out / SECONDS_NAME
        write_json_atomic(path, {**read_json(path), self._label(job): round(seconds, 3)})

    def _label(self, job: Job) -> str:
        return job.path.relative_to(self.out).as_posix()

    # --- from records to lines ------------------------------------------------------------------------------------

    def _lines(self, jobs: Sequence[Job]) -> list[Json]:
        """One line a decoding, style, scorer and score."""
        lines: list[Json] = []
        for contract in DECODINGS:
            for style in self.experiment.evaluation.styles:
                made = [job for job in jobs if job.out.name == contract and job.style == style]
                if made:
                    lines += self._cells(contract, style, made)
        # Greedy, official and strict comes first, and every other choice is held against it.
        first = {line["style"]: line["mean"] for line in reversed(lines)}
        for line in lines:
            line["cost"] = None if line["mean"] is None else line["mean"] - first[line["style"]]
        return lines

    def _cells(self, contract: str, style: Style, jobs: Sequence[Job]) -> Iterator[Json]:
        records = {job.task: read_records(job.path) for job in jobs}
        seconds = read_json(self.out / SECONDS_NAME)
        labels = [self._label(job) for job in jobs]
        known = all(label in seconds for label in labels)  # not if it was killed between a file and its note
        spent = round(sum(seconds[label] for label in labels), 3) if known else None
        common = {"decoding": contract, "style": style, "seconds": spent}
        forced = CONTRACTS[contract].decoding.forced
        for scorer in ("compute_accuracy_vqa",) if forced else get_args(Scorer):
            started = time.perf_counter()
            name, terms = self._contract(contract, None if forced else scorer)
            again = records if forced else {task: _again(rows, scorer, name) for task, rows in records.items()}
            scoring = {"scorer": scorer, "score_seconds": round(time.perf_counter() - started, 3)}
            for score in WRITTEN:
                yield {**common, **scoring, "contract": name, "terms": terms, **self._values(again, score)}

    def _contract(self, contract: str, scorer: Scorer | None) -> tuple[str, Json]:
        config = self.experiment.evaluation
        if scorer is not None:
            config = config.model_copy(update={"scorer": scorer})
        terms = evaluation_contract(
            self.checkpoint, config, self.experiment.data.prompt_preset, CONTRACTS[contract].decoding
        )
        return fingerprint(terms), terms

    def _values(self, records: dict[str, list[Record]], score: str) -> Json:
        percent = {
            task: 100.0 * sum(getattr(record, score) for record in rows) / len(rows) for task, rows in records.items()
        }
        tasks = {task: percent[task] for task in self.experiment.tasks if task in percent}
        general = {name: percent[name] for name in self.experiment.evaluation.general if name in percent}
        every = [record for rows in records.values() for record in rows]
        return {
            "score": score,
            "tasks": tasks,
            "mean": _mean(tasks),
            "general": general,
            "general_mean": _mean(general),
            "rows": len(every),
            **counts(every),
        }


def _again(rows: Sequence[Record], scorer: Scorer, contract: str) -> list[Record]:
    return [scored_again(record, scorer, contract) for record in rows]


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def sheet(result: Json) -> Sheet:
    """The audit as one table."""
    tasks, lines = list(dict.fromkeys(task for line in result["lines"] for task in line["tasks"])), result["lines"]
    heads = (
        "decoding",
        "style",
        "scorer",
        "score",
        *map(short, tasks),
        "mean",
        "cost",
        "general",
        "rows",
        "apart",
        "s",
    )
    rows = []
    for line in lines:
        names = FORCED if line["decoding"] == "teacher_forced" else WRITTEN
        rows.append(
            (
                DECODINGS[line["decoding"]],
                line["style"],
                line["scorer"],
                names[line["score"]],
                *(_cell(line["tasks"].get(task)) for task in tasks),
                _cell(line["mean"]),
                NONE if line["cost"] is None else signed(line["cost"]),
                _cell(line["general_mean"]),
                str(line["rows"]),
                "/".join(str(line[status]) for status in COUNTED_APART),
                _cell(line["seconds"]),
            )
        )
    note = (
        "Percent. mean: over the tasks; cost: against greedy, official, strict in the same style; general: mean over"
        f" the held-out abilities; apart: responses {' / '.join(COUNTED_APART).replace('_', ' ')}; s: seconds to"
        " generate, once for all scorers. Pixels and limits are the experiment's throughout. Teacher forcing shows the"
        " model the label, so it is no result; as released it also asks for a newline after the end token, which"
        " LLaMA-Factory's template teaches and our engine does not."
    )
    return Sheet(f"{result['checkpoint']}, {result['split']} rows", heads, tuple(rows), 4, note)


def _cell(value: float | None) -> str:
    return NONE if value is None else number(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cpt-rft audit``."""
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face directory, such as the checkpoint of a stage")
    parser.add_argument(
        "--experiment", type=Path, default=Path("miniature"), help="tasks, rows and limits (default: miniature)"
    )
    parser.add_argument("--out", type=Path, help="directory of records and audit.json (default: below runs/audit)")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="rows to read (default: dev)")


def main(arguments: argparse.Namespace) -> None:
    """Run ``cpt-rft audit``.

    Raises:
        UserError: There is no checkpoint, or the directory holds another audit or is in use.
    """
    from cpt_rft.engines.local import runtime

    checkpoint = arguments.checkpoint
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint}: there is no such checkpoint directory.", "check the path")
    experiment = load_experiment(arguments.experiment)
    evaluation = experiment.evaluation.model_copy(
        update={"split": arguments.split, "contract": "greedy", "scorer": "official", "base_samples": 0}
    )
    experiment = experiment.model_copy(update={"evaluation": evaluation})
    out = arguments.out
    if out is None:
        out = Path("runs/audit") / f"{tree_sha256(hash_tree(checkpoint))[:12]}_{experiment.name}_{arguments.split}"
    _, device = runtime.prepare(experiment.engine)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with DirectoryLock(out):
            result = Audit(checkpoint, experiment, out).run(device)
    except OSError as error:
        raise explain_os_error(error, out) or error from error
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(sheet(result).rich())
    print(f"audit: {out / AUDIT_NAME}", file=sys.stderr)
