"""AdaRFT's curriculum: which rows a step takes, from the rewards of the steps before it."""

from collections.abc import Mapping, Sequence

import torch

from cpt_rft.algos.adarft import nearest_prompts, next_difficulty
from cpt_rft.config.hybrids import Curriculum
from cpt_rft.data.example import Example
from cpt_rft.seeds import python_random


class RowsByDifficulty:
    """Rows by difficulty around a target that follows the reward.

    Source: AdaRFT, arXiv 2504.05520 algorithm 1 (`cpt_rft.algos.adarft`).
    Differs from: difficulty is estimated with the model at the start of the stage, not with another one; rows of equal
    difficulty take turns by the seed, where the source takes the first; the target follows the reward of training, with
    its share for the form, where the source counts right answers; as many steps as without a curriculum.

    Args:
        rows: All rows of the stage.
        difficulties: Percentage of wrong tries, by row id.
        settings: The method's.
        seed: Training seed.
    """

    def __init__(
        self, rows: Sequence[Example], difficulties: Mapping[str, float], settings: Curriculum, seed: int
    ) -> None:
        self.rows, self.difficulties, self.settings, self.seed = list(rows), difficulties, settings, seed
        self.target = settings.start

    def take(self, step: int, count: int) -> list[Example]:
        """The rows of a step."""
        rows = list(self.rows)
        python_random("curriculum", self.seed, step).shuffle(rows)
        known = torch.tensor([self.difficulties[row.id] for row in rows], dtype=torch.float64)
        return [rows[index] for index in nearest_prompts(known, self.target, count).tolist()]

    def saw(self, reward: float) -> None:
        """Move the target after a step of this mean reward."""
        settings = self.settings
        self.target = next_difficulty(
            self.target, reward, wanted=settings.wanted, sensitivity=settings.sensitivity, step=settings.step
        )
