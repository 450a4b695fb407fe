"""What reinforcement fine-tuning may borrow from supervision, each part absent unless a file has it.

The text under a field is its help: it appears in the JSON Schema that editors read (``cpt-rft schema``).
"""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from cpt_rft.config.strict import NotNegative, Strict

Chance = Annotated[float, Field(ge=0, le=1)]


class Hint(Strict):
    """UFT: completions begin after a piece of the target, which is taught by supervision at the same time."""

    coef: NotNegative = 0.001
    """Weight of the supervised loss on the piece."""
    until: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of a stage's steps after which nothing is shown."""
    high: Chance = 0.95
    """Chance of each fifth of the target to be shown at the first step."""
    low: Chance = 0.05
    """The same at the last step with hints; half a cosine leads there."""


class Prefix(Strict):
    """Prefix-RFT: one further completion a prompt begins with a piece of the target, from which the policy learns."""

    high: Chance = 0.95
    """Largest share of the target that is shown, and the least at the first step."""
    low: Chance = 0.05
    """The least share at the last step; half a cosine leads there."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Share of the shown tokens that teach nothing: those of which the policy is surest."""


class Curriculum(Strict):
    """AdaRFT: each step takes the rows whose difficulty is nearest to a target, which follows the reward."""

    rollouts: PositiveInt = 8
    """Tries at each row by the model at the start of the stage; difficulty is the percentage that is wrong."""
    start: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Target of the first step."""
    wanted: Chance = 0.5
    """Mean reward at which the target stays."""
    sensitivity: PositiveFloat = 2.0
    """How sharply the target answers to a reward above or below it."""
    step: PositiveFloat = 50.0
    """The most that the target moves in a step."""


class Alternate(Strict):
    """Iterative SFT-RFT: now and then a step teaches the targets of its rows instead of sampling completions."""

    rft_steps: PositiveInt
    """Steps of reinforcement in a round."""
    sft_steps: PositiveInt
    """Supervised steps that end a round, by the same optimizer and rate."""
