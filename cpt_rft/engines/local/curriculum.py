"""AdaRFT in the local engine: difficulties from tries of the stage's first model, rows step by step."""

from collections.abc import Sequence

from cpt_rft.config.hybrids import Curriculum
from cpt_rft.data.example import Example
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.objective import Backward, StepResult, chunks
from cpt_rft.methods.curriculum import RowsByDifficulty


class CurriculumObjective:
    """The objective of a method on rows that a curriculum chooses, instead of those it is handed.

    What it knows of earlier steps is the rewards in the log: `recall` goes through them again.

    Args:
        inner: The objective.
        settings: The method's.
        batches: The rows of every step without a curriculum.
        seed: Training seed.
    """

    def __init__(
        self, inner: GrpoObjective, settings: Curriculum, batches: Sequence[Sequence[Example]], seed: int
    ) -> None:
        self.inner = inner
        unique = {row.id: row for batch in batches for row in batch}
        rows = [unique[name] for name in sorted(unique)]
        self.chosen = RowsByDifficulty(rows, difficulties(inner, rows, settings.rollouts), settings, seed)

    def gradients(self, step: int, rows: Sequence[Example], backward: Backward) -> StepResult:
        """See `Objective.gradients`; of the rows only their number counts."""
        target = self.chosen.target
        result = self.inner.gradients(step, self.chosen.take(step, len(rows)), backward)
        self.chosen.saw(logged(result.fields["reward"]))
        return StepResult(result.loss, result.fields | {"difficulty": target})

    def settled(self, step: int) -> bool:
        """See `Objective.settled`."""
        return self.inner.settled(step)

    def recall(self, rewards: Sequence[float]) -> None:
        """Go on after steps of these rewards, as the log has them."""
        for each in rewards:
            self.chosen.saw(each)


def logged(reward: float) -> float:
    """A reward with the digits that the log keeps, so that a resumed run sees what the first one saw."""
    return float(f"{reward:.6g}")


def difficulties(objective: GrpoObjective, rows: Sequence[Example], tries: int) -> dict[str, float]:
    """Percentage of wrong tries at each row by the policy as it is, with the sampling of training."""
    wrong = dict.fromkeys((row.id for row in rows), 0.0)
    group = objective.method.group
    rounds = -(-tries // group)
    for number in range(rounds):
        for place, part in enumerate(chunks(rows, objective.method.prompts_per_step)):
            for row, marks in zip(part, objective.tries(number, place, part), strict=True):
                kept = marks[: min(group, tries - number * group)]
                wrong[row.id] += sum(mark.strict < 0.5 for mark in kept)
    return {name: 100.0 * count / tries for name, count in wrong.items()}
