"""Gradients of single completions, each as one flat vector: what updates and the Fisher information are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpt_rft.algos.logprobs import token_logprobs
from cpt_rft.checkpoint import EncodedPrompt
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.packing import pack_blocks


def completion_logits(
    network: Network, prompts: Sequence[EncodedPrompt], tokens: Sequence[Sequence[list[int]]]
) -> Tensor:
    """Logits (N, V) that predict the tokens of G completions of each prompt, in the order of the tokens."""
    contexts = network.contexts(prompts)
    return network.logits(contexts, pack_blocks(contexts, tokens)).float()


def score_functions(
    network: Network, prompt: EncodedPrompt, answers: Sequence[list[int]], banned_V: Tensor | None
) -> Tensor:
    """Gradients (G, W) of the log-likelihood of each of G completions of a prompt, over all weights, float32.

    The loss of a batch is a weighted sum of such log-likelihoods, so its gradient is the same sum of these vectors. The
    forward pass is shared, the backward passes cannot be.

    Args:
        network: The model.
        prompt: What is asked.
        answers: The completions, end token included.
        banned_V: Added to the logits, as in rollouts; none for the whole vocabulary, as in SFT.
    """
    logits_NV = completion_logits(network, [prompt], [answers])
    logits_NV = logits_NV if banned_V is None else logits_NV + banned_V
    targets_N = torch.tensor([token for tokens in answers for token in tokens], device=logits_NV.device)
    parts = token_logprobs(logits_NV, targets_N).split([len(tokens) for tokens in answers])
    weights = list(network.model.parameters())
    rows = []
    for part in parts:
        gradients = torch.autograd.grad(part.sum(), weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.float().flatten() for gradient in gradients]))
    return torch.stack(rows)
