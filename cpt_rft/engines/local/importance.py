"""How much the answers to a stage's task depend on each weight; left by a stage that is trained with EWC."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cpt_rft.algos.ewc import carried_fisher, fisher_diagonal, merged_penalty
from cpt_rft.algos.logprobs import token_logprobs
from cpt_rft.checkpoint import Policy, encode_prompts, fresh_directory, released_name, write_weights
from cpt_rft.config.restraints import Ewc
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import read_split
from cpt_rft.engines.base import ARTEFACTS_NAME, Stage
from cpt_rft.engines.local.generate import generate, suppression
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.objective import chunks
from cpt_rft.engines.local.packing import pack_blocks
from cpt_rft.prompts import user_text
from cpt_rft.seeds import derive_seed, python_random

IMPORTANCE_NAME, ANCHOR_NAME = "importance.safetensors", "anchor.safetensors"


def leave_importance(stage: Stage, policy: Policy, weights: Mapping[str, Tensor], settings: Ewc) -> None:
    """Write importance and anchor of the penalty that later stages are to be held by.

    Source: EWC, arXiv 1612.00796 section 2 (`cpt_rft.algos.ewc`).
    Differs from: the source estimates the Fisher information from labels or from classes drawn from the model; here
    from one answer a prompt, sampled from the model at temperature 1, so that no label enters and SFT and GRPO are
    held by the same quantity.

    Args:
        stage: The stage.
        policy: The policy, which takes on the weights.
        weights: The float32 weights that the stage hands on, by name.
        settings: Rows and length.
    """
    device = policy.model.device
    weights = {name: weight.to(device) for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            weight.copy_(weights[name])
    rows = [row for path in stage.data for row in read_split(path)]
    chosen = python_random("importance", *stage.seed_path).sample(rows, min(settings.rows, len(rows)))
    fisher = fisher_diagonal(_scores(stage, policy, chosen, settings.max_new_tokens))
    if stage.history:
        left = read_importance(stage.history[-1].artefacts)
        before, anchor = ({name: part[released_name(name)].to(device) for name in weights} for part in left)
        if settings.gamma is None:
            fisher, weights = merged_penalty(before, anchor, fisher, weights)
        else:
            fisher = carried_fisher(before, fisher, gamma=settings.gamma)
    with fresh_directory(stage.directory / ARTEFACTS_NAME) as partial:
        write_weights(partial / IMPORTANCE_NAME, fisher)
        write_weights(partial / ANCHOR_NAME, weights)


def read_importance(artefacts: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importance and anchor of every weight, under the released names."""
    return load_file(artefacts / IMPORTANCE_NAME), load_file(artefacts / ANCHOR_NAME)


def _scores(stage: Stage, policy: Policy, rows: Sequence[Example], max_new_tokens: int) -> Iterator[dict[str, Tensor]]:
    """The gradient of the log-likelihood of one sampled answer to each row."""
    names, weights = zip(*policy.model.named_parameters(), strict=True)
    network = Network(policy.model)
    banned = suppression(policy, network.device)
    texts = [(row.images, user_text(row, stage.method.style, stage.prompt_preset)) for row in rows]
    prompts = encode_prompts(policy, texts, [row.id for row in rows])
    seeds = [derive_seed(*stage.seed_path, "importance", index) for index in range(len(rows))]
    for part in chunks(list(zip(prompts, seeds, strict=True)), stage.method.micro_batch):
        asked, drawn = [prompt for prompt, _ in part], [seed for _, seed in part]
        groups = generate(policy, asked, max_new_tokens=max_new_tokens, temperature=1.0, seeds=drawn)
        for prompt, (answer,) in zip(asked, groups, strict=True):
            contexts = network.contexts([prompt])
            blocks = pack_blocks(contexts, [[answer.token_ids]])
            logits_NV = network.logits(contexts, blocks).float() + banned
            likelihood = token_logprobs(logits_NV, blocks.targets).sum()
            yield dict(zip(names, torch.autograd.grad(likelihood, weights, materialize_grads=True), strict=True))
