"""O-LoRA: the adapter of a task keeps to directions that the adapters of earlier tasks do not use."""

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality_penalty(earlier: Sequence[Tensor], current: Tensor) -> Tensor:
    """Sum of the absolute scalar products of the rows of A: ``earlier`` (rank, inputs) each, ``current`` likewise.

    Source: O-LoRA, arXiv 2310.14152 (the orthogonality loss); cmnfriend/O-LoRA@07117e1 src/uie_trainer_lora.py
    training_step. Differs from: absolute values as in the released code, where the paper has squares; no L2 penalty on
    the new adapter.
    """
    if not earlier:
        return current.sum() * 0.0
    return (torch.cat([rows.detach() for rows in earlier]) @ current.T).abs().sum()
