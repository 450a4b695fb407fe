"""Every table as CSV, LaTeX and Markdown, and every figure as an SVG file that stands alone."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from eval.report.drawn import Figure
from eval.table import Sheet

EXPORT_NAME = "report"
_STYLE = "<style>/*<![CDATA[*/{}/*]]>*/</style>"


def export(directory: Path, sheets: Sequence[Sheet], content: Mapping[str, Any]) -> None:
    """Write ``tables/`` and ``figures/`` anew; the same results give the same bytes.

    Args:
        directory: Made, or emptied first.
        sheets: Tables.
        content: What is on the page; each figure in it is drawn, and its numbers are a table too.
    """
    shutil.rmtree(directory, ignore_errors=True)
    tables, drawings = directory / "tables", directory / "figures"
    for folder in (tables, drawings):
        folder.mkdir(parents=True)
    css = (resources.files(__package__) / "style.css").read_text(encoding="utf-8")
    for name, figure in _figures(content):
        for number, drawing in enumerate(figure.drawings, start=1):
            place = name if len(figure.drawings) == 1 else f"{name}-{number:02d}"
            (drawings / f"{place}.svg").write_text(alone(drawing, css), encoding="utf-8")
        _table(tables, f"figure-{name}", figure.sheet)
    for sheet in sheets:
        _table(tables, slug(sheet.title), sheet)


def _table(folder: Path, name: str, sheet: Sheet) -> None:
    for suffix, text in (("csv", sheet.csv()), ("tex", sheet.latex()), ("md", sheet.markdown())):
        (folder / f"{name}.{suffix}").write_text(text, encoding="utf-8")


def alone(drawing: str, css: str) -> str:
    """A drawing of the page as a document of its own, in the page's colours."""
    opening, rest = str(drawing).split(">", 1)  # a Markup would escape what is put into it
    head = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}>{_STYLE.format(css)}{rest}\n'


def _figures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Every figure of the page under a name of its own."""
    seen: dict[str, int] = {}
    for key, value in content.items():
        for path, figure in _found(value, key):
            seen[path] = seen.get(path, 0) + 1
            yield (path if seen[path] == 1 else f"{path}-{seen[path]}"), figure


def _found(value: Any, path: str) -> Iterator[tuple[str, Figure]]:
    if isinstance(value, Figure):
        yield slug(path), value
    elif isinstance(value, Mapping) and path != "results":
        for key, inner in value.items():
            yield from _found(inner, f"{path} {key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _found(inner, f"{path} {inner.sheet.title}" if isinstance(inner, Figure) else path)


def slug(title: str) -> str:
    """A title as a file name.

    >>> slug("grpo \N{MINUS SIGN} sft"), slug("At equal learning, at equal cost")
    ('grpo-sft', 'at-equal-learning-at-equal-cost')
    """
    return re.sub(r"[^a-z0-9_]+", "-", title.lower()).strip("-")
