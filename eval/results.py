"""From the records of a run directory to ``results.json``: every number of every table and figure.

Beside the scores stand intervals, flips, the null value of FM and comparisons. Two runs with the same
seeds differ only in times (`without_times`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_rft.files import write_text_atomic
from cpt_rft.seeds import derive_seed
from eval import explain, metrics, statistics
from eval.costs import costs
from eval.equal import families, losses, matched
from eval.metrics import HEADLINE
from eval.records import COUNTED_APART, accuracy, read_contracts, read_records, record_path
from eval.runs import Chain, IncompleteRunError, Run, listed
from eval.statistics import Resamples, spread

Array = NDArray[np.float64]
Json = dict[str, Any]
RESULTS_NAME = "results.json"
SCORES = ("strict", "lenient")
NATIVE = "native"
#: Arms may be compared at one point only if they learned about as much: points of mean R[j][j].
COMPARABLE_POINTS = 3.0
#: Keys whose values a second run does not repeat.
MEASURED = ("times", "train_seconds", "seconds", "energy_joules", "memory_bytes")
_DIGITS = 6


def build_results(run_dir: Path, *, partial: bool = False) -> Json:
    """All results of a run.

    Args:
        run_dir: The run directory.
        partial: Leave incomplete chains out and list their missing cells under ``missing``, instead of refusing.

    Raises:
        IncompleteRunError: Cells are missing (with `partial`: of every chain, or of the base model).
        RecordError: Records are broken or may not be mixed.
    """
    builder, gaps = open_builder(run_dir, partial=partial)
    return builder.results(gaps)


def open_builder(run_dir: Path, *, partial: bool = False) -> tuple["_Builder", list[str]]:
    """What computes the results of a run, and the cells that it lacks; see `build_results`."""
    run = Run.open(run_dir)
    missing = {chain: run.missing(chain) for chain in run.chains}
    gaps = sorted({gap for chain_gaps in missing.values() for gap in chain_gaps})
    whole = [chain for chain in run.chains if not missing[chain]]
    if gaps and not (partial and whole):
        problem = f"{run_dir} is incomplete; missing: {listed(gaps)}."
        raise IncompleteRunError(problem, "give the run command again to go on")
    return _Builder(run, whole), gaps


def write_results(run_dir: Path, *, partial: bool = False) -> Json:
    """Build the results and write ``results.json`` into the run directory; see `build_results`."""
    results = build_results(run_dir, partial=partial)
    write_text_atomic(run_dir / RESULTS_NAME, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def without_times(results: Json) -> Json:
    """The results but for times: equal for two runs with the same seeds on the same machine."""

    def prune(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: prune(inner) for key, inner in value.items() if key not in MEASURED}
        return [prune(inner) for inner in value] if isinstance(value, list) else value

    return dict(prune(results))


def _plain(value: Any) -> Any:
    """Numbers rounded and arrays as lists, so that the JSON is the same wherever the sums are."""
    if isinstance(value, dict):
        # Stages hold divergences of any size, and are rounded to so many digits already.
        return {key: inner if key == "stages" else _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return round(float(value), _DIGITS) + 0.0  # no minus zero
    return value


@dataclass(frozen=True)
class _View:
    """How a cell is looked at: ``native`` or a fixed style, strict or lenient."""

    style: str
    score: str


class _Builder:
    """Computes the parts of the results; each part reads cells of the run and shares its bootstrap resamples."""

    def __init__(self, run: Run, chains: Sequence[Chain]) -> None:
        self.run = run
        self.chains = chains
        present = [name for name in run.experiment.methods if any(c.method == name for c in chains)]
        self.methods = sorted(present, key=self.joint)  # sequences first: they are what is compared
        names = (*run.experiment.tasks, *run.general)
        first = run.styles[0]
        self.rows = {name: len(run.cell(run.base_eval, name, first).ids) for name in names}
        self.resamples = Resamples.draw(self.rows, clusters=run.clusters())
        self._replicates: dict[tuple[Chain, str, str], Array] = {}

    def results(self, gaps: list[str]) -> Json:
        experiment, contract = self.run.experiment, self.run.contract()
        seconds = {name: {c.key: self._train_seconds(c) for c in self.of(name)} for name in self.methods}
        methods = {name: self._method(name, seconds[name]) for name in self.methods}
        return dict(
            _plain(
                {
                    "experiment": experiment.name,
                    "contract": {
                        "fingerprint": contract,
                        "terms": read_contracts(self.run.base_eval).get(contract),
                    },
                    "split": experiment.evaluation.split,
                    "tasks": list(experiment.tasks),
                    "general": list(self.run.general),
                    "styles": list(self.run.styles),
                    "rows": self.rows,
                    "missing": gaps,
                    "base": self._base(),
                    "methods": methods,
                    "explained": explain.relations(methods),
                    "comparisons": self._comparisons(),
                    "families": families(self.run, [name for name in self.methods if not self.joint(name)]),
                    "matched": matched(self.run, [c for c in self.chains if not self.joint(c.method)], self.values),
                    "costs": {name: costs(self.run, self.of(name)) for name in self.methods},
                    "times": {"train_seconds": seconds},
                }
            )
        )

    def of(self, method: str) -> list[Chain]:
        """The complete chains of a method."""
        return [chain for chain in self.chains if chain.method == method]

    def _native(self, method: str) -> str:
        return self.run.experiment.methods[method].style

    def joint(self, method: str) -> bool:
        """Trained in one stage: it has an average, but nothing to forget."""
        return self.run.experiment.methods[method].joint or len(self.run.experiment.tasks) == 1

    # --- the base model -------------------------------------------------------------------------------------------

    def _base(self) -> Json:
        """Row 0 by style and task: greedy and, where there are samples, sampled accuracy."""
        base: Json = {}
        for task, style in self.run.wanted():
            cell = self.run.cell(self.run.base_eval, task, style)
            entry: Json = {"strict": cell.strict.mean(), "lenient": cell.lenient.mean()}
            path = record_path(self.run.base_eval, task, style, sampled=True)
            if path.is_file():
                records = read_records(path)
                sampled = accuracy(records)
                samples = 1 + max(record.sample for record in records)
                entry["sampled"] = {"samples": samples, "strict": sampled["strict"], "lenient": sampled["lenient"]}
            base.setdefault(style, {})[task] = entry
        return base

    # --- one chain ------------------------------------------------------------------------------------------------

    def _cells(self, chain: Chain, view: _View) -> dict[str, Array]:
        return {task: self.run.stacked(chain, task, view.style, view.score) for task in chain.order}

    def _matrix(self, chain: Chain, view: _View) -> Array:
        cells = self._cells(chain, view)
        return np.stack([cells[task].mean(axis=1) for task in chain.order], axis=-1)

    def _matrices(self, chain: Chain, view: _View) -> Array:
        """R on all bootstrap replicates, (B, T+1, T), or (B, 2, T) for a joint method."""
        key = (chain, view.style, view.score)
        if key not in self._replicates:
            self._replicates[key] = self.resamples.matrices(self._cells(chain, view), chain.order)
        return self._replicates[key]

    def _values(self, joint: bool, matrix: Array) -> dict[str, Array]:
        """The headline metrics of one or many matrices; a joint method has an average only."""
        if joint:
            return {"avg_acc": matrix[..., -1, :].mean(axis=-1)}
        return {name: metric(matrix) for name, metric in HEADLINE.items()}

    def values(self, chain: Chain, style: str, score: str) -> tuple[dict[str, Array], dict[str, Array]]:
        """Headline metrics of a sequence in one view: on the data, and on all replicates."""
        view = _View(style, score)
        return self._values(False, self._matrix(chain, view)), self._values(False, self._matrices(chain, view))

    def _block(self, chain: Chain, view: _View) -> Json:
        """Matrix, metrics, flips and null value of one chain in one view."""
        joint, matrix = self.joint(chain.method), self._matrix(chain, view)
        block: Json = {"matrix": matrix, **{name: None for name in HEADLINE}}
        block |= {name: float(value) for name, value in self._values(joint, matrix).items()}
        if joint:
            block["learned"] = block["avg_acc"]
            return block
        block |= {name: float(metric(matrix)) for name, metric in metrics.FURTHER.items()}
        block["conventions"] = {name: float(metric(matrix)) for name, metric in metrics.CONVENTIONS.items()}
        block["intransigence"] = self._intransigence(chain, matrix, view)
        null = self._null(chain, view)
        block["fm_null"] = {"mean": null.mean(), "range": statistics.middle(null)}
        block["flips"] = self._flips(chain, view)
        return block

    def _intransigence(self, chain: Chain, matrix: Array, view: _View) -> float | None:
        """Against the mean of the joint method's seeds, both in the view's style; none without a joint method."""
        joint = [c for c in self.chains if self.joint(c.method)]
        if not joint:
            return None
        cells = [self._cells(c, view) for c in joint if c.method == joint[0].method]
        best = [float(np.mean([cell[task][-1].mean() for cell in cells])) for task in chain.order]
        return float(metrics.intransigence(matrix, best))

    def _null(self, chain: Chain, view: _View) -> Array:
        cells = self._cells(chain, view)
        later = [cells[task][place:] for place, task in enumerate(chain.order, start=1)]
        return statistics.null_fm(
            [float(scores.mean()) for scores in later],
            [self.rows[task] for task in chain.order],
            [statistics.churn(scores) for scores in later],
            derive_seed("null_fm", chain.method, chain.key, view.style, view.score),
        )

    def _flips(self, chain: Chain, view: _View) -> Json:
        """Flips of each task but the last, from right after it was learned to the end of the sequence."""
        cells, pairs = self._cells(chain, view), {}
        for place, task in enumerate(chain.order[:-1], start=1):
            pairs[task] = (cells[task][place], cells[task][-1])
        pooled = statistics.flips(*(np.concatenate(side) for side in zip(*pairs.values(), strict=True)))
        found = {task: statistics.flips(*pair) for task, pair in pairs.items()}
        corrected = statistics.holm([one.p_value for one in found.values()])
        return {
            "tasks": {t: {**found[t]._asdict(), "p_holm": p} for t, p in zip(found, corrected, strict=True)},
            "all": pooled._asdict(),
        }

    def _shares(self, chain: Chain, style: str) -> Json:
        """Percent of responses that are counted apart, by sort, in the form of the matrix."""
        return {
            status: [
                [100 * self.run.cell(where, task, style).apart[status] / self.rows[task] for task in chain.order]
                for where in self.run.evals(chain)
            ]
            for status in COUNTED_APART
        }

    def _general_rows(self, chain: Chain, view: _View) -> list[dict[str, float]]:
        stacked = {n: self.run.stacked(chain, n, view.style, view.score).mean(axis=1) for n in self.run.general}
        return [{name: float(stacked[name][row]) for name in stacked} for row in range(len(chain.stages) + 1)]

    def _seed_entry(self, chain: Chain, seconds: float | None) -> Json:
        by_style: Json = {}
        for style in self.run.styles:
            by_style[style] = {
                **self._block(chain, _View(style, "strict")),
                "lenient": self._block(chain, _View(style, "lenient")),
                **self._shares(chain, style),
                "general": {score: self._general_rows(chain, _View(style, score)) for score in SCORES},
            }
        native = by_style[self._native(chain.method)]
        method = self.run.experiment.methods[chain.method]
        return {
            "order": list(chain.order),
            "order_index": chain.order_index,
            "seed": chain.seed,
            "train_style": method.style,
            "lr": method.lr,
            **{name: native[name] for name in ("matrix", *HEADLINE)},
            "by_style": by_style,
            "general": native["general"]["strict"],
            **self._kept(chain),
            "stages": self._stages(chain),
            "train_seconds": seconds,
        }

    def _stages(self, chain: Chain) -> list[Json]:
        """What may explain forgetting, stage by stage."""
        style = self._native(chain.method)
        matrices = {score: self._matrix(chain, _View(style, score)) for score in SCORES}
        return explain.stages(self.run, chain, matrices, joint=self.joint(chain.method))

    def _kept(self, chain: Chain) -> Json:
        """How many rows of each task rollouts left to train on, in each round; nothing where all were used."""
        found: Json = {}
        for stage in chain.stages:
            for round_ in self.run.kept(stage):
                for task, counts in round_["tasks"].items():
                    share = counts["kept"] / counts["rows"]
                    found.setdefault(task, []).append({**counts, "share": share, "source": round_["source"]})
        return {"kept": found} if found else {}

    def _train_seconds(self, chain: Chain) -> float | None:
        lines = [line for stage in chain.stages for line in self.run.train_log(stage)]
        return sum(float(line["seconds"]) for line in lines) if lines else None

    # --- one method, over its seeds and orders --------------------------------------------------------------------

    def _method(self, name: str, seconds: Mapping[str, float | None]) -> Json:
        method, chains = self.run.experiment.methods[name], self.of(name)
        views = {style: {score: self._summary(chains, style, score) for score in SCORES} for style in self.run.styles}
        return {
            "kind": method.kind,
            "joint": method.joint,
            **({"task_id_oracle": True} if method.adapter_per_task else {}),
            "train_style": method.style,
            "lr": method.lr,
            "seeds": {chain.key: self._seed_entry(chain, seconds[chain.key]) for chain in chains},
            "summary": {NATIVE: views[method.style], **views},
            "losses": {} if self.joint(name) else {s: losses(chains, s, self.values) for s in self.run.styles},
        }

    def _summary(self, chains: Sequence[Chain], style: str, score: str) -> Json:
        """Mean over seeds with two intervals kept apart: over examples (bootstrap) and over seeds (Student)."""
        view, joint = _View(style, score), self.joint(chains[0].method)
        points = [self._values(joint, self._matrix(chain, view)) for chain in chains]
        drawn = [self._values(joint, self._matrices(chain, view)) for chain in chains]
        summary: Json = {
            name: spread([float(p[name]) for p in points], np.mean([d[name] for d in drawn], axis=0), name)
            for name in points[0]
        }
        if not joint:
            null = np.mean([self._null(chain, view) for chain in chains], axis=0)
            summary["fm"]["null"] = {"mean": null.mean(), "range": statistics.middle(null)}
        summary["general"] = self._general_summary(chains, view)
        return summary

    def _general_summary(self, chains: Sequence[Chain], view: _View) -> Json:
        """Each held-out ability and their mean: before, after, and the paired change."""
        before: dict[str, Array] = {}
        after: dict[str, Array] = {}
        points: dict[str, list[float]] = {}
        for name in self.run.general:
            stacks = [self.run.stacked(chain, name, view.style, view.score)[[0, -1]] for chain in chains]
            drawn = np.mean([self.resamples.weights[name] @ stack.T for stack in stacks], axis=0)
            before[name], after[name] = drawn[:, 0], drawn[:, 1]
            points[name] = [float(stack[1].mean() - stack[0].mean()) for stack in stacks]
        if not points:
            return {}
        start = {n: self.run.cell(self.run.base_eval, n, view.style).scores(view.score).mean() for n in points}
        table = {n: {"before": start[n], "change": spread(points[n], after[n] - before[n], "change")} for n in points}
        means = np.mean([points[n] for n in points], axis=0).tolist()
        change = np.mean([after[n] - before[n] for n in points], axis=0)
        table["mean"] = {"before": np.mean(list(start.values())), "change": spread(means, change, "change")}
        return {n: {**row, "after": row["before"] + row["change"]["value"]} for n, row in table.items()}

    # --- two methods ----------------------------------------------------------------------------------------------

    def _comparisons(self) -> list[Json]:
        """Every pair of sequential methods, an RFT arm before an SFT arm: the difference first minus second.

        A task-id oracle is in none: it is told what the others are not.
        """
        methods = self.run.experiment.methods
        sequential = [name for name in self.methods if not self.joint(name) and not methods[name].adapter_per_task]
        kinds = {name: self.run.experiment.methods[name].kind for name in sequential}
        pairs = []
        for one, other in combinations(sequential, 2):
            first, second = (other, one) if kinds[one] == "sft" and kinds[other] != "sft" else (one, other)
            mine, theirs = ({chain.key: chain for chain in self.of(name)} for name in (first, second))
            shared = [key for key in mine if key in theirs]
            if shared:
                pairs.append(self._comparison(first, second, [(mine[key], theirs[key]) for key in shared]))
        return pairs

    def _comparison(self, first: str, second: str, chains: Sequence[tuple[Chain, Chain]]) -> Json:
        views: Json = {}
        for name in (NATIVE, *self.run.styles):
            styles = [self._native(method) if name == NATIVE else name for method in (first, second)]
            views[name] = {s: self._difference(chains, _View(styles[0], s), _View(styles[1], s)) for s in SCORES}
        gaps = [abs(views[NATIVE][score]["learned"]["value"]) for score in SCORES]
        return {
            "first": first,
            "second": second,
            "seeds": len(chains),
            "views": views,
            "comparable": max(gaps) <= COMPARABLE_POINTS,
        }

    def _difference(self, chains: Sequence[tuple[Chain, Chain]], one: _View, other: _View) -> Json:
        """First minus second on the same rows and the same resamples, averaged over the seeds both have."""
        difference: Json = {}
        for name, metric in HEADLINE.items():
            points = [float(metric(self._matrix(a, one)) - metric(self._matrix(b, other))) for a, b in chains]
            drawn = [metric(self._matrices(a, one)) - metric(self._matrices(b, other)) for a, b in chains]
            difference[name] = spread(points, np.mean(drawn, axis=0), f"difference of {name}")
        return difference
