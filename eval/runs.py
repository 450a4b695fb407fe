"""A run directory as evaluation sees it: which chains of stages there are, and the scores of their cells."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_rft.config.schema import Experiment
from cpt_rft.errors import UserError
from cpt_rft.files import read_json
from eval.contract import is_forced
from eval.records import RecordError, counts, read_contracts, read_records, record_path, refuse_mixed

Array = NDArray[np.float64]
MULTITASK_STAGE = "multitask"
READS_NAME = "reads.json"
#: Mixtures of methods that were chosen on dev for this run on test (`eval.matching`).
MATCHING_NAME = "matching.json"


class IncompleteRunError(UserError):
    """Cells that the experiment asks for have no records yet."""


def listed(gaps: Sequence[str], most: int = 12) -> str:
    """The first of many names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    return ", ".join(gaps[:most]) + (f" and {len(gaps) - most} more" if len(gaps) > most else "")


@dataclass(frozen=True)
class Cell:
    """The scores of one checkpoint on one task in one style.

    Attributes:
        ids: Rows, in order.
        strict: Scores in percent, shape (rows,).
        lenient: Scores in percent, shape (rows,).
        apart: Rows whose response was cut short, holds no answer or is no text, by `COUNTED_APART`.
        contract: Fingerprint of the evaluation contract.
    """

    ids: tuple[str, ...]
    strict: Array
    lenient: Array
    apart: dict[str, int]
    contract: str

    def scores(self, kind: str) -> Array:
        """``strict`` or ``lenient``."""
        return self.strict if kind == "strict" else self.lenient


@dataclass(frozen=True)
class Chain:
    """One method, order and seed: the base model and one stage a task (one stage in all for a joint method).

    Attributes:
        method: Name of the method.
        order_index: Number of the task order.
        seed: Training seed.
        order: Tasks in the order learned.
        stages: Directory of each stage.
    """

    method: str
    order_index: int
    seed: int
    order: tuple[str, ...]
    stages: tuple[Path, ...]

    @property
    def key(self) -> str:
        """The key in results.json: the seed, with the order before it unless it is the first.

        >>> Chain("sft", 1, 7, (), ()).key
        'order1/7'
        """
        return str(self.seed) if self.order_index == 0 else f"order{self.order_index}/{self.seed}"


