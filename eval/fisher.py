"""The Fisher meter: what an SFT and an RFT update from a stage's start, on the same prompts, risk on the old tasks.

Source: paper 1 (arXiv 2507.05386 versions 2 to 4): R(g) = g'Fg, with F the Fisher information of the model that learned
the old tasks, and the claim that the RFT update's risk is the reward variance times that of the SFT update. Differs
from: F is neither approximated by its diagonal (which stands beside) nor taken at labels; only products with single
gradients are formed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch import Tensor

from cpt_rft.algos.drift import clustered_ratio
from cpt_rft.algos.ewc import fisher_diagonal
from cpt_rft.algos.fisher import diagonal_fisher_risk
from cpt_rft.algos.grpo import group_advantages
from cpt_rft.checkpoint import EncodedPrompt
from cpt_rft.config.schema import FisherConfig
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import Completion, end_token_ids
from cpt_rft.engines.local.scores import score_functions
from cpt_rft.prompts import target_text
from cpt_rft.scoring import reward, score
from eval.asked import Model, first_rows
from eval.meters import UPDATES, Json, finished, fisher_path, fisher_terms, keep


def measure_fisher(
    start: Model,
    new: Mapping[str, tuple[Path, str]],
    old: Mapping[str, tuple[Path, str]],
    directory: Path,
    config: FisherConfig,
) -> None:
    """Measure the risk of both updates at a stage's start, unless that is done.

    Args:
        start: The model at the start of the stage.
        new: By task of the stage its training rows, a file and their hash; only the first task is used.
        old: The same of the dev rows of the tasks learned before; at least one.
        directory: Where the file goes.
        config: Sizes.

    Raises:
        CheckpointError: The model is missing or broken.
    """
    hashes = [{task: data for task, (_, data) in side.items()} for side in (new, old)]
    terms = fisher_terms(hashes[0], hashes[1], start.sha256, config, start.asking)
    path = fisher_path(directory)
    if finished(path, terms) is None:
        rows = first_rows(next(iter(new.values()))[0], config.rows)
        keep(path, terms, risks(start, rows, old_rows([file for file, _ in old.values()], config.scores), config.group))


def old_rows(files: Sequence[Path], count: int) -> list[Example]:
    """``count`` rows in turn from each file, so that every old task counts alike."""
    turns = zip_longest(*(first_rows(file, count) for file in files))
    return [row for row in chain.from_iterable(turns) if row is not None][:count]


@dataclass
class _Update:
    """Sums over the completions of an update.

    Attributes:
        products_K: Its scalar product with every score.
        direction_W: The update itself.
    """

    products_K: Tensor
    direction_W: Tensor

    def add(self, weights_U: Tensor, products_KU: Tensor, scores_UW: Tensor) -> None:
        """Add some completions with their weights."""
        self.products_K += products_KU @ weights_U.double()
        self.direction_W += weights_U.float() @ scores_UW


def risks(start: Model, rows: Sequence[Example], old: Sequence[Example], group: int) -> Json:
    """Risk of the three updates, and the paper's claim prompt by prompt."""
    scores_KW = fisher_scores(start, old)
    diagonal = fisher_diagonal({"all": each} for each in scores_KW)
    prompts = start.prompts(rows)
    groups = start.sample(prompts, rows, group, "fisher update")
    rewards_PG = torch.tensor(
        [[_reward(start, row, each) for each in some] for row, some in zip(rows, groups, strict=True)]
    )
    weights = {
        "rft": rewards_PG.double() - rewards_PG.double().mean(dim=1, keepdim=True),
        "grpo": group_advantages(rewards_PG.double()),
    }
    varying_P = weights["grpo"].any(dim=1)
    weights["rft"][~varying_P] = 0.0  # exactly, where the mean of equal rewards is rounded
    made = {name: _Update(torch.zeros(len(old)).double(), torch.zeros(scores_KW.shape[1])) for name in UPDATES}
    single = {"sft": [0.0] * len(rows), "rft": [0.0] * len(rows)}
    targets = _targets(start, rows)
    for place, (prompt, some) in enumerate(zip(prompts, groups, strict=True)):
        if targets is not None:
            each_UW, products_KU = _products(start, prompt, [targets[place]], scores_KW, banned=False)
            made["sft"].add(torch.ones(1), products_KU, each_UW)
            single["sft"][place] = float(products_KU.square().mean())
        if varying_P[place]:
            each_UW, products_KU = _products(start, prompt, [one.token_ids for one in some], scores_KW, banned=True)
            for name in ("rft", "grpo"):
                made[name].add(weights[name][place], products_KU, each_UW)
            squares_G = products_KU.square().mean(dim=0) * weights["rft"][place].square()
            # The mean was estimated from the same completions: their spread about it is too small by this factor.
            single["rft"][place] = float(squares_G.mean()) * group / (group - 1)
    tokens = {
        "sft": sum(map(len, targets or [])),
        **dict.fromkeys(("rft", "grpo"), sum(len(one.token_ids) for some in groups for one in some)),
    }
    return {
        "updates": {
            name: None if name == "sft" and targets is None else _risk(made[name], tokens[name], diagonal["all"])
            for name in UPDATES
        },
        "prompts": {
            "reward_variance": [float(value) for value in rewards_PG.double().var(dim=1, unbiased=True)],
            "sft": None if targets is None else single["sft"],
            "rft": single["rft"],
        },
    }


