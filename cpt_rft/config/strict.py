"""What every configuration object is: frozen, strict, and refusing keys that it does not know."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]
Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


class KeyedError(ValueError):
    """A rule is broken at a place below the object that checks it.

    Attributes:
        at: The keys and indices from that object to the place.
    """

    def __init__(self, at: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.at = at


class Strict(BaseModel):
    """Frozen, refuses unknown keys, converts nothing; the text under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def check_unique(values: tuple[T, ...]) -> tuple[T, ...]:
    """Return the values if none stands twice."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise KeyedError((index,), f"{value!r} is listed twice")
    return values
