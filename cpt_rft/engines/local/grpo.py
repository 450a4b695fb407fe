"""Reinforcement fine-tuning: sample, reward, compare, differentiate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpt_rft.algos.aggregate import StepSize, pad_rows, without_truncated
from cpt_rft.algos.grpo import zero_variance
from cpt_rft.algos.kl import k3_divergence
from cpt_rft.algos.logprobs import entropy, token_logprobs
from cpt_rft.algos.losses import KlPenalty, Sampled, policy_objective
from cpt_rft.algos.rewards import reward_groups
from cpt_rft.checkpoint import EncodedPrompt, Policy, encode_prompts
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.data.example import Example
from cpt_rft.engines.local.advantages import token_advantages
from cpt_rft.engines.local.generate import Completion, generate, suppression
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.objective import Backward, StepResult, chunks
from cpt_rft.engines.local.observe import OBSERVE_EVERY, GradientMeter, Kind, kind_of, reward_variance
from cpt_rft.engines.local.packing import Blocks, Contexts, pack_blocks
from cpt_rft.engines.local.team import ALONE, Team
from cpt_rft.engines.losses import policy_loss
from cpt_rft.errors import TrainingError, UserError
from cpt_rft.prompts import user_text
from cpt_rft.scoring import Score, reward, score
from cpt_rft.seeds import derive_seed


class Group(NamedTuple):
    """A prompt, its completions, the advantage of each of their tokens (N,), and what kind of group it is.

    `reference_N` holds the tokens' log-probabilities under the reference where the rewards needed them.
    """

    prompt: EncodedPrompt
    completions: list[Completion]
    kind: Kind
    advantages_N: Tensor
    reference_N: Tensor | None = None


class Rollout(NamedTuple):
    """The groups of one step, and its numbers for the log."""

    groups: list[Group]
    fields: dict[str, Any]


class SampledRows(NamedTuple):
    """The completions of one step's prompts and their scores, before they are compared."""

    rows: Sequence[Example]
    prompts: list[EncodedPrompt]
    completions: list[list[Completion]]
    scores: list[list[Score]]


@dataclass
class _Totals:
    """Sums over the completion tokens of a step."""

    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    seen: int = 0
    gap: float = field(default=0.0)
    gap_sum: float = 0.0
    meter: GradientMeter | None = None

    def share(self, team: Team) -> None:
        """Make them those of all processes of the step."""
        self.loss, self.kl, self.entropy = team.total(self.loss), team.total(self.kl), team.total(self.entropy)
        self.seen, self.gap = round(team.total(self.seen)), team.largest(self.gap)
        self.gap_sum = team.total(self.gap_sum)
        if self.meter is not None:
            self.meter.share(team)


