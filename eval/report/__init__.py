"""One self-contained HTML page of a run: it opens offline and asks no server for anything."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cpt_rft.files import write_text_atomic
from eval.explain_table import HOW, explain_sheets
from eval.report import abilities, explain, forgetting, settings
from eval.report.drawn import series
from eval.report.export import EXPORT_NAME, export
from eval.report.gather import Flip, curves, flipped
from eval.results import write_results
from eval.runs import Run
from eval.sheets import claims_sheet, further_sheets
from eval.table import Sheet, about, apart_sheet, arms_sheet, comparison_sheet, general_sheet, kept_sheets, sheets
from eval.words import ARROW, NONE, SCORE_NAMES, number, short, verdict

__all__ = ["EXPORT_NAME", "REPORT_NAME", "render", "write_report"]

Json = dict[str, Any]
REPORT_NAME = "report.html"
FLIPS_A_TASK = 4
_IN_FIGURES = ("What goes along with forgetting",)


def write_report(run_dir: Path, results: Json | None = None) -> Path:
    """Write ``report.html`` into the run directory, and ``results.json`` unless its content is given.

    Args:
        run_dir: The run directory.
        results: What `eval.results.build_results` made of it; without it, what there is, incomplete or not.

    Returns:
        The path of the page.
    """
    results = results or write_results(run_dir, partial=True)
    path = run_dir / REPORT_NAME
    shown = content(run_dir, results)
    write_text_atomic(path, _template().render(shown))
    export(run_dir / EXPORT_NAME, [*sheets(results), *further_sheets(results), *explain_sheets(results)], shown)
    return path


def render(run_dir: Path, results: Json) -> str:
    """The page as text."""
    return _template().render(content(run_dir, results))


def content(run_dir: Path, results: Json) -> Json:
    """What is on the page; everything comes from the records, logs and configuration of the run."""
    run = Run.open(run_dir)
    chains = [
        chain for chain in run.chains if chain.key in results["methods"].get(chain.method, {"seeds": ()})["seeds"]
    ]
    arms = series(results)
    shown = flipped(run, chains, FLIPS_A_TASK)
    pairs = [forgetting.differences(entry) for entry in results["comparisons"][:1]]
    return {
        "results": results,
        "found": verdict(results),
        "about": about(results),
        "arms": arms,
        "scores": SCORE_NAMES,
        "short": short,
        "forest": [figure for figure in (forgetting.forest(results, arms), *pairs) if figure],
        "heat": {score: [f for a in arms if (f := forgetting.heat_map(results, a, score))] for score in SCORE_NAMES},
        "lines": {score: forgetting.task_lines(results, arms, score) for score in SCORE_NAMES},
        "plasticity": {score: abilities.plasticity(results, arms, score) for score in SCORE_NAMES},
        "general": {score: abilities.general(results, arms, score) for score in SCORE_NAMES if results["general"]},
        "explained": {score: explain.scatters(results, arms, score) for score in SCORE_NAMES},
        "explain_sheets": [sheet for sheet in explain_sheets(results) if sheet.title not in _IN_FIGURES],
        "unmeasured": "" if _is_measured(results) else HOW,
        "training": abilities.training(curves(run, chains), arms, len(results["tasks"])),
        "sheets": _sheets(results),
        "more": [comparison_sheet(entry) for entry in results["comparisons"][1:]],
        "base": base_sheet(results),
        "flips": shown,
        "flip_counts": flips_sheet(results),
        "flip_choices": _choices(shown),
        "terms": _terms(results["contract"]["terms"] or {}),
        "settings": [figure for figure in (settings.rates(results, arms), settings.orders(results, arms)) if figure],
        "claims": claims_sheet(results),
        "further": [sheet for sheet in further_sheets(results) if sheet.title != claims_sheet(results).title],
    }


def _template() -> jinja2.Template:
    files = resources.files(__name__)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["css"] = Markup((files / "style.css").read_text(encoding="utf-8"))
    environment.globals["js"] = Markup((files / "script.js").read_text(encoding="utf-8"))
    return environment.from_string((files / "page.html").read_text(encoding="utf-8"))


def _sheets(results: Json) -> list[Sheet]:
    general = [general_sheet(results)] if results["general"] else []
    return [
        arms_sheet(results),
        *(comparison_sheet(entry) for entry in results["comparisons"][:1]),
        *kept_sheets(results),
        *general,
        apart_sheet(results),
    ]


def base_sheet(results: Json) -> Sheet:
    """Row 0: greedy and sampled accuracy of the base model in both styles."""
    rows = []
    for style, tasks in results["base"].items():
        for task, entry in tasks.items():
            sampled = entry.get("sampled")
            drawn = [number(sampled[score]) for score in SCORE_NAMES] if sampled else [NONE, NONE]
            rows.append((style, task, *(number(entry[score]) for score in SCORE_NAMES), *drawn))
    heads = ("prompt style", "task", "greedy, strict", "greedy, any form", "sampled, strict", "sampled, any form")
    return Sheet("The base model", heads, tuple(rows), 2, "Percent; sampled at temperature 1, several answers a row.")


def flips_sheet(results: Json) -> Sheet:
    """Flips from right after learning to the end, all tasks but the last, every seed."""
    rows = []
    for name, method in results["methods"].items():
        for key, entry in method["seeds"].items():
            if "flips" in (block := entry["by_style"][method["train_style"]]):
                for score, part in (("strict", block), ("lenient", block["lenient"])):
                    found = part["flips"]["all"]
                    p_value = "< 0.001" if found["p_value"] < 0.001 else f"{found['p_value']:.3f}"
                    counts = (found["rows"], found["lost"], found["gained"])
                    rows.append((name, key, SCORE_NAMES[score], *(str(count) for count in counts), p_value))
    heads = ("method", "seed", "score", "rows", f"right {ARROW} wrong", f"wrong {ARROW} right", "p (McNemar)")
    return Sheet("Flips", heads, tuple(rows), 3, "From right after learning to the end; exact two-sided test.")


def _is_measured(results: Json) -> bool:
    return any(
        stage["drift"] or stage["fisher"]
        for method in results["methods"].values()
        for seed in method["seeds"].values()
        for stage in seed["stages"]
    )


def _choices(shown: list[Flip]) -> dict[str, list[str]]:
    return {
        "method": list(dict.fromkeys(flip.method for flip in shown)),
        "task": list(dict.fromkeys(flip.task for flip in shown)),
    }


def _terms(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The contract as flat (key, value) pairs."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        found += _terms(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return found
