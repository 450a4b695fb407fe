"""Experience replay: some rows of earlier tasks in every step, the same for every method."""

from collections.abc import Iterator, Mapping, Sequence

from cpt_rft.config.restraints import Replay
from cpt_rft.data.example import Example
from cpt_rft.seeds import python_random


def replayed(
    batches: Sequence[Sequence[Example]], earlier: Mapping[str, Sequence[Example]], replay: Replay, seed: int
) -> list[list[Example]]:
    """The batches with ``rows_per_step`` remembered rows after their own; as they are where nothing is remembered.

    The remembered rows pass by in shuffled order, each once before any comes again. What is remembered of a task, and
    the order, depend on the seed and the tasks, not on the method: SFT and GRPO replay the same rows at the same step.

    Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", arXiv 1902.10486 (experience replay).
    Differs from: the memory of a task is a uniform choice among its rows, made once, where the source fills it from the
    stream; a row comes again only after all others, where the source draws each batch anew.

    Args:
        batches: The new rows of each step.
        earlier: Training rows of each earlier task.
        replay: How many.
        seed: Training seed.
    """
    memory = [row for task in sorted(earlier) for row in _remembered(task, earlier[task], replay.memory, seed)]
    if not memory:
        return [list(batch) for batch in batches]
    stream = _passes(memory, seed, "+".join(sorted(earlier)))
    return [[*batch, *(next(stream) for _ in range(replay.rows_per_step))] for batch in batches]


def _remembered(task: str, rows: Sequence[Example], size: int | None, seed: int) -> Sequence[Example]:
    if size is None or size >= len(rows):
        return rows
    return python_random("memory", seed, task).sample(list(rows), size)


def _passes(memory: Sequence[Example], seed: int, tasks: str) -> Iterator[Example]:
    random = python_random("replay", seed, tasks)
    while True:
        order = list(memory)
        random.shuffle(order)
        yield from order
