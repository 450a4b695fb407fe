"""What a training method adds to the loop: from the rows of a step to gradients and numbers for the log."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from cpt_rft.data.example import Example

T = TypeVar("T")
Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class StepResult:
    """The loss of one step, and the method's fields of `StepLog`."""

    loss: float
    fields: dict[str, Any]


class Objective(Protocol):
    """A training method."""

    def gradients(self, step: int, rows: Sequence[Example], backward: Backward) -> StepResult:
        """Hand each micro-batch's share of the loss to ``backward``.

        Args:
            step: Counts from 0.
            rows: The rows of this step.
            backward: Adds the gradient of its argument to the step's.
        """
        ...

    def settled(self, step: int) -> bool:
        """Whether the steps after this one need nothing of it but weights and optimiser, so that a run may resume."""
        ...


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of ``size`` items; the last may be shorter.

    >>> list(chunks([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]
