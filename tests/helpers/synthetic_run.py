"""A finished run directory without any training: real data, real record files, scores of the real scorer.

Answers follow a simple law: an arm knows task j with a chance that rises when j is learned and then falls at every
later stage by the arm's own forgetting; every row has a threshold of its own, so that rows flip as a model's do.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cpt_rft.config.contracts import Decoding
from cpt_rft.config.schema import EvaluationConfig, Experiment
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import write_split
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import Style
from cpt_rft.scoring import score
from cpt_rft.seeds import python_random
from eval.contract import evaluation_contract
from eval.explain import relations
from eval.meters import PAIRS, UPDATES
from eval.records import Record, record_of, record_path, write_contract, write_records

TASKS = ("mini_scienceqa", "mini_textvqa", "mini_vizwiz", "mini_gqa")
GENERAL = ("mini_mmmu", "mini_mmlu_pro")


@dataclass(frozen=True)
class Arm:
    """How an arm learns and forgets, in chances of a right answer."""

    learned: float
    forgets: float
    general_loss: float


ARMS = {"sft": Arm(0.78, 0.07, 0.03), "grpo": Arm(0.76, 0.015, 0.005), "multitask": Arm(0.74, 0.0, 0.02)}
_METHODS = {
    "sft": {"kind": "sft", "style": "direct"},
    "grpo": {"kind": "grpo", "style": "cot", "group": 8, "max_new_tokens": 16},
    "multitask": {"kind": "sft", "style": "direct", "joint": True},
}


def experiment(tasks: tuple[str, ...], seeds: tuple[int, ...], rows: int, arms: tuple[str, ...]) -> Experiment:
    """The configuration that such a run would have."""
    common = {"lr": 2e-4, "prompts_per_step": 16, "micro_batch": 16}
    raw = {
        "name": "synthetic",
        "base_model": "base",
        "tasks": tasks,
        "seeds": seeds,
        "methods": {name: {"name": name, **common, **_METHODS[name]} for name in arms},
        "engine": {"name": "local"},
        "data": {"train": rows, "dev": rows, "test": rows},
        "evaluation": {"max_new_tokens": 16, "general": GENERAL, "base_samples": 4},
        "output": "runs/synthetic",
    }
    return Experiment.model_validate_json(json.dumps(raw))


def write_checkpoint_files(directory: Path, *, max_pixels: int = 12544) -> Path:
    """What a contract reads of a checkpoint."""
    directory.mkdir(parents=True)
    processor = {"min_pixels": 3136, "max_pixels": max_pixels, "patch_size": 14, "merge_size": 2, "resample": 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return directory


def write_run(
    directory: Path,
    *,
    tasks: tuple[str, ...] = TASKS,
    seeds: tuple[int, ...] = (0, 1, 2),
    rows: int = 40,
    arms: tuple[str, ...] = ("sft", "grpo", "multitask"),
) -> Path:
    """Write the run directory and return it; it need not outlive a power cut, so nothing is synced."""
    with mock.patch("os.fsync"):
        return _write_run(directory, tasks, seeds, rows, arms)


def _write_run(
    directory: Path, tasks: tuple[str, ...], seeds: tuple[int, ...], rows: int, arms: tuple[str, ...]
) -> Path:
    config = experiment(tasks, seeds, rows, arms)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config.model_dump_json(indent=1))
    checkpoint = write_checkpoint_files(directory / "base" / "checkpoint")
    writer = _Writer(
        checkpoint, config.evaluation, {name: make_rows(name, "test", rows, seed=0) for name in (*tasks, *GENERAL)}
    )
    for name, examples in writer.data.items():
        (directory / "data" / name).mkdir(parents=True)
        write_split(directory / "data" / name / "test.parquet", examples)
    writer.stage(directory / "base" / "eval", Arm(0.0, 0.0, 0.0), (), tasks, seed=0)
    writer.samples(directory / "base" / "eval", tasks, config.evaluation.base_samples)
    for name in arms:
        for seed in seeds:
            chain = directory / name / "order0" / f"seed{seed}"
            if config.methods[name].joint:
                _publish(chain / "1_multitask", name, seed, 1)
                writer.stage(chain / "1_multitask" / "eval", ARMS[name], tasks, tasks, seed=seed)
                continue
            for number, task in enumerate(tasks, start=1):
                _publish(chain / f"{number}_{task}", name, seed, number)
                writer.stage(chain / f"{number}_{task}" / "eval", ARMS[name], tasks[:number], tasks, seed=seed)
    return directory


def with_meters(results: dict[str, Any]) -> dict[str, Any]:
    """The results as if everything had been measured: all drift and risk grows as a stage's old tasks lose."""
    results = copy.deepcopy(results)
    for method in results["methods"].values():
        for seed in method["seeds"].values():
            for stage in seed["stages"]:
                lost = [-(stage[effect]["strict"] or 0.0) for effect in ("change", "bwt")]
                sides = ("new", "old") if stage["stage"] > 1 else ("new",)
                stage["drift"] = {
                    pair: {side: dict.fromkeys(("token", "sequence"), _span(lost["base" in pair])) for side in sides}
                    for pair in PAIRS
                }
                update = {"risk": _span(lost[0]), "diagonal": _span(lost[0])[0], "squared_norm": 2.0}
                update |= {"per_norm": _span(lost[0])[0] / 2}
                claim = {"reward_variance": 0.2, "sft": 10.0, "rft": 3.0, "predicted": 2.0}
                if len(sides) > 1:
                    stage["fisher"] = {**dict.fromkeys((*UPDATES, "own"), update), "claim": claim}
    return {**results, "explained": relations(results["methods"])}


