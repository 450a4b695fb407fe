"""What holds the policy back beside its objective: gradients that are added to those of the loss."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cpt_rft.algos.aggregate import token_mean
from cpt_rft.algos.ewc import ewc_penalty, l2_penalty
from cpt_rft.algos.lwf import distillation_loss
from cpt_rft.algos.o_lora import orthogonality_penalty
from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.config.restraints import Lwf
from cpt_rft.data.example import Example
from cpt_rft.engines.base import Stage
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.importance import read_importance
from cpt_rft.engines.local.lora import ADAPTER_NAME, Adapter, read_down
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.objective import Backward, chunks
from cpt_rft.engines.local.optimise import BaseOptimiser, Optimiser
from cpt_rft.engines.local.packing import pack_blocks
from cpt_rft.engines.local.team import ALONE, Team
from cpt_rft.prompts import user_text


class Restraint(Protocol):
    """Something that holds the policy back."""

    def gradients(self, rows: Sequence[Example], backward: Backward) -> float:
        """Hand the penalty of a step on the new task's rows to ``backward``, in parts; returns its value."""
        ...


class WeightPenalty:
    """EWC or L2: half a weighed sum of squared distances, on the float32 master weights.

    Args:
        master: All weights as one vector.
        strength: Its weight.
        anchor: Where it pulls to.
        importance: How much each weight counts; none for all alike.
        team: The processes that share a step.
    """

    def __init__(
        self,
        master: Tensor,
        strength: float,
        anchor: Tensor,
        importance: Tensor | None = None,
        team: Team = ALONE,
    ) -> None:
        self.master, self.strength, self.anchor, self.importance = master, strength, anchor, importance
        self.team = team

    def gradients(self, rows: Sequence[Example], backward: Backward) -> float:
        """See `Restraint.gradients`; the rows do not matter."""
        weights, anchor = {"all": self.master}, {"all": self.anchor}
        bare = (
            l2_penalty(weights, anchor)
            if self.importance is None
            else ewc_penalty(weights, anchor, {"all": self.importance})
        )
        penalty = self.strength * bare
        backward(penalty / self.team.size)  # every process adds its part of what all of them know
        return float(penalty.detach())


class Distillation:
    """LwF: the mean distillation loss a token of what the previous model answers, greedily, to the new prompts.

    Differs from: the previous model's words are its own, not the label's or the policy's, so that the term is the same
    for SFT and for GRPO.

    Args:
        policy: The policy being trained.
        previous: The model at the start of the stage.
        settings: Strength, temperature, longest answer.
        stage: Prompt style and preset, rows in memory at once.
        team: The processes that share a step.
    """

    def __init__(self, policy: Policy, previous: Policy, settings: Lwf, stage: Stage, team: Team = ALONE) -> None:
        self.team = team
        self.policy, self.previous, self.settings, self.stage = policy, previous, settings, stage
        self.network, self.teacher = Network(policy.model), Network(previous.model)

    def gradients(self, rows: Sequence[Example], backward: Backward) -> float:
        """See `Restraint.gradients`."""
        method, total, rows = self.stage.method, 0.0, self.team.mine(rows)
        texts = [(row.images, user_text(row, method.style, self.stage.prompt_preset)) for row in rows]
        prompts = encode_prompts(self.policy, texts, [row.id for row in rows])
        limit = self.settings.max_new_tokens
        written = generate(self.previous, prompts, max_new_tokens=limit, temperature=0.0) if prompts else []
        answers = [[each.token_ids for each in group] for group in written]
        tokens = round(self.team.total(sum(len(ids) for group in answers for ids in group)))
        for part in chunks(list(zip(prompts, answers, strict=True)), method.micro_batch):
            contexts = self.network.contexts([prompt for prompt, _ in part])
            blocks = pack_blocks(contexts, [group for _, group in part])
            with torch.no_grad():
                previous_NV = self.teacher.logits(contexts, blocks)
            logits_NV = self.network.logits(contexts, blocks)
            loss_N = distillation_loss(logits_NV, previous_NV, temperature=self.settings.temperature)
            loss = self.settings.strength * token_mean(loss_N, torch.ones_like(loss_N), tokens)
            backward(loss)
            total += float(loss.detach())
        return self.team.total(total)


class Orthogonality:
    """O-LoRA: the adapters of a stage keep out of the directions that those of earlier stages read.

    Args:
        adapter: The adapters being trained.
        earlier: A of every layer, of each earlier stage.
        strength: Its weight.
        team: The processes that share a step.
    """

    def __init__(
        self, adapter: Adapter, earlier: Sequence[Mapping[str, Tensor]], strength: float, team: Team = ALONE
    ) -> None:
        self.adapter, self.strength, self.team = adapter, strength, team
        self.earlier = {
            layer: [each[layer].to(down.device) for each in earlier] for layer, down in adapter.down.items()
        }

    def gradients(self, rows: Sequence[Example], backward: Backward) -> float:
        """See `Restraint.gradients`; the rows do not matter."""
        downs = self.adapter.down.items()
        shared = [orthogonality_penalty(self.earlier[layer], down.float()) for layer, down in downs]
        penalty = self.strength * torch.stack(shared).sum()
        backward(penalty / self.team.size)
        return float(penalty.detach())


def make_restraints(
    stage: Stage, policy: Policy, optimiser: BaseOptimiser, adapter: Adapter | None, dtype: torch.dtype, device: str
) -> list[Restraint]:
    """The restraints of a stage; to be called before a resume point is restored, while the weights are the start's."""
    method, team = stage.method, optimiser.team
    restraints: list[Restraint] = []
    if method.l2 is not None:
        assert isinstance(optimiser, Optimiser)  # `refuse_whole_weights`
        start = optimiser.master.detach().clone()
        restraints.append(WeightPenalty(optimiser.master, method.l2.strength, start, team=team))
    if method.ewc is not None and stage.history:
        assert isinstance(optimiser, Optimiser)
        importance, anchor = (optimiser.flat(part) for part in read_importance(stage.history[-1].artefacts))
        restraints.append(WeightPenalty(optimiser.master, method.ewc.strength, anchor, importance, team))
    if method.lwf is not None:
        previous = load_policy(stage.parent, dtype=dtype, device=device)
        previous.model.requires_grad_(False)
        restraints.append(Distillation(policy, previous, method.lwf, stage, team))
    if adapter is not None and method.lora is not None and method.lora.orthogonality and stage.history:
        earlier = [read_down(before.artefacts / ADAPTER_NAME) for before in stage.history]
        restraints.append(Orthogonality(adapter, earlier, method.lora.orthogonality, team))
    return restraints