class GrpoObjective:
    """Rollout, reward, advantage, loss.

    Args:
        policy: The policy being trained.
        reference: Where the KL penalty pulls to; none where its coefficient is zero.
        method: The method's settings.
        preset: Which prompt suffixes.
        seed_path: Prefix of the rollouts' seeds.
        batches: The rows of every step, where one rollout serves several.
        team: The processes that share a step.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        method: GrpoMethod,
        preset: str,
        seed_path: tuple[str | int, ...],
        batches: Sequence[Sequence[Example]] = (),
        team: Team = ALONE,
    ) -> None:
        self.policy, self.method, self.preset, self.seed_path = policy, method, preset, seed_path
        self.batches, self.team = batches, team
        self.network = Network(policy.model)
        self.reference = None if reference is None else Network(reference.model)
        self.banned = suppression(policy, self.network.device)
        self.loss = policy_loss(method)
        self.penalty = KlPenalty(method.kl_estimator, method.kl_coef, method.kl_ratio_correction)
        self.penalty_in_loss = self.reference is not None and method.kl_in == "loss"
        self.rollouts: list[Rollout] = []

    def gradients(self, step: int, rows: Sequence[Example], backward: Backward) -> StepResult:
        """Sample and score, or take what an earlier step sampled for this one, and differentiate.

        A group whose advantages are all zero, as those of equal rewards are, is left out of the update where no
        penalty or bonus moves it: it would add exactly nothing.
        """
        place = step % self.method.rollout_steps
        if place == 0:
            later = self.batches[step + 1 : step + self.method.rollout_steps]
            self.rollouts = self._roll_out(step, [rows, *later])
        groups, fields = self.rollouts[place]
        counted = [each for group in groups for each in group.completions if self._counts(each)]
        size = StepSize(
            sequences=sum(len(group.completions) for group in groups),
            tokens=sum(len(each.token_ids) for each in counted),
            length=self.method.max_new_tokens,
        )
        kinds = [group.kind for group in groups]
        totals = _Totals(meter=None if step % OBSERVE_EVERY else GradientMeter(self.policy.model, kinds))
        if not self.penalty_in_loss and not self.method.entropy_coef:
            groups = [group for group in groups if bool(group.advantages_N.any())]
        for part in chunks(self.team.mine(groups), self.method.micro_batch):
            self._micro_batch(part, size, place == 0, backward, totals)
        totals.share(self.team)
        seen = totals.seen if place == 0 else 0
        measured = {
            "kl": None if self.reference is None else totals.kl / fields["tokens"],
            "entropy": totals.entropy / totals.seen if totals.seen else None,
            "rollout_gap": totals.gap if seen else None,
            "rollout_gap_mean": totals.gap_sum / seen if seen else None,
        }
        return StepResult(totals.loss, fields | measured | (totals.meter.norms() if totals.meter else {}))

    def settled(self, step: int) -> bool:
        """Whether every completion of the last rollout has been used."""
        return (step + 1) % self.method.rollout_steps == 0

    def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
        """The completions of a step; each prompt's seed depends on the stage, the step and its place in the step."""
        seeds = [derive_seed(*self.seed_path, "rollout", step, index) for index in range(len(prompts))]
        return self.team.shared(self._write, list(zip(prompts, seeds, strict=True)))

    def _write(self, asked: Sequence[tuple[EncodedPrompt, int]]) -> list[list[Completion]]:
        """The completions of some prompts, each with its seed."""
        return generate(
            self.policy,
            [prompt for prompt, _ in asked],
            group=self.method.group,
            max_new_tokens=self.method.max_new_tokens,
            temperature=self.method.temperature,
            seeds=[seed for _, seed in asked],
        )

    def tries(self, number: int, place: int, rows: Sequence[Example]) -> list[list[Score]]:
        """Scores of one group of completions of each row, from seeds that no step uses."""
        prompts = self._prompts(rows)
        seeds = [derive_seed(*self.seed_path, "try", number, place, index) for index in range(len(rows))]
        groups = self.team.shared(self._write, list(zip(prompts, seeds, strict=True)))
        return [[self.score(row, each) for each in group] for row, group in zip(rows, groups, strict=True)]

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

    def _roll_out(self, step: int, batches: Sequence[Sequence[Example]]) -> list[Rollout]:
        """The rollout of some steps from the policy as it is now; advantages are taken over all of it."""
        sampled = [self._sample(step + offset, rows) for offset, rows in enumerate(batches)]
        rows = [row for each in sampled for row in each.rows]
        scores = [group for each in sampled for group in each.scores]
        rewards_PG = self._rewards(rows, scores)
        prompts = [prompt for each in sampled for prompt in each.prompts]
        completions = [group for each in sampled for group in each.completions]
        reference = None
        if self.reference is not None and self.method.kl_in == "reward":
            reference = self.team.shared(self._reference_groups, list(zip(prompts, completions, strict=True)))
        advantages, rounded = token_advantages(
            self.method,
            rewards_PG,
            [len(each.token_ids) for group in completions for each in group],
            greedy_P=self._greedy_rewards(rows, prompts) if self.method.advantage == "remax" else None,
            penalty=None if reference is None else (_written_logprobs(completions).cpu(), torch.cat(reference).cpu()),
        )
        counts = [sum(len(each.token_ids) for each in group) for group in completions]
        groups = [
            Group(prompt, group, kind_of(marks), part_N, None if reference is None else reference[index])
            for index, (prompt, group, marks, part_N) in enumerate(
                zip(prompts, completions, scores, advantages.split(counts), strict=True)
            )
        ]
        rollouts, start = [], 0
        for each in sampled:
            stop = start + len(each.prompts)
            fields = step_fields(each, rewards_PG[start:stop]) | {"rounded_groups": rounded}
            rollouts.append(Rollout(groups[start:stop], fields))
            start = stop
        return rollouts

    def _sample(self, step: int, rows: Sequence[Example]) -> SampledRows:
        prompts = self._prompts(rows)
        completions = self.rollout(step, prompts)
        scores = [[self.score(row, each) for each in group] for row, group in zip(rows, completions, strict=True)]
        return SampledRows(rows, prompts, completions, scores)

    def _rewards(self, rows: Sequence[Example], scores: Sequence[Sequence[Score]]) -> Tensor:
        """Rewards (P, G) of scored completions.

        Raises:
            TrainingError: There is not one finite reward a completion.
        """
        rewards = [self._reward(row, each) for row, group in zip(rows, scores, strict=True) for each in group]
        return reward_groups(rewards, len(rewards), len(scores[0]))

    def _reward(self, row: Example, mark: Score) -> float:
        try:
            return reward(mark, self.method.style)
        except UserError:
            raise
        except Exception as error:  # of whatever kind: a run of days is told which row ended it
            raise TrainingError(
                f"The reward of a completion of row {row.id} raised {type(error).__name__}: {error}.",
                "mend the scorer of this answer kind (cpt_rft/scoring)",
            ) from error

    def _greedy_rewards(self, rows: Sequence[Example], prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Reward of the likeliest completion of each prompt, (P,)."""
        greedy = self.team.shared(self._write_greedily, prompts)
        scores = [[self.score(row, group[0])] for row, group in zip(rows, greedy, strict=True)]
        return self._rewards(rows, scores)[:, 0]

    def _write_greedily(self, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
        return generate(self.policy, prompts, max_new_tokens=self.method.max_new_tokens, temperature=0.0)

    def _prompts(self, rows: Sequence[Example]) -> list[EncodedPrompt]:
        texts = [(row.images, user_text(row, self.method.style, self.preset)) for row in rows]
        return encode_prompts(self.policy, texts, [row.id for row in rows])

    def _counts(self, completion: Completion) -> bool:
        """Whether the tokens of a completion are in the loss."""
        return not (self.method.mask_truncated and completion.finish == "length")

    def _micro_batch(
        self, groups: Sequence[Group], size: StepSize, fresh: bool, backward: Backward, totals: _Totals
    ) -> None:
        """The share of some groups in the loss of a step of ``size``; ``fresh`` completions are the policy's own."""
        contexts, blocks = self._pack([(group.prompt, group.completions) for group in groups])
        flat = [each for group in groups for each in group.completions]
        lengths = [len(each.token_ids) for each in flat]
        logits_NV = self.network.logits(contexts, blocks).float() + self.banned
        logprobs_N = token_logprobs(logits_NV, blocks.targets, temperature=self.method.temperature)
        written_N = _written_logprobs([group.completions for group in groups]).to(logprobs_N.device)
        advantages_N = torch.cat([group.advantages_N for group in groups]).to(logprobs_N.device)
        logprobs_ST, mask_ST = pad_rows(logprobs_N, lengths)
        if self.method.mask_truncated:
            cut_S = torch.tensor([not self._counts(each) for each in flat], device=mask_ST.device)
            mask_ST = without_truncated(mask_ST, cut_S)
        reference_N = self._reference_of(groups, contexts, blocks)
        entropy_N = None
        if self.method.entropy_coef:
            entropy_N = entropy(logits_NV, temperature=self.method.temperature)
        batch = Sampled(
            logprobs_ST,
            # Where the policy that wrote the tokens is the one being trained the ratio is 1, to the last bit.
            logprobs_ST.detach() if fresh else pad_rows(written_N, lengths)[0],
            pad_rows(advantages_N, lengths)[0],
            mask_ST,
            None if reference_N is None else pad_rows(reference_N, lengths)[0],
            None if entropy_N is None else pad_rows(entropy_N, lengths)[0],
        )
        if totals.meter is not None:
            kinds = [group.kind for group in groups for _ in group.completions]
            totals.meter.add({kind: self._share(_of_kind(batch, kinds, kind), size) for kind in dict.fromkeys(kinds)})
        loss = self._share(batch, size)
        backward(loss)
        totals.loss += float(loss.detach())
        if reference_N is not None:
            totals.kl += float(k3_divergence(logprobs_N.detach(), reference_N).sum())
        gap_N = (logprobs_N.detach() - written_N).abs()
        totals.gap = max(totals.gap, float(gap_N.max()))
        totals.gap_sum += float(gap_N.sum())
        totals.entropy += float(entropy(logits_NV.detach(), temperature=self.method.temperature).sum())
        totals.seen += len(logprobs_N)

    def _share(self, batch: Sampled, size: StepSize) -> Tensor:
        """The share of some sequences in the loss of a step."""
        kl = self.penalty if self.penalty_in_loss else None
        return policy_objective(self.loss, batch, size, kl=kl, entropy_coefficient=self.method.entropy_coef)

    def _pack(self, parts: Sequence[tuple[EncodedPrompt, list[Completion]]]) -> tuple[Contexts, Blocks]:
        contexts = self.network.contexts([prompt for prompt, _ in parts])
        return contexts, pack_blocks(contexts, [[each.token_ids for each in group] for _, group in parts])

    def _reference_of(self, groups: Sequence[Group], contexts: Contexts, blocks: Blocks) -> Tensor | None:
        """Log-probabilities of the groups' tokens under the reference, (N,), if there is one."""
        known = [group.reference_N for group in groups if group.reference_N is not None]
        if known:
            return torch.cat(known)
        return None if self.reference is None else self._reference_logprobs(contexts, blocks)

    def _reference_groups(self, groups: Sequence[tuple[EncodedPrompt, list[Completion]]]) -> list[Tensor]:
        """Log-probabilities of each group's tokens under the reference, (N,)."""
        found: list[Tensor] = []
        for part in chunks(groups, self.method.micro_batch):
            counts = [sum(len(each.token_ids) for each in group) for _, group in part]
            found += self._reference_logprobs(*self._pack(part)).split(counts)
        return found

    @torch.no_grad()
    def _reference_logprobs(self, contexts: Contexts, blocks: Blocks) -> Tensor:
        assert self.reference is not None
        logits_NV = self.reference.logits(contexts, blocks).float() + self.banned
        return token_logprobs(logits_NV, blocks.targets, temperature=self.method.temperature)


def step_fields(sampled: SampledRows, rewards_PG: Tensor) -> dict[str, Any]:
    """What the log says of the completions of a step."""
    flat = [each for group in sampled.completions for each in group]
    scores = [each for group in sampled.scores for each in group]
    kinds = [kind_of(group) for group in sampled.scores]
    tokens = sum(len(each.token_ids) for each in flat)
    return {
        "tokens": tokens,
        "length": tokens / len(flat),
        "truncated": _mean([each.finish == "length" for each in flat]),
        "reward": float(rewards_PG.mean()),
        "accuracy": _mean([each.strict for each in scores]),
        "format": _mean([each.format for each in scores]),
        "zero_variance": float(zero_variance(rewards_PG).double().mean()),
        "reward_variance": reward_variance(rewards_PG),
        "all_right": _mean([kind == "right" for kind in kinds]),
        "all_wrong": _mean([kind == "wrong" for kind in kinds]),
    }


def _of_kind(batch: Sampled, kinds: Sequence[Kind], kind: Kind) -> Sampled:
    """The batch with the sequences of other kinds masked."""
    chosen_S = torch.tensor([each == kind for each in kinds], device=batch.mask_ST.device)
    return batch._replace(mask_ST=batch.mask_ST * chosen_S[:, None])


def _written_logprobs(completions: Sequence[Sequence[Completion]]) -> Tensor:
    """Log-probabilities of all tokens under the policy that wrote them, (N,)."""
    return torch.tensor([value for group in completions for each in group for value in each.logprobs])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