def _span(lost: float) -> list[float]:
    value = float(2.0 ** (lost / 10))
    return [value, 0.8 * value, 1.2 * value]


def _publish(stage: Path, method: str, seed: int, number: int) -> None:
    (stage / "train").mkdir(parents=True)
    (stage / "manifest.json").write_text(json.dumps({"identity": {"method": method, "seed": seed}, "provenance": {}}))
    random = python_random("log", method, seed, number)
    with (stage / "train" / "log.jsonl").open("w") as stream:
        for step in range(1, 21):
            gain = 1 - 0.9**step
            line = {
                "step": step,
                "loss": round(1.2 - gain + 0.1 * random.random(), 4),
                "reward": round(0.4 + 0.4 * gain + 0.05 * random.random(), 4) if method == "grpo" else None,
                "accuracy": round(0.35 + 0.4 * gain + 0.05 * random.random(), 4) if method == "grpo" else None,
                "kl": round(0.02 * gain, 4) if method == "grpo" else None,
                "length": 9.0 if method == "grpo" else None,
                "grad_norm": round(1.0 + random.random(), 4),
                "lr": 2e-4,
                "seconds": round(0.5 + 0.01 * random.random(), 4),
            }
            stream.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class _Writer:
    checkpoint: Path
    config: EvaluationConfig
    data: dict[str, list[Example]]

    def stage(self, out: Path, arm: Arm, seen: tuple[str, ...], tasks: tuple[str, ...], *, seed: int) -> None:
        """Records of one checkpoint on everything, in both styles."""
        contract = evaluation_contract(self.checkpoint, self.config, "miniature")
        name = write_contract(out, contract)
        for task, examples in self.data.items():
            for style in ("cot", "direct"):
                chances = self._chance(arm, task, seen, tasks)
                path = ("answer", task, style, len(seen), seed, arm.learned)
                records = [
                    self._record(row, style, chances, (*path, index), name) for index, row in enumerate(examples)
                ]
                write_records(record_path(out, task, style), records)

    def samples(self, out: Path, tasks: tuple[str, ...], count: int) -> None:
        """Sampled records of the base model."""
        drawn = Decoding(temperature=1.0, samples=count)
        contract = evaluation_contract(self.checkpoint, self.config, "miniature", drawn)
        name = write_contract(out, contract)
        for task in tasks:
            for style in ("cot", "direct"):
                records = [
                    self._record(row, style, (0.35, 0.6), ("sample", task, style, index, number), name, number)
                    for index, row in enumerate(self.data[task])
                    for number in range(count)
                ]
                write_records(record_path(out, task, style, sampled=True), records)

    def _chance(self, arm: Arm, task: str, seen: tuple[str, ...], tasks: tuple[str, ...]) -> tuple[float, float]:
        """Chances of the required form and of any form."""
        if task not in tasks:
            skill = 0.8 - arm.general_loss * len(seen)
            return skill - 0.1, skill
        if task not in seen:
            return 0.35, 0.65 - 0.2 * arm.forgets * len(seen)
        since = 0 if len(seen) == len(tasks) and arm.forgets == 0 else len(seen) - 1 - seen.index(task)
        strict = max(0.05, arm.learned - arm.forgets * since)
        return strict, min(0.95, strict + 0.02 + 0.5 * arm.forgets * since)

    def _record(
        self,
        row: Example,
        style: Style,
        chances: tuple[float, float],
        path: tuple[str | int | float, ...],
        contract: str,
        sample: int = 0,
    ) -> Record:
        settled = python_random("row", row.id).random()
        noise = python_random(*(str(part) for part in path)).gauss(0, 0.08)
        level = settled + noise
        others = [other.answer for other in self.data[row.task] if other.answer not in row.references]
        wrong = others[len(row.id) * 7 % len(others)] if others else "none of these"
        text = row.answer if level < chances[0] else f"{row.answer}." if level < chances[1] else wrong
        inside = text if style == "direct" else f"<think>the picture shows {text}</think>\\boxed{{{text}}}"
        truncated = level > 0.99
        response = "<think>the picture shows the picture" if truncated and style == "cot" else inside
        result = score(
            response, answer=row.answer, references=row.references, kind=row.kind, style=style, truncated=truncated
        )
        return record_of(
            row,
            result,
            style=style,
            sample=sample,
            response=response,
            tokens=len(response.split()) + 1,
            finish="length" if truncated else "stop",
            contract=contract,
        )
