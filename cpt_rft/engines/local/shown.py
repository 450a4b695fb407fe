"""Targets as demonstrations: a piece of what supervision would teach, before the policy goes on by itself."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from cpt_rft.checkpoint import EncodedPrompt, Policy
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import Completion
from cpt_rft.prompts import Style, target_text


def target_ids(policy: Policy, row: Example, style: Style, end: int) -> list[int]:
    """Token ids of what a row teaches, with the token that ends the turn.

    Raises:
        DataError: The style is ``cot`` and the row has no rationale.
    """
    return [*policy.tokenizer.encode(target_text(row, style), add_special_tokens=False), end]


def shown_prompt(prompt: EncodedPrompt, piece: Sequence[int]) -> EncodedPrompt:
    """The prompt with the beginning of an answer after it."""
    return replace(prompt, ids=torch.cat([prompt.ids, torch.tensor(list(piece), dtype=prompt.ids.dtype)]))


def after_piece(completion: Completion, piece: Sequence[int], logprobs: Sequence[float]) -> Completion:
    """The whole answer: a piece that was shown, with its log-probabilities, and what the policy wrote after it."""
    return Completion([*piece, *completion.token_ids], [*logprobs, *completion.logprobs], completion.finish)
