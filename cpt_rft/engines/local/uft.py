"""UFT in the local engine: completions begin after a hint, and the hint is a target."""

from collections.abc import Sequence
from typing import Any

import torch

from cpt_rft.algos.logprobs import token_logprobs
from cpt_rft.algos.uft import hint_length, hint_loss, hint_share
from cpt_rft.config.hybrids import Hint
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import end_token_ids
from cpt_rft.engines.local.grpo import GrpoObjective, SampledRows
from cpt_rft.engines.local.objective import Backward, StepResult, chunks
from cpt_rft.engines.local.packing import pack_blocks
from cpt_rft.engines.local.shown import after_piece, shown_prompt, target_ids
from cpt_rft.seeds import derive_seed


class UftObjective(GrpoObjective):
    """Reinforcement on what the policy writes after a hint, and supervision of the hint.

    Source: UFT, arXiv 2505.16984 section 3 and appendix B (`cpt_rft.algos.uft`).
    Differs from: the hint is a piece of the tokens of the supervised target, never all of them, where the source cuts
    between sentences, and stands where the answer begins, not in the question; its length is drawn again at each step a
    row is in; the KL penalty is that of the method.
    """

    def __init__(self, *settings: Any, hint: Hint) -> None:
        super().__init__(*settings)
        self.hint = hint
        self.end = int(end_token_ids(self.policy)[0])

    def gradients(self, step: int, rows: Sequence[Example], backward: Backward) -> StepResult:
        """See `Objective.gradients`."""
        result = super().gradients(step, rows, backward)
        pieces = self.pieces(step, rows)
        tokens = sum(map(len, pieces))
        total = 0.0
        hinted = [(row, piece) for row, piece in zip(rows, pieces, strict=True) if piece]
        for part in chunks(self.team.mine(hinted), self.method.micro_batch):
            contexts = self.network.contexts(self._prompts([row for row, _ in part]))
            blocks = pack_blocks(contexts, [[piece] for _, piece in part])
            logprobs_N = token_logprobs(self.network.logits(contexts, blocks), blocks.targets)
            loss = self.hint.coef * hint_loss(logprobs_N, torch.ones_like(logprobs_N), tokens)
            backward(loss)
            total += float(loss.detach())
        return StepResult(result.loss + self.team.total(total), result.fields | {"shown": tokens / len(rows)})

    def pieces(self, step: int, rows: Sequence[Example]) -> list[list[int]]:
        """The hint of each row at a step, from a seed of its own; never the whole target."""
        until = round(self.hint.until * len(self.batches))
        share = hint_share(step, until, high=self.hint.high, low=self.hint.low)
        found = []
        for index, row in enumerate(rows):
            target = target_ids(self.policy, row, self.method.style, self.end)
            generator = torch.Generator().manual_seed(derive_seed(*self.seed_path, "hint", step, index))
            found.append(target[: hint_length(len(target) - 1, share, generator)])
        return found

    def _sample(self, step: int, rows: Sequence[Example]) -> SampledRows:
        pieces = self.pieces(step, rows)
        prompts = [shown_prompt(*each) for each in zip(self._prompts(rows), pieces, strict=True)]
        completions = self.rollout(step, prompts)
        scores = [
            [self.score(row, after_piece(each, piece, [0.0] * len(piece))) for each in group]
            for row, piece, group in zip(rows, pieces, completions, strict=True)
        ]
        return SampledRows(rows, prompts, completions, scores)
