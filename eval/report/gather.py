"""What the page shows beyond ``results.json``: training curves and flipped examples, from logs and records."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cpt_rft.data.example import IMAGE_TAG, Example
from cpt_rft.data.parquet import read_split
from cpt_rft.seeds import python_random
from eval.records import Record, read_records, record_path
from eval.runs import Chain, Run

#: Keys of the training log that are drawn, with their names and the factor to percent.
CURVES = {
    "loss": ("supervised loss", 1.0),
    "reward": ("reward", 1.0),
    "accuracy": ("rollout accuracy, %", 100.0),
    "format": ("rollout format, %", 100.0),
    "kl": ("KL to the reference", 1.0),
    "length": ("response length, tokens", 1.0),
    "truncated": ("truncated rollouts, %", 100.0),
    "zero_variance": ("groups without a signal, %", 100.0),
    "reward_variance": ("reward variance a prompt", 1.0),
    "grad_norm": ("gradient norm", 1.0),
    "grad_norm_right": ("gradient norm, all-right groups", 1.0),
    "grad_norm_mixed": ("gradient norm, mixed groups", 1.0),
    "grad_norm_wrong": ("gradient norm, all-wrong groups", 1.0),
}
_POINTS = 140


@dataclass(frozen=True)
class Curve:
    """One key of one method's training log over the whole sequence, averaged over its seeds.

    Attributes:
        method: Name of the method.
        points: (share of the sequence 0 to 1, value), at most some 140.
    """

    method: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Flip:
    """A row that was right after its task was learned and wrong at the end.

    Attributes:
        method: Name of the method.
        task: Task.
        seed: Seed, with its order, as in results.json.
        pictures: Data URIs.
        question: Problem without picture tags.
        answer: The label.
        before: Response right after learning.
        after: Response at the end.
        stage: Stage after which it was still right.
        kept: Whether the answer at the end is still right in some accepted form.
    """

    method: str
    task: str
    seed: str
    pictures: tuple[str, ...]
    question: str
    answer: str
    before: str
    after: str
    stage: int
    kept: bool


def curves(run: Run, chains: Sequence[Chain]) -> dict[str, list[Curve]]:
    """By key of the log the curve of every method that logs it."""
    found: dict[str, list[Curve]] = defaultdict(list)
    for method in dict.fromkeys(chain.method for chain in chains):
        logs = [[line for stage in c.stages for line in run.train_log(stage)] for c in chains if c.method == method]
        supervised = run.experiment.methods[method].kind == "sft"
        for key, (_, factor) in CURVES.items():
            if key == "loss" and not supervised:
                continue  # a policy-gradient loss measures nothing and would only stretch the axis
            series = [[float(line[key]) for line in log if line.get(key) is not None] for log in logs]
            length = min(len(one) for one in series)
            if length > 1:
                mean = factor * np.mean([one[:length] for one in series], axis=0)
                found[key].append(Curve(method, _thinned(mean)))
    return dict(found)


def _thinned(values: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Averages of neighbouring steps, at most `_POINTS` of them."""
    parts = np.array_split(values, min(_POINTS, len(values)))
    ends = np.cumsum([len(part) for part in parts])
    return tuple((float(end) / len(values), float(part.mean())) for end, part in zip(ends, parts, strict=True))


def flipped(run: Run, chains: Sequence[Chain], per_task: int) -> list[Flip]:
    """A fixed sample of right-to-wrong flips of the first seed of every sequential method, strict and native."""
    found: list[Flip] = []
    seen: set[str] = set()
    split = run.experiment.evaluation.split
    rows: dict[str, dict[str, Example]] = {}
    for chain in chains:
        if len(chain.stages) < 2 or chain.method in seen:
            continue
        seen.add(chain.method)
        evals = run.evals(chain)
        style = run.experiment.methods[chain.method].style
        for place, task in enumerate(chain.order[:-1], start=1):
            if task not in rows:
                rows[task] = {row.id: row for row in read_split(run.directory / "data" / task / f"{split}.parquet")}
            before, after = (read_records(record_path(where, task, style)) for where in (evals[place], evals[-1]))
            pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.strict >= 0.5 > a.strict]
            chosen = python_random("flips", chain.method, chain.key, task).sample(pairs, min(per_task, len(pairs)))
            found += [_flip(chain, rows[task][b.id], b, a, place) for b, a in chosen]
    return found


def _flip(chain: Chain, row: Example, before: Record, after: Record, place: int) -> Flip:
    return Flip(
        method=chain.method,
        task=row.task,
        seed=chain.key,
        pictures=tuple(_data_uri(picture) for picture in row.images),
        question=row.problem.replace(IMAGE_TAG, "").strip(),
        answer=row.answer,
        before=before.response,
        after=after.response,
        stage=place,
        kept=after.lenient >= 0.5,
    )


def _data_uri(picture: bytes) -> str:
    kind = Image.open(io.BytesIO(picture)).get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"
