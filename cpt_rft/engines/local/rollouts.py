"""Tries at every row before a stage trains: written in committed batches, then used to choose or to write its rows."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.config.methods import MethodConfig
from cpt_rft.data.example import Example
from cpt_rft.engines.base import Source, Stage
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.objective import chunks
from cpt_rft.engines.local.team import Team
from cpt_rft.files import write_json_atomic, write_text_atomic
from cpt_rft.methods.instances import KEPT_NAME, Tried, answered, filtered, refuse_nothing
from cpt_rft.prompts import user_text
from cpt_rft.scoring import score
from cpt_rft.seeds import derive_seed

WORK_NAME = "rollouts.jsonl"  # of the work directory; among the artefacts without its first line
RIGHT_FROM = 0.5  # of the strict score; the same as for the kinds of groups in `observe`


class Tries(NamedTuple):
    """How often and how a row is tried."""

    number: int
    temperature: float
    max_new_tokens: int


def tries_of(method: MethodConfig) -> Tries | None:
    """The tries that a method makes before it trains, with the sampling of its training if it has one; or none."""
    if method.kind == "sft" and method.rollouts is not None:
        return Tries(method.rollouts.samples, 1.0, method.rollouts.max_new_tokens)
    if method.filter is None:
        return None
    if method.kind == "grpo":
        return Tries(method.filter.rollouts, method.temperature, method.max_new_tokens)
    assert method.filter.max_new_tokens is not None  # the configuration says so
    return Tries(method.filter.rollouts, 1.0, method.filter.max_new_tokens)


def chosen_rows(
    stage: Stage, rows: Mapping[str, Sequence[Example]], fingerprint: str, dtype: torch.dtype, device: str, team: Team
) -> dict[str, list[Example]]:
    """The rows that a stage trains on, by task: all of them, or what the tries at them leave.

    Raises:
        DataError: They leave nothing.
    """
    tries = tries_of(stage.method)
    if tries is None:
        return {task: list(own) for task, own in rows.items()}
    everything = [row for task in sorted(rows) for row in rows[task]]
    tried = _Tried(stage, tries, fingerprint, team).all(everything, dtype, device)
    kept = {task: _chosen(stage, rows[task], tried) for task in sorted(rows)}
    why, fix = _nothing(stage.method)
    refuse_nothing(stage.tasks, [row for own in kept.values() for row in own], why, fix)
    solvable = {task: sum(tried[row.id].correct > 0 for row in rows[task]) for task in kept}
    counts = {task: {"rows": len(rows[task]), "solvable": solvable[task], "kept": len(kept[task])} for task in kept}
    ids = [row.id for own in kept.values() for row in own]
    source = source_of(stage)
    if team.leads:
        write_json_atomic(stage.directory / KEPT_NAME, {"source": source.label, "tasks": counts, "ids": ids})
    return kept


def source_of(stage: Stage) -> Source:
    """Who makes the tries."""
    return stage.source or Source(stage.parent, "the start of the stage")


def leave_rollouts(stage: Stage, artefacts: Path) -> None:
    """Put what was tried, and what was kept, among what the stage leaves; nothing if nothing was tried."""
    if tries_of(stage.method) is not None:
        artefacts.mkdir(exist_ok=True)
        _, _, lines = (stage.directory / WORK_NAME).read_text(encoding="utf-8").partition("\n")
        write_text_atomic(artefacts / WORK_NAME, lines)
        write_text_atomic(artefacts / KEPT_NAME, (stage.directory / KEPT_NAME).read_text(encoding="utf-8"))


def clear_rollouts(stage: Stage) -> None:
    """Remove the work files of a stage that has left them."""
    for name in (WORK_NAME, KEPT_NAME):
        (stage.directory / name).unlink(missing_ok=True)


def _chosen(stage: Stage, rows: Sequence[Example], tried: Mapping[str, Tried]) -> list[Example]:
    method = stage.method
    if method.kind == "sft" and method.rollouts is not None:
        return answered(rows, tried, source_of(stage).label)
    assert method.filter is not None
    return filtered(rows, tried, method.filter, stage.seed)


def _nothing(method: MethodConfig) -> tuple[str, str]:
    """Why nothing may be left, and what to do about it."""
    if method.filter is None:
        why = f"no row was got right in any of the tries of {method.name}.rollouts"
        return why, f"raise methods.{method.name}.rollouts.samples or max_new_tokens, or start from a better model"
    rule = method.filter.rule if method.filter.control is None else f"{method.filter.rule}, {method.filter.control}"
    why = f"the filter of {method.name} (rule {rule}) keeps no row"
    return why, f"raise methods.{method.name}.filter.rollouts, take another rule or control, or drop the filter"


class _Tried:
    """The file of tries: a line with the fingerprint of the stage, then one a row, whole batches at a time.

    A batch is a fixed run of the ordered rows, so that whoever goes on makes the same ones with the same bits.
    """

    def __init__(self, stage: Stage, tries: Tries, fingerprint: str, team: Team) -> None:
        self.stage, self.tries, self.team = stage, tries, team
        self.path = stage.directory / WORK_NAME
        self.header = json.dumps({"fingerprint": fingerprint})

    def all(self, rows: Sequence[Example], dtype: torch.dtype, device: str) -> dict[str, Tried]:
        """The tries at every row, those that are there already and those that are missing."""
        size = self.stage.method.micro_batch
        lines = self.team.told(self._committed(len(rows), size) if self.team.leads else [])
        policy = None
        for part in chunks(rows[len(lines) :], size):
            policy = policy or load_policy(source_of(self.stage).checkpoint, dtype=dtype, device=device)
            fresh = self.team.shared(partial(self._batch, policy), part)
            if self.team.leads:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in fresh))
                    file.flush()
                    os.fsync(file.fileno())
            lines += fresh
        read = [json.loads(line) for line in lines]
        return {line["id"]: Tried(line["correct"], line.get("response")) for line in read}

    def _committed(self, rows: int, size: int) -> list[str]:
        """The lines of whole batches that are there; the file is cut to them, or begun."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        header, *lines = [*text.split("\n")[:-1]] or [""]  # what follows the last newline was cut short
        if header != self.header:
            lines = []
        if len(lines) < rows:
            lines = lines[: len(lines) // size * size]
        write_text_atomic(self.path, "\n".join([self.header, *lines, ""]))
        return lines

    @torch.no_grad()
    def _batch(self, policy: Policy, rows: Sequence[Example]) -> list[str]:
        """One line a row. The prompt and the scorer are those of training; the seed depends on the row and the training
        seed and not on the method, so that arms that start from one model make the same tries.
        """
        method = self.stage.method
        texts = [(row.images, user_text(row, method.style, self.stage.prompt_preset)) for row in rows]
        groups = generate(
            policy,
            encode_prompts(policy, texts, [row.id for row in rows]),
            group=self.tries.number,
            max_new_tokens=self.tries.max_new_tokens,
            temperature=self.tries.temperature,
            seeds=[derive_seed("instances", self.stage.seed, row.id) for row in rows],
        )
        lines = []
        for row, group in zip(rows, groups, strict=True):
            texts_G = [policy.tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in group]
            pairs = zip(texts_G, group, strict=True)
            right_G = [self._is_right(row, text, each.finish == "length") for text, each in pairs]
            line: dict[str, Any] = {"id": row.id, "task": row.task, "correct": sum(right_G)}
            if method.filter is None:
                ended = zip(texts_G, right_G, group, strict=True)
                line["response"] = next((text for text, right, each in ended if right and each.finish == "stop"), None)
            lines.append(json.dumps(line, ensure_ascii=False))
        return lines

    def _is_right(self, row: Example, text: str, truncated: bool) -> bool:
        graded = score(
            text,
            answer=row.answer,
            references=row.references,
            kind=row.kind,
            style=self.stage.method.style,
            truncated=truncated,
        )
        return graded.strict >= RIGHT_FROM
