"""Supervised fine-tuning on labels."""

from collections.abc import Sequence

import torch

from cpt_rft.algos.logprobs import token_logprobs
from cpt_rft.algos.sft import sft_loss
from cpt_rft.checkpoint import Policy, encode_prompts
from cpt_rft.config.methods import GrpoMethod, SftMethod
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import end_token_ids
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.objective import Backward, StepResult, chunks
from cpt_rft.engines.local.packing import pack_blocks
from cpt_rft.engines.local.shown import target_ids
from cpt_rft.engines.local.team import ALONE, Team
from cpt_rft.prompts import user_text


class SftObjective:
    """Cross-entropy on the answer and the end token, over the whole vocabulary."""

    def __init__(self, policy: Policy, method: SftMethod | GrpoMethod, preset: str, team: Team = ALONE) -> None:
        self.policy, self.method, self.preset, self.team = policy, method, preset, team
        self.network = Network(policy.model)
        self.end = int(end_token_ids(policy)[0])

    def gradients(self, step: int, rows: Sequence[Example], backward: Backward) -> StepResult:
        """One pass over the rows of a step."""
        targets = [self.target(row) for row in rows]
        tokens = sum(map(len, targets))
        total = 0.0
        for part in chunks(self.team.mine(list(zip(rows, targets, strict=True))), self.method.micro_batch):
            texts = [(row.images, user_text(row, self.method.style, self.preset)) for row, _ in part]
            prompts = encode_prompts(self.policy, texts, [row.id for row, _ in part])
            contexts = self.network.contexts(prompts)
            blocks = pack_blocks(contexts, [[target] for _, target in part])
            logprobs = token_logprobs(self.network.logits(contexts, blocks), blocks.targets)
            loss = sft_loss(logprobs, torch.ones_like(logprobs), tokens)
            backward(loss)
            total += float(loss.detach())
        return StepResult(self.team.total(total), {"tokens": tokens, "length": tokens / len(rows)})

    def settled(self, step: int) -> bool:
        """Every step stands for itself."""
        return True

    def target(self, row: Example) -> list[int]:
        """Token ids of what the row teaches, with the token that ends the turn.

        Raises:
            DataError: The style is ``cot`` and the row has no rationale.
        """
        return target_ids(self.policy, row, self.method.style, self.end)
