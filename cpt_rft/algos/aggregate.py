"""From losses a token to the loss of a batch."""

import torch
from torch import Tensor


def token_mean(values_T: Tensor, mask_T: Tensor, tokens: int | Tensor) -> Tensor:
    """Sum over real tokens divided by ``tokens``; zero, with zero gradient, when there are none.

    Source: EasyR1@b44b311 verl/utils/torch_functional.py masked_mean, verl/trainer/core_algos.py average_loss (token).
    Differs from: the divisor is given, and counts the tokens of the whole optimiser batch; no epsilon is added to it.
    Padding may hold anything, also infinities: it is replaced, not multiplied by zero.
    """
    total = torch.where(mask_T.bool(), values_T, torch.zeros_like(values_T)).sum()
    return total / max(float(tokens), 1.0)
