"""Group-relative policy optimisation, strictly on policy: one update from each batch of completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cpt_rft.algos.aggregate import token_mean
from cpt_rft.algos.grpo import group_advantages, zero_variance
from cpt_rft.algos.kl import k3_divergence
from cpt_rft.algos.logprobs import entropy, token_logprobs
from cpt_rft.algos.policy import clipped_policy_loss
from cpt_rft.checkpoint import EncodedPrompt, Policy, encode_prompts
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import Completion, generate, suppression
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.objective import Backward, StepResult, chunks
from cpt_rft.engines.local.observe import OBSERVE_EVERY, GradientMeter, Kind, kind_of, reward_variance
from cpt_rft.engines.local.packing import Blocks, Contexts, pack_blocks
from cpt_rft.prompts import user_text
from cpt_rft.scoring import Score, reward, score
from cpt_rft.seeds import derive_seed


class Group(NamedTuple):
    """A prompt, its completions, the advantage of each (G,), and what kind of group it is."""

    prompt: EncodedPrompt
    completions: list[Completion]
    advantages: Tensor
    kind: Kind


@dataclass
class _Totals:
    """Sums over the completion tokens of a step."""

    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    seen: int = 0
    gap: float = field(default=0.0)
    meter: GradientMeter | None = None


class GrpoObjective:
    """Rollout, reward, advantage, loss.

    Args:
        policy: The policy being trained.
        reference: Where the KL penalty pulls to; none where its coefficient is zero.
        method: The method's settings.
        preset: Which prompt suffixes.
        seed_path: Prefix of the rollouts' seeds.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        method: GrpoMethod,
        preset: str,
        seed_path: tuple[str | int, ...],
    ) -> None:
        self.policy, self.method, self.preset, self.seed_path = policy, method, preset, seed_path
        self.network = Network(policy.model)
        self.reference = None if reference is None else Network(reference.model)
        self.banned = suppression(policy, self.network.device)

    def gradients(self, step: int, rows: Sequence[Example], backward: Backward) -> StepResult:
        """Sample, score, and differentiate.

        The loss is a mean over all completion tokens of the step. A group of equal rewards has advantage zero, so
        without a KL penalty it is left out of the update, where it would add exactly nothing.
        """
        prompts = self._prompts(rows)
        completions = self.rollout(step, prompts)
        scores = [[self.score(row, each) for each in group] for row, group in zip(rows, completions, strict=True)]
        rewards_PG = torch.tensor([[reward(each, self.method.style) for each in group] for group in scores]).double()
        equal_P = zero_variance(rewards_PG)
        kinds = [kind_of(group) for group in scores]
        parts = zip(prompts, completions, group_advantages(rewards_PG), kinds, strict=True)
        groups = [Group(*each) for each in parts]
        if self.reference is None:
            groups = [group for group, equal in zip(groups, equal_P.tolist(), strict=True) if not equal]
        flat = [each for group in completions for each in group]
        tokens = sum(len(each.token_ids) for each in flat)
        totals = _Totals(meter=None if step % OBSERVE_EVERY else GradientMeter(self.policy.model, kinds))
        for part in chunks(groups, self.method.micro_batch):
            self._micro_batch(part, tokens, backward, totals)
        fields = {
            "tokens": tokens,
            "length": tokens / len(flat),
            "truncated": sum(each.finish == "length" for each in flat) / len(flat),
            "reward": float(rewards_PG.mean()),
            "accuracy": _mean([each.strict for group in scores for each in group]),
            "format": _mean([each.format for group in scores for each in group]),
            "zero_variance": float(equal_P.double().mean()),
            "reward_variance": reward_variance(rewards_PG),
            "all_right": _mean([kind == "right" for kind in kinds]),
            "all_wrong": _mean([kind == "wrong" for kind in kinds]),
            "kl": None if self.reference is None else totals.kl / tokens,
            "entropy": totals.entropy / totals.seen if totals.seen else None,
            "rollout_gap": totals.gap if totals.seen else None,
            **(totals.meter.norms() if totals.meter else {}),
        }
        return StepResult(totals.loss, fields)

    def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
        """The completions of a step; each prompt's seed depends on the stage, the step and its place in the step."""
        return generate(
            self.policy,
            prompts,
            group=self.method.group,
            max_new_tokens=self.method.max_new_tokens,
            temperature=self.method.temperature,
            seeds=[derive_seed(*self.seed_path, "rollout", step, index) for index in range(len(prompts))],
        )

    def score(self, row: Example, completion: Completion) -> Score:
        """Score a completion exactly as evaluation does."""
        return score(
            self.policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            answer=row.answer,
            references=row.references,
            kind=row.kind,
            style=self.method.style,
            truncated=completion.finish == "length",
            options=row.options,
        )

    def _prompts(self, rows: Sequence[Example]) -> list[EncodedPrompt]:
        texts = [(row.images, user_text(row, self.method.style, self.preset)) for row in rows]
        return encode_prompts(self.policy, texts, [row.id for row in rows])

    def _micro_batch(self, groups: Sequence[Group], tokens: int, backward: Backward, totals: _Totals) -> None:
        """The share of some groups in the loss of a step with ``tokens`` completion tokens."""
        contexts = self.network.contexts([group.prompt for group in groups])
        blocks = pack_blocks(contexts, [[each.token_ids for each in group.completions] for group in groups])
        lengths = torch.tensor([len(each.token_ids) for group in groups for each in group.completions])
        advantages = torch.cat([group.advantages for group in groups]).float()
        advantages_N = advantages.repeat_interleave(lengths).to(blocks.ids.device)
        logits_NV = self.network.logits(contexts, blocks).float() + self.banned
        logprobs_N = token_logprobs(logits_NV, blocks.targets, temperature=self.method.temperature)
        loss_N = clipped_policy_loss(
            logprobs_N,
            logprobs_N.detach(),  # the policy that wrote the tokens is the one being trained: the ratio is 1
            advantages_N,
            clip_low=self.method.clip_low,
            clip_high=self.method.clip_high,
            dual_clip=self.method.dual_clip,
        )
        if self.reference is not None:
            kl_N = k3_divergence(logprobs_N, self._reference_logprobs(contexts, blocks))
            loss_N = loss_N + self.method.kl_coef * kl_N
            totals.kl += float(kl_N.detach().sum())
        if totals.meter is not None:
            counts = [sum(len(each.token_ids) for each in group.completions) for group in groups]
            kinds_N = [group.kind for group, count in zip(groups, counts, strict=True) for _ in range(count)]
            totals.meter.add(loss_N, kinds_N, tokens)
        loss = token_mean(loss_N, torch.ones_like(loss_N), tokens)
        backward(loss)
        totals.loss += float(loss.detach())
        self._observe(totals, groups, logits_NV.detach(), logprobs_N.detach())

    @torch.no_grad()
    def _reference_logprobs(self, contexts: Contexts, blocks: Blocks) -> Tensor:
        assert self.reference is not None
        logits_NV = self.reference.logits(contexts, blocks).float() + self.banned
        return token_logprobs(logits_NV, blocks.targets, temperature=self.method.temperature)

    def _observe(self, totals: _Totals, groups: Sequence[Group], logits_NV: Tensor, logprobs_N: Tensor) -> None:
        sampled = [logprob for group in groups for each in group.completions for logprob in each.logprobs]
        gap_N = (logprobs_N - torch.tensor(sampled, device=logprobs_N.device)).abs()
        totals.gap = max(totals.gap, float(gap_N.max()))
        totals.entropy += float(entropy(logits_NV, temperature=self.method.temperature).sum())
        totals.seen += len(logprobs_N)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
