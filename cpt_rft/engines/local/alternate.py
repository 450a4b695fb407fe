"""Iterative SFT-RFT in the local engine: rounds of reinforcement that end with supervision."""

from collections.abc import Sequence

from cpt_rft.config.hybrids import Alternate
from cpt_rft.data.example import Example
from cpt_rft.engines.local.objective import Backward, Objective, StepResult


class AlternatingObjective:
    """Steps of one objective and of another in turn.

    Source: ReLIFT, arXiv 2506.07527 (interleaved online fine-tuning).
    Differs from: a fixed number of steps each, on all rows of the step, where the source keeps the questions of which
    no completion was right until they fill a batch and has their solutions from another model; one learning rate; no
    entropy term in the supervised loss, which version 2 of the paper has.
    """

    def __init__(self, reinforced: Objective, supervised: Objective, rounds: Alternate) -> None:
        self.reinforced, self.supervised, self.rounds = reinforced, supervised, rounds

    def gradients(self, step: int, rows: Sequence[Example], backward: Backward) -> StepResult:
        """See `Objective.gradients`."""
        return self.turn(step).gradients(step, rows, backward)

    def settled(self, step: int) -> bool:
        """See `Objective.settled`."""
        return self.turn(step).settled(step)

    def turn(self, step: int) -> Objective:
        """Whose step it is."""
        place = step % (self.rounds.rft_steps + self.rounds.sft_steps)
        return self.reinforced if place < self.rounds.rft_steps else self.supervised
