"""What a run cost, from its training logs and records: tokens, seconds, memory and energy where they were read."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.records import read_records, record_path
from eval.runs import Chain, Run

#: Keys of a log line that add up over a run.
SUMMED = ("tokens", "seconds", "energy_joules")
#: Keys whose largest value counts.
LARGEST = ("memory_bytes",)


def chain_tokens(run: Run, chain: Chain) -> float:
    """Target or completion tokens in the loss of a chain; prompts are not counted."""
    return sum(float(line.get("tokens") or 0) for stage in chain.stages for line in run.train_log(stage))


def costs(run: Run, chains: Sequence[Chain]) -> dict[str, Any]:
    """The ledger of a method, summed over its chains; what no log holds is none.

    Steps, tokens, seconds and energy are of training; ``answers`` and ``answer_tokens`` are of evaluation.
    """
    lines = [line for chain in chains for stage in chain.stages for line in run.train_log(stage)]
    records = [
        record
        for chain in chains
        for stage in chain.stages
        for task, style in run.wanted()
        for record in read_records(record_path(stage / "eval", task, style))
    ]
    return {
        "chains": len(chains),
        "steps": len(lines) or None,
        "examples": _examples(run, chains),
        **{key: _total(lines, key) for key in SUMMED},
        **{
            key: max((float(line[key]) for line in lines if line.get(key) is not None), default=None) for key in LARGEST
        },
        "answers": len(records),
        "answer_tokens": sum(record.tokens for record in records),
    }


def _total(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [float(line[key]) for line in lines if line.get(key) is not None]
    return sum(found) if found else None


def _examples(run: Run, chains: Sequence[Chain]) -> int | None:
    """Prompts that were trained on, each as often as it came: steps times prompts a step."""
    steps = [
        len(run.train_log(stage)) * run.experiment.methods[chain.method].prompts_per_step
        for chain in chains
        for stage in chain.stages
    ]
    return sum(steps) or None
