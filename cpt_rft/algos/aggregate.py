"""From losses a token to the loss of a batch."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Aggregate = Literal["token", "sequence", "constant", "sum"]


class StepSize(NamedTuple):
    """Counts of a whole optimiser step over all its micro-batches; what a loss is divided by.

    Args:
        sequences: Completions, also those whose tokens are all masked.
        tokens: Real tokens that count.
        length: The most tokens that a completion may have.
    """

    sequences: int
    tokens: int
    length: int


def pad_rows(values_N: Tensor, lengths_S: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A flat row of tokens as one row a sequence, padded right with zeros, and its mask; differentiable.

    Source: none; a change of layout.

    >>> values, mask = pad_rows(torch.tensor([1.0, 2.0, 3.0]), [1, 2])
    >>> values.tolist(), mask.tolist()
    ([[1.0, 0.0], [2.0, 3.0]], [[1.0, 0.0], [1.0, 1.0]])
    """
    values_ST = pad_sequence(list(values_N.split(list(lengths_S))), batch_first=True)
    places_T = torch.arange(values_ST.shape[1], device=values_N.device)
    lengths = torch.tensor(list(lengths_S), device=values_N.device)
    return values_ST, (places_T < lengths[:, None]).float()


def only_real(values_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """The values with zeros on padding, which may hold anything, also infinities: replaced, not multiplied by zero.

    Source: none; zero times infinity is not a number, in the value and in the gradient.
    """
    return torch.where(mask_ST.bool(), values_ST, torch.zeros_like(values_ST))


def token_mean(values_T: Tensor, mask_T: Tensor, tokens: int | Tensor) -> Tensor:
    """Sum over real tokens divided by ``tokens``; zero, with zero gradient, when there are none.

    Source: EasyR1@b44b311 verl/utils/torch_functional.py masked_mean, verl/trainer/core_algos.py average_loss (token).
    Differs from: the divisor is given, and counts the tokens of the whole optimiser batch; no epsilon is added to it.
    """
    return only_real(values_T, mask_T).sum() / max(float(tokens), 1.0)


def sequence_mean(values_ST: Tensor, mask_ST: Tensor, sequences: int) -> Tensor:
    """Mean over sequences of each one's mean over its tokens; a sequence without tokens counts as zero.

    Source: EasyR1@b44b311 verl/trainer/core_algos.py average_loss (seq); TRL@v1.16.0 trl/trainer/grpo_trainer.py
    _compute_loss (grpo). Differs from: ``sequences`` counts the whole optimiser batch, and no epsilon is added.
    """
    means_S = only_real(values_ST, mask_ST).sum(-1) / mask_ST.sum(-1).clamp(min=1.0)
    return means_S.sum() / max(sequences, 1)


def constant_mean(values_ST: Tensor, mask_ST: Tensor, sequences: int, length: int) -> Tensor:
    """Sum over real tokens divided by ``sequences * length``, whatever the true lengths; length 1 sums a sequence.

    Source: Dr. GRPO, arXiv 2503.20783 section 3.2; TRL@v1.16.0 trl/trainer/grpo_trainer.py _compute_loss (dr_grpo;
    luspo with length 1).
    """
    return token_mean(values_ST, mask_ST, sequences * length)


def aggregate(name: Aggregate, values_ST: Tensor, mask_ST: Tensor, size: StepSize) -> Tensor:
    """The share of some sequences in the loss of a step of ``size``.

    Source: none; chooses among the functions above.
    """
    if name == "sequence":
        return sequence_mean(values_ST, mask_ST, size.sequences)
    if name == "constant":
        return constant_mean(values_ST, mask_ST, size.sequences, size.length)
    return token_mean(values_ST, mask_ST, size.tokens if name == "token" else size.sequences)


def without_truncated(mask_ST: Tensor, truncated_S: Tensor) -> Tensor:
    """The mask without the tokens of completions that ended by length; advantages still see their rewards.

    Source: DAPO, arXiv 2503.14476 section 3.4 (overlong filtering); TRL@v1.16.0 trl/trainer/grpo_trainer.py
    _generate_and_score_completions (mask_truncated_completions).
    """
    return mask_ST * ~truncated_S.bool()[:, None]
