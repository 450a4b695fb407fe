"""The released SFT metric, to the letter: what the model would say at each token of a label that it is shown.

Source: RFTvsSFT@7d4f50e LLaMA-Factory/src/llamafactory/train/sft/metric.py ``eval_logit_processor`` and
``ComputeVQAAccuracy``; its template ``qwen2_vl`` ends a label with the end token and a newline, both scored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpt_rft.checkpoint import EncodedPrompt, Policy
from cpt_rft.engines.local.generate import end_token_ids
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.packing import pack_blocks


class Forced(NamedTuple):
    """What one label came to.

    Attributes:
        said: The likeliest token at each position, decoded without special tokens.
        tokens: Positions of the label, end token and newline included.
        strict: 1.0 iff ``said`` is the label, both stripped and in lower case; as released.
        lenient: The same without the newline after the end token, which only LLaMA-Factory's template teaches.
    """

    said: str
    tokens: int
    strict: float
    lenient: float


@torch.no_grad()
def teacher_forced(policy: Policy, prompts: Sequence[EncodedPrompt], labels: Sequence[str]) -> list[Forced]:
    """Predict every token of every label from the prompt and the label's own tokens before it, in one pass."""
    end = int(end_token_ids(policy)[0])
    closed = [f"{label}{policy.tokenizer.convert_ids_to_tokens(end)}\n" for label in labels]
    targets = [policy.tokenizer.encode(text, add_special_tokens=False) for text in closed]
    network = Network(policy.model)
    contexts = network.contexts(prompts)
    logits = network.logits(contexts, pack_blocks(contexts, [[target] for target in targets]))
    said = logits.argmax(-1).split([len(target) for target in targets])
    return [_compare(policy, row.tolist(), target, end) for row, target in zip(said, targets, strict=True)]


def _compare(policy: Policy, said: list[int], target: list[int], end: int) -> Forced:
    def text(ids: list[int]) -> str:
        return str(policy.tokenizer.decode(ids, skip_special_tokens=True))

    stop = target.index(end) + 1
    pairs = ((said, target), (said[:stop], target[:stop]))
    strict, lenient = (float(text(one).strip().lower() == text(other).strip().lower()) for one, other in pairs)
    return Forced(text(said), len(target), strict, lenient)