@dataclass
class Run:
    """A run directory and the experiment that its ``config.json`` describes."""

    directory: Path
    experiment: Experiment
    _cells: dict[tuple[Path, str, str], Cell] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> "Run":
        """Read the configuration.

        Raises:
            IncompleteRunError: There is no run here.
            RecordError: ``config.json`` is not one that a run wrote.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise IncompleteRunError(f"{directory} holds no run: it has no config.json.", "run the experiment first")
        try:
            return cls(directory, Experiment.model_validate_json(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise RecordError(f"{path} is not the configuration of a run ({error}).", "restore it") from error

    @property
    def general(self) -> tuple[str, ...]:
        """Held-out abilities."""
        return self.experiment.evaluation.general

    @property
    def styles(self) -> tuple[str, ...]:
        """Prompt styles in which every cell is scored."""
        return self.experiment.evaluation.styles

    @property
    def base_eval(self) -> Path:
        """Records of the base model."""
        return self.directory / "base" / "eval"

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """Every chain that the experiment asks for, in its order."""
        return tuple(
            self._chain(name, index, order, seed)
            for name in self.experiment.methods
            for index, order in enumerate(self.experiment.all_orders)
            for seed in self.experiment.seeds
            if index == 0 or not self.experiment.methods[name].joint
        )

    def _chain(self, name: str, index: int, order: tuple[str, ...], seed: int) -> Chain:
        parent = self.directory / name / f"order{index}" / f"seed{seed}"
        stages = (MULTITASK_STAGE,) if self.experiment.methods[name].joint else order
        return Chain(name, index, seed, order, tuple(parent / f"{i}_{task}" for i, task in enumerate(stages, start=1)))

    def evals(self, chain: Chain) -> tuple[Path, ...]:
        """Directories of records, one a row of R, base first."""
        return (self.base_eval, *(stage / "eval" for stage in chain.stages))

    def missing(self, chain: Chain) -> list[str]:
        """Cells of a chain without records, each named ``<stage>: <task> (<style>)``; a stage counts when published."""
        gaps = []
        for directory in self.evals(chain):
            stage = directory.parent
            if directory != self.base_eval and not (stage / "manifest.json").is_file():
                gaps.append(f"{stage.relative_to(self.directory)}: not trained")
            else:
                gaps += [
                    f"{stage.relative_to(self.directory)}: {task} ({style})"
                    for task, style in self.wanted()
                    if not record_path(directory, task, style).is_file()
                ]
        return gaps

    def wanted(self) -> Iterator[tuple[str, str]]:
        """Every task and general ability in every style."""
        for task in (*self.experiment.tasks, *self.general):
            for style in self.styles:
                yield task, style

    def cell(self, directory: Path, task: str, style: str) -> Cell:
        """The scores of one file of records; ids and contract must be those of the base model.

        Raises:
            RecordError: The file is broken, or was made from other rows or under another contract.
        """
        key = (directory, task, style)
        if key not in self._cells:
            path = record_path(directory, task, style)
            records = read_records(path)
            cell = Cell(
                tuple(record.id for record in records),
                100.0 * np.array([record.strict for record in records]),
                100.0 * np.array([record.lenient for record in records]),
                counts(records),
                records[0].contract,
            )
            if directory != self.base_eval:
                base = self.cell(self.base_eval, task, style)
                base_path = record_path(self.base_eval, task, style)
                refuse_mixed({str(base_path): (base.contract, self.base_eval), str(path): (cell.contract, directory)})
                if base.ids != cell.ids:
                    raise RecordError(f"{path} holds other rows than {base_path}.", "evaluate both on the same data")
            self._cells[key] = cell
        return self._cells[key]

    def stacked(self, chain: Chain, task: str, style: str, kind: str) -> Array:
        """Scores (rows of R, examples) of a task along a chain, base first."""
        return np.stack([self.cell(directory, task, style).scores(kind) for directory in self.evals(chain)])

    def contract(self) -> str:
        """The one fingerprint of the base model's records.

        Raises:
            RecordError: They carry several, or one that is for audits only.
        """
        cells = {f"{t}.{s}": (self.cell(self.base_eval, t, s).contract, self.base_eval) for t, s in self.wanted()}
        refuse_mixed(cells)
        name = next(iter(cells.values()))[0]
        terms = read_contracts(self.base_eval).get(name)
        if terms is not None and is_forced(terms):
            raise RecordError(
                f"{self.base_eval}: the model was shown the label (teacher forcing), so no methods may be compared.",
                "evaluate under 'greedy' or 'paper'; teacher forcing is for 'cpt-rft audit'",
            )
        return name

    def kept(self, stage: Path) -> list[dict[str, Any]]:
        """Who tried the rows of a stage and how many were kept, a round after the other; none if all were used."""
        kept: list[dict[str, Any]] = read_json(stage / "manifest.json").get("provenance", {}).get("kept", [])
        return kept

    def clusters(self) -> dict[str, list[int]]:
        """By task, where questions share pictures, the picture of each row by number (``reads.json``)."""
        path = self.base_eval / READS_NAME
        if not path.is_file():
            return {}
        try:
            reads = json.loads(path.read_text(encoding="utf-8"))
            found = {
                task: [int(number) for number in read["pictures"]] for task, read in reads.items() if "pictures" in read
            }
            short = [task for task, numbers in found.items() if len(numbers) != reads[task]["rows"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordError(f"{path} is broken ({error}).", "evaluate the base model again") from error
        if short:
            raise RecordError(f"{path}: {short[0]} has not one picture number a row.", "evaluate the base model again")
        return found

    def train_log(self, stage: Path) -> list[dict[str, Any]]:
        """The lines of a stage's training log.

        Raises:
            RecordError: A line is no JSON object.
        """
        path = stage / "train" / "log.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            return [dict(json.loads(line)) for line in lines]
        except ValueError as error:
            raise RecordError(f"{path} is broken ({error}).", "train this stage again") from error
