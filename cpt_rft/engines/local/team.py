"""The processes that share each step of a stage: by default one, which does everything.

All of them hold all weights and know the whole batch. A prompt's completions are written, and its share of the loss
is differentiated, by one process alone; completions are exchanged, and gradients are added up, so that the step is
that of one process up to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cpt_rft.errors import ConfigError, install_extra

T = TypeVar("T")


class Team:
    """One process alone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are this process's to do."""
        return items[self.rank :: self.size]

    def shared(self, work: Callable[[Sequence[T]], Sequence[Any]], items: Sequence[T]) -> list[Any]:
        """One result an item, in their order; each process works on its own items, and all get all results."""
        return list(work(items))

    def total(self, value: float) -> float:
        """The sum over the processes."""
        return value

    def largest(self, value: float) -> float:
        """The largest value of any process."""
        return value

    def add_up(self, gradient: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""

    def told(self, value: T) -> T:
        """The value of the process that leads."""
        return value


ALONE = Team()


class Processes(Team):
    """Several processes that were started together (`parallel`), by accelerate.

    Args:
        device: Where they compute: ``cpu``, or ``cuda`` for one GPU each.

    Raises:
        ConfigError: accelerate is not installed.
    """

    def __init__(self, device: str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ConfigError(
                "Several processes (engine.processes) need the package accelerate.", install_extra("parallel")
            ) from error
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes

    def shared(self, work: Callable[[Sequence[T]], Sequence[Any]], items: Sequence[T]) -> list[Any]:
        """See `Team.shared`."""
        own = self.mine(items)
        everyone = self._everyone(list(work(own)) if own else [])
        results: list[Any] = [None] * len(items)
        for rank, part in enumerate(everyone):
            results[rank :: self.size] = part
        return results

    def total(self, value: float) -> float:
        """See `Team.total`."""
        return sum(self._everyone(value))

    def largest(self, value: float) -> float:
        """See `Team.largest`."""
        return max(self._everyone(value))

    def add_up(self, gradient: Tensor) -> None:
        """See `Team.add_up`."""
        with torch.no_grad():
            gradient.copy_(self.accelerator.reduce(gradient, reduction="sum"))

    def told(self, value: T) -> T:
        """See `Team.told`."""
        return self._everyone(value)[0]

    def leave(self) -> None:
        """Take the threads of the group down while the interpreter still stands; at its end they would abort it."""
        torch.distributed.destroy_process_group()

    def _everyone(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered
