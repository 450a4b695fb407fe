"""Prefix-RFT in the local engine: beside the free completions of a prompt one that begins with a demonstration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpt_rft.algos.logprobs import entropy, token_logprobs
from cpt_rft.algos.prefix_rft import most_uncertain, prefix_advantages, prefix_length
from cpt_rft.checkpoint import EncodedPrompt
from cpt_rft.config.hybrids import Prefix
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import Completion, end_token_ids, generate
from cpt_rft.engines.local.grpo import Group, GrpoObjective, Rollout, step_fields
from cpt_rft.engines.local.objective import chunks
from cpt_rft.engines.local.observe import kind_of
from cpt_rft.engines.local.shown import after_piece, shown_prompt, target_ids
from cpt_rft.seeds import derive_seed, python_random


class _Piece(NamedTuple):
    """The demonstration that a prompt's prefixed completion begins with, under the policy as it is."""

    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]


class PrefixObjective(GrpoObjective):
    """Group-relative policy optimisation in which one further completion a prompt has a prefix of the target.

    Source: Prefix-RFT, arXiv 2507.01679 version 3, section 3 and appendix A.2 (`cpt_rft.algos.prefix_rft`).
    Differs from: the prefixed completion comes on top of the group, where the source's takes the place of a free one;
    ratio and clip treat tokens of the prefix like any other, with the policy before the step below them; the surest
    tokens are left out of all prefixes of the step, not of a micro-batch's; continuations have the length limit to
    themselves; steps are those of a stage.
    """

    def __init__(self, *settings: Any, prefix: Prefix) -> None:
        super().__init__(*settings)
        self.prefix = prefix
        self.end = int(end_token_ids(self.policy)[0])

    def pieces(self, step: int, rows: Sequence[Example]) -> list[list[int]]:
        """The prefix of each row at a step, from a seed of its own."""
        steps = max(len(self.batches) - 1, 1)
        found = []
        for index, row in enumerate(rows):
            target = target_ids(self.policy, row, self.method.style, self.end)
            draw = python_random(*self.seed_path, "prefix", step, index).random()
            length = prefix_length(len(target), draw, step, steps, high=self.prefix.high, low=self.prefix.low)
            found.append(target[:length])
        return found

    def _roll_out(self, step: int, batches: Sequence[Sequence[Example]]) -> list[Rollout]:
        (rows,) = batches
        sampled = self._sample(step, rows)
        rewards_PG = self._rewards(rows, sampled.scores)
        tokens = self.pieces(step, rows)
        pieces = self.team.shared(self._measured, list(zip(sampled.prompts, tokens, strict=True)))
        hybrids = self._hybrids(step, sampled.prompts, pieces)
        marks = [[self.score(row, each)] for row, each in zip(rows, hybrids, strict=True)]
        scale = self.method.advantage_scale or "group"
        free_PG, continuation_P, prefix_P = prefix_advantages(rewards_PG, self._rewards(rows, marks)[:, 0], scale=scale)
        kept = self._kept(pieces)
        groups = []
        for index, (prompt, group, hybrid) in enumerate(
            zip(sampled.prompts, sampled.completions, hybrids, strict=True)
        ):
            lengths = torch.tensor([len(each.token_ids) for each in group])
            written = len(hybrid.token_ids) - len(kept[index])
            parts = [
                free_PG[index].float().repeat_interleave(lengths),
                prefix_P[index].float() * kept[index],
                continuation_P[index].float().expand(written),
            ]
            kind = kind_of([*sampled.scores[index], *marks[index]])
            groups.append(Group(prompt, [*group, hybrid], kind, torch.cat(parts)))
        fields = step_fields(sampled, rewards_PG) | {
            "tokens": sum(len(group.advantages_N) for group in groups),
            "shown": sum(map(len, tokens)) / len(rows),
        }
        return [Rollout(groups, fields)]

    def _hybrids(self, step: int, prompts: Sequence[EncodedPrompt], pieces: Sequence[_Piece]) -> list[Completion]:
        """The prefixed completion of each prompt, whole."""
        asked = [
            (shown_prompt(prompt, piece.tokens), derive_seed(*self.seed_path, "hybrid", step, index))
            for index, (prompt, piece) in enumerate(zip(prompts, pieces, strict=True))
        ]
        written = self.team.shared(self._write_one, asked)
        return [after_piece(each, piece.tokens, piece.logprobs) for each, piece in zip(written, pieces, strict=True)]

    def _write_one(self, asked: Sequence[tuple[EncodedPrompt, int]]) -> list[Completion]:
        groups = generate(
            self.policy,
            [prompt for prompt, _ in asked],
            max_new_tokens=self.method.max_new_tokens,
            temperature=self.method.temperature,
            seeds=[seed for _, seed in asked],
        )
        return [group[0] for group in groups]

    @torch.no_grad()
    def _measured(self, asked: Sequence[tuple[EncodedPrompt, list[int]]]) -> list[_Piece]:
        """Log-probability and entropy of each token of each piece."""
        found: list[_Piece] = []
        temperature = self.method.temperature
        for part in chunks(asked, self.method.micro_batch):
            # A block has at least one token: for an empty piece any will do, and is dropped again.
            padded = [[Completion(piece or [self.end], [], "stop")] for _, piece in part]
            contexts, blocks = self._pack([(prompt, group) for (prompt, _), group in zip(part, padded, strict=True)])
            logits_NV = self.network.logits(contexts, blocks).float() + self.banned
            counts = [len(group[0].token_ids) for group in padded]
            logprobs = token_logprobs(logits_NV, blocks.targets, temperature=temperature).split(counts)
            entropies = entropy(logits_NV, temperature=temperature).split(counts)
            for (_, piece), logprobs_T, entropy_T in zip(part, logprobs, entropies, strict=True):
                size = len(piece)
                found.append(_Piece(piece, logprobs_T[:size].tolist(), entropy_T[:size].tolist()))
        return found

    def _kept(self, pieces: Sequence[_Piece]) -> list[Tensor]:
        """1 on the tokens of each prefix that teach something, of all prefixes of the step the least certain."""
        flat = torch.tensor([value for piece in pieces for value in piece.entropies])
        kept = most_uncertain(torch.ones_like(flat)[None], flat[None], drop=self.prefix.drop)[0]
        return list(kept.split([len(piece.tokens) for piece in pieces]))