def fisher_scores(start: Model, rows: Sequence[Example]) -> Tensor:
    """Gradients (K, W) of the log-likelihood of one answer to each row, sampled from the model itself."""
    prompts = start.prompts(rows)
    size = start.asking.batch

    def sampled() -> Iterator[list[Completion]]:
        for place in range(0, len(rows), size):
            part = slice(place, place + size)
            yield from start.sample(prompts[part], rows[part], 1, "fisher score")

    return torch.cat(
        [
            score_functions(start.network, prompt, [group[0].token_ids], start.banned)
            for prompt, group in zip(prompts, sampled(), strict=True)
        ]
    )


def _products(
    start: Model, prompt: EncodedPrompt, answers: Sequence[list[int]], scores_KW: Tensor, *, banned: bool
) -> tuple[Tensor, Tensor]:
    """Gradients (U, W) of single answers, and their products (K, U) with the scores."""
    limit = start.banned if banned else None
    each_UW = score_functions(start.network, prompt, answers, limit)
    return each_UW, (scores_KW @ each_UW.T).double()


def _targets(start: Model, rows: Sequence[Example]) -> list[list[int]] | None:
    """What SFT would teach; none where the style needs rationales and a row has none."""
    if start.asking.style == "cot" and any(row.rationale is None for row in rows):
        return None
    end = int(end_token_ids(start.policy)[0])
    encode = start.policy.tokenizer.encode
    return [[*encode(target_text(row, start.asking.style), add_special_tokens=False), end] for row in rows]


def _reward(start: Model, row: Example, completion: Completion) -> float:
    style = start.asking.style
    found = score(
        start.policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        answer=row.answer,
        references=row.references,
        kind=row.kind,
        style=style,
        truncated=completion.finish == "length",
    )
    return reward(found, style)


def _risk(update: _Update, tokens: int, diagonal_W: Tensor) -> Json:
    """G'Fg with its interval over the sampled answers, by the diagonal, and the length of g."""
    squares_K = (update.products_K / tokens).square()
    direction_W = update.direction_W / tokens
    exact = clustered_ratio(squares_K, torch.ones_like(squares_K), torch.arange(len(squares_K)))
    return {
        "risk": [exact.value, exact.low, exact.high],
        "diagonal": diagonal_fisher_risk({"all": direction_W}, {"all": diagonal_W}),
        "squared_norm": float(direction_W.double().square().sum()),
        "tokens": tokens,
    }
