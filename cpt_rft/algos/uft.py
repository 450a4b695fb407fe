"""UFT: the prompt ends with a hint, a piece of the solution, which is also a target of supervision."""

import torch
from torch import Generator, Tensor

from cpt_rft.algos.schedule import cosine
from cpt_rft.algos.sft import sft_loss

PIECES = 5


def hint_share(step: int, steps: int, *, high: float, low: float) -> float:
    """Chance of each piece of the solution to be shown: from ``high`` along half a cosine, and none after ``steps``.

    Source: UFT, arXiv 2505.16984 equation B.1; liumy2010/UFT@ad3c8ec verl/utils/dataset/rl_dataset.py __getitem__.
    Differs from: the equation counts steps from one, the released code from zero, as here.
    """
    return cosine(step, steps, high, low) if step <= steps else 0.0


def hint_length(solution: int, share: float, generator: Generator) -> int:
    """Parts of a solution of ``solution`` parts to show: of five pieces, as many as a binomial draw.

    Source: UFT, arXiv 2505.16984 appendix B; liumy2010/UFT@ad3c8ec verl/utils/dataset/rl_dataset.py __getitem__.
    """
    pieces = min(PIECES, solution)
    shown = int((torch.rand(pieces, generator=generator) < share).sum())
    return round(shown / pieces * solution) if pieces else 0


def hint_loss(logprobs_ST: Tensor, hint_ST: Tensor, tokens: int) -> Tensor:
    """Mean negative log-probability of the hint's tokens, added to the policy loss with a weight of the caller's.

    Source: UFT, arXiv 2505.16984 equation 3.3; liumy2010/UFT@ad3c8ec verl/workers/actor/dp_actor.py update_policy
    (sft_loss). Differs from: divided by the hint tokens of the whole step, where the equation has the sum over a hint
    and the code the mean of a micro-batch; logits are not limited to +-100.
    """
    return sft_loss(logprobs_ST, hint_ST, tokens)
