"""What a method may do with rollouts made before it trains: choose rows by them, or learn from them.

The text under a field is its help: it appears in the JSON Schema that editors read (``cpt-rft schema``).
"""

from typing import Literal, get_args

from pydantic import PositiveInt

from cpt_rft.config.strict import Name, Strict

Rule = Literal["drop_zero_correct", "drop_zero_variance"]
Control = Literal["solvable", "unsolvable", "random"]
CONTROLS: tuple[Control, ...] = get_args(Control)


class Filter(Strict):
    """Rollout-based instance filtering: the model at the start of a stage tries every row, and only some are used.

    A rollout is right from a strict score of 0.5 on, in the prompt style of training.
    """

    rollouts: PositiveInt = 8
    """Tries at each row."""
    rule: Rule
    """Rows to leave out: `drop_zero_correct`, those never got right (the released code); `drop_zero_variance`, those
    always got right too."""
    control: Control | None = None
    """Null: what the rule keeps. Else as many rows drawn at random among those got right at least once (`solvable`),
    among those never got right (`unsolvable`), or among all (`random`): for all three the number that the rule keeps,
    or that of the unsolvable rows if it is smaller."""
    max_new_tokens: PositiveInt | None = None
    """Longest try in tokens, for a method without rollouts of its own; null for one that samples in training, which
    tries with the same settings."""


class Rollouts(Strict):
    """Supervised targets that a model wrote: the first right one of several tries at a row. Other rows are left out."""

    samples: PositiveInt = 8
    """Tries at each row, sampled at temperature 1."""
    max_new_tokens: PositiveInt
    """Longest try in tokens; one that reaches it teaches nothing."""
    rounds: PositiveInt = 1
    """Times that a stage tries anew with what it has become and learns from that: `epochs` passes each, and a schedule
    of its own."""
    from_method: Name | None = None
    """Null: the model at the start of the stage (of the round) tries. A method of the same experiment: its checkpoint
    after the same task, in the same order and of the same seed."""
