"""Log-probabilities of given tokens, always in float32."""

import torch
from torch import Tensor


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under ``softmax(logits / temperature)``, (N,).

    A token whose logit is ``-inf`` has no probability; the others share it.

    Source: TRL@v1.16.0 trl/trainer/grpo_trainer.py _get_per_token_logps_and_entropies (logits divided by temperature).
    """
    logits_NV = logits_NV.float() if temperature == 1.0 else logits_NV.float() / temperature
    return logits_NV.gather(-1, tokens_N[:, None]).squeeze(-1) - logits_NV.logsumexp(-1)


def entropy(logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of ``softmax(logits / temperature)`` in nats, (N,); a token without probability adds nothing.

    Source: Shannon; TRL@v1.16.0 trl/trainer/grpo_trainer.py (entropy bonus).
    """
    logprobs_NV = (logits_NV.float() / temperature).log_softmax(-1)
    # Zero times infinity is not a number, in the value and in the gradient.
    finite_NV = torch.where(logprobs_NV > -torch.inf, logprobs_NV, torch.zeros_like(logprobs_NV))
    return -(logprobs_NV.exp() * finite_NV).sum(-1)
