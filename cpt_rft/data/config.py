"""The file of checks: what prepared rows must fulfil."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from cpt_rft.config.document import Document
from cpt_rft.config.load import REPOSITORY, validate
from cpt_rft.data.example import Split

CHECKS_FILE = REPOSITORY / "configs" / "data.yaml"


class Checks(BaseModel):
    """One file like configs/data.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    min_pixels: PositiveInt = 3136
    """Pictures below this area are enlarged by the processor."""
    max_pixels: PositiveInt = 1_003_520
    """Pictures above this area are shrunk by the processor."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt, pictures expanded."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of a split that may be dropped for reasons that its task does not expect."""
    duplicates_dropped: tuple[Split, ...] = ("train", "dev")
    """Splits that lose repeated and contradicting rows; elsewhere they are counted and kept."""
    picture_overlap: Literal["report", "drop"] = "report"
    """What happens to rows of train (dev) whose picture also stands in dev or test, under another question."""
    processor_sample: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the rows that the real processor is asked about."""


def load_checks(path: Path = CHECKS_FILE) -> Checks:
    """Read a file of checks strictly.

    Raises:
        ConfigError: A key or value is wrong; with file and line.
    """
    return validate(Checks, Document.read(path))
