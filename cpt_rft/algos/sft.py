"""Supervised fine-tuning: label text, weight one."""

from torch import Tensor

from cpt_rft.algos.aggregate import token_mean


def sft_loss(logprobs_T: Tensor, mask_T: Tensor, tokens: int | Tensor) -> Tensor:
    """Mean negative log-probability of the target tokens.

    Source: cross-entropy of teacher forcing, as LLaMA-Factory trains it (labels -100 outside the answer).
    Differs from: divided by the target tokens of the whole optimiser batch, not of the micro-batch.

    Args:
        logprobs_T: Log-probabilities of the targets, any shape.
        mask_T: 1 on target tokens, the same shape.
        tokens: Target tokens of the whole optimiser batch.
    """
    return token_mean(-logprobs_T, mask_T, tokens)
