"""The drift meter: how far a stage moved the model, from the base and from the stage's start, in both directions.

Sequences are sampled from the first model of a pair; at each of their positions the divergence from the second is exact
over the whole vocabulary. One file a task, so that a further task measures only itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpt_rft.algos.drift import Estimate, drift, position_divergence
from cpt_rft.config.schema import DriftConfig
from cpt_rft.data.example import Example
from cpt_rft.engines.local.scores import completion_logits
from eval.asked import Model, Progress, first_rows, refuse_strangers
from eval.meters import PAIRS, Json, drift_path, drift_terms, finished, keep


def measure_drift(
    models: Mapping[str, Model],
    data: Mapping[str, tuple[Path, str]],
    directory: Path,
    config: DriftConfig,
    *,
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Measure the drift on the prompts of every task that has no such file yet.

    Args:
        models: ``base``, ``start`` (of the stage) and ``model`` (after it), asked alike.
        data: By task a file of rows and the hash of the rows.
        directory: Where the files go.
        config: Rows and samples.
        progress: Told after every task.

    Raises:
        CheckpointError: A model is missing or broken, or they do not share their tokens.
    """
    asking = models["model"].asking
    hashes = {name: model.sha256 for name, model in models.items()}
    for done, (task, (path, data_hash)) in enumerate(data.items()):
        terms = drift_terms(task, data_hash, hashes, config, asking)
        out = drift_path(directory, task)
        if finished(out, terms) is None:
            for name in ("base", "start"):
                refuse_strangers(models[name], models["model"])
            cells = divergences(models, first_rows(path, config.rows), config.samples)
            keep(out, terms, {name: _with_estimates(cell) for name, cell in cells.items()})
        progress(done + 1, len(data), f"drift on {task}")


@torch.no_grad()
def divergences(models: Mapping[str, Model], rows: Sequence[Example], samples: int) -> dict[str, Json]:
    """By pair the sum of divergences and the tokens of each sequence, prompt after prompt.

    Where the stage starts at the base, both are one model and measured once.
    """
    same = models["base"].sha256 == models["start"].sha256
    others = ("base",) if same else ("base", "start")
    found: dict[str, Json] = {name: {"kl": [], "tokens": [], "prompts": []} for name in PAIRS}
    size = models["model"].asking.batch
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        prompts = models["model"].prompts(batch)
        for first, seconds in (("model", others), *((other, ("model",)) for other in others)):
            groups = models[first].sample(prompts, batch, samples, "drift")
            tokens = [[each.token_ids for each in group] for group in groups]
            logits = {name: completion_logits(models[name].network, prompts, tokens) for name in (first, *seconds)}
            lengths = [len(ids) for group in tokens for ids in group]
            for second in seconds:
                cell = found[f"{first}_to_{second}"]
                cell["kl"] += sums(logits[first], logits[second], models[first].banned, lengths)
                cell["tokens"] += lengths
                cell["prompts"] += [start + place for place in range(len(batch)) for _ in range(samples)]
    if same:
        found |= {"start_to_model": found["base_to_model"], "model_to_start": found["model_to_base"]}
    return found


def sums(first_NV: Tensor, second_NV: Tensor, banned_V: Tensor, lengths_S: Sequence[int]) -> list[float]:
    """The divergence of each sequence, summed over its positions.

    Args:
        first_NV: Logits of the model that wrote the sequences.
        second_NV: Logits of the other.
        banned_V: What neither may write, as logits to add.
        lengths_S: Tokens of each sequence.
    """
    positions_N = position_divergence(first_NV + banned_V, second_NV + banned_V).double()
    return [float(part.sum()) for part in positions_N.split(list(lengths_S))]


def estimates(cells: Sequence[Json]) -> tuple[Estimate, Estimate]:
    """Drift a token and a sequence over the prompts of one or several tasks, with intervals over prompts."""
    kl = [value for cell in cells for value in cell["kl"]]
    tokens = [value for cell in cells for value in cell["tokens"]]
    prompts = [place * 1_000_000 + prompt for place, cell in enumerate(cells) for prompt in cell["prompts"]]
    return drift(torch.tensor(kl).double(), torch.tensor(tokens), torch.tensor(prompts))


def _with_estimates(cell: Json) -> Json:
    token, sequence = estimates([cell])
    return {"token": [*vars(token).values()], "sequence": [*vars(sequence).values()], **cell}
