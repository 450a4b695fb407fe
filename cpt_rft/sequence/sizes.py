"""Rows of the tasks of an experiment and their length: measured where they are prepared, else guessed; and bytes."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cpt_rft.config.load import find_directory
from cpt_rft.config.schema import DataConfig
from cpt_rft.data.index import INDEX_NAME

PROMPT_TOKENS = 48  # of a row of the miniature


def gib(size: int) -> str:
    """Bytes for a reader.

    >>> gib(3 << 29)
    '1.5 GiB'
    """
    return f"{size / 2**30:,.1f} GiB"


def rows_and_tokens(config: DataConfig, tasks: Sequence[str], split: str, asked: int) -> tuple[int, int]:
    """Rows of some tasks in a split, and the tokens of their prompts, pictures included."""
    rows = tokens = 0
    for task in tasks:
        there, mean = (
            _measured(find_directory(config.directory or ""), task, split) if config.source == "hub" else (0, 0.0)
        )
        count = min(asked, there) if there else asked
        rows += count
        tokens += round(count * (mean or PROMPT_TOKENS))
    return rows, tokens


def measured(config: DataConfig, tasks: Sequence[str]) -> bool:
    """Whether rows and tokens are known: of drawn rows, and of real ones once they are prepared."""
    directory = find_directory(config.directory or "")
    return config.source != "hub" or all((directory / task / INDEX_NAME).is_file() for task in tasks)


@cache
def _measured(directory: Path, task: str, split: str) -> tuple[int, float]:
    """Rows and mean tokens of a prepared split; zeros if it is not prepared."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = directory / task / INDEX_NAME
    if not path.is_file():
        return 0, 0.0
    table = pq.read_table(path, columns=["split", "tokens"], filters=[("split", "=", split)])
    return len(table), float(pc.mean(table["tokens"]).as_py() or 0)
