"""Tries at every row before a stage trains: written in committed batches, then used to choose or to write its rows."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.config.engine import EasyR1Config
from cpt_rft.config.methods import MethodConfig
from cpt_rft.config.rollouts import CONTROLS
from cpt_rft.data.example import Example
from cpt_rft.engines.base import Source, Stage
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.objective import chunks
from cpt_rft.engines.local.team import ALONE, Team
from cpt_rft.files import write_json_atomic, write_text_atomic
from cpt_rft.methods.instances import KEPT_NAME, TRIES_NAME, Tried, answered, filtered, refuse_nothing
from cpt_rft.prompts import user_text
from cpt_rft.scoring import score
from cpt_rft.seeds import derive_seed
from cpt_rft.vision import VisionSpec

RIGHT_FROM = 0.5  # of the strict score; the same as for the kinds of groups in `observe`


class Tries(NamedTuple):
    """How often and how a row is tried."""

    number: int
    temperature: float
    max_new_tokens: int


class Response(NamedTuple):
    """One try: its text, and whether it ended by itself and not by the limit."""

    text: str
    ended: bool


#: The tries at each of some rows.
Attempt = Callable[[Sequence[Example]], list[list[Response]]]


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
    stage: Stage,
    rows: Mapping[str, Sequence[Example]],
    fingerprint: str,
    attempt: Attempt,
    team: Team = ALONE,
    *,
    tick: Callable[[int, int], None] = lambda done, total: None,
    keep_text: bool = False,
) -> dict[str, list[Example]]:
    """The rows that a stage trains on, by task: all of them, or what the tries at them leave.

    Args:
        stage: The stage.
        rows: All its rows, by task.
        fingerprint: Of everything that the tries depend on; tries with another one are made anew.
        attempt: Makes the tries that are not there yet.
        team: The processes that share the work.
        tick: Told the rows that are done, and how many there are.
        keep_text: Write down the text of every try, and whether it was right.

    Raises:
        DataError: They leave nothing.
    """
    tries = tries_of(stage.method)
    if tries is None:
        return {task: list(own) for task, own in rows.items()}
    everything = [row for task in sorted(rows) for row in rows[task]]
    tried = _Tried(stage, attempt, fingerprint, team, keep_text).all(everything, tick)
    kept = {task: _chosen(stage, rows[task], tried) for task in sorted(rows)}
    why, fix = _nothing(stage.method)
    refuse_nothing(stage.tasks, [row for own in kept.values() for row in own], why, fix)
    solvable = {task: sum(tried[row.id].correct > 0 for row in rows[task]) for task in kept}
    counts = {task: {"rows": len(rows[task]), "solvable": solvable[task], "kept": len(kept[task])} for task in kept}
    note = {"source": source_of(stage).label, "tasks": counts, "ids": _ids(kept.values())}
    if team.leads:
        write_json_atomic(stage.directory / KEPT_NAME, note | _controls(stage, rows, tried))
    return kept


def _ids(parts: Iterable[Sequence[Example]]) -> list[str]:
    return [row.id for own in parts for row in own]


def _controls(stage: Stage, rows: Mapping[str, Sequence[Example]], tried: Mapping[str, Tried]) -> dict[str, Any]:
    """The ids of the size-matched controls of a filter, so that other trainers can use them too."""
    settings = stage.method.filter
    if settings is None:
        return {}
    drawn = {
        control: [
            filtered(rows[task], tried, settings.model_copy(update={"control": control}), stage.seed)
            for task in sorted(rows)
        ]
        for control in CONTROLS
    }
    return {"controls": {control: _ids(parts) for control, parts in drawn.items()}}


def source_of(stage: Stage) -> Source:
    """Who makes the tries."""
    return stage.source or Source(stage.parent, "the start of the stage")


def leave_rollouts(stage: Stage, artefacts: Path) -> None:
    """Put what was tried, and what was kept, among what the stage leaves; nothing if nothing was tried."""
    if tries_of(stage.method) is not None:
        artefacts.mkdir(exist_ok=True)
        _, _, lines = (stage.directory / TRIES_NAME).read_text(encoding="utf-8").partition("\n")
        write_text_atomic(artefacts / TRIES_NAME, lines)
        write_text_atomic(artefacts / KEPT_NAME, (stage.directory / KEPT_NAME).read_text(encoding="utf-8"))


def clear_rollouts(stage: Stage) -> None:
    """Remove the work files of a stage that has left them."""
    for name in (TRIES_NAME, KEPT_NAME):
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

    def __init__(self, stage: Stage, attempt: Attempt, fingerprint: str, team: Team, keep_text: bool) -> None:
        self.stage, self.attempt, self.team, self.keep_text = stage, attempt, team, keep_text
        self.path = stage.directory / TRIES_NAME
        self.header = json.dumps({"fingerprint": fingerprint})

    def all(self, rows: Sequence[Example], tick: Callable[[int, int], None]) -> dict[str, Tried]:
        """The tries at every row, those that are there already and those that are missing."""
        size = self.stage.method.micro_batch
        lines = self.team.told(self._committed(len(rows), size) if self.team.leads else [])
        for part in chunks(rows[len(lines) :], size):
            tick(len(lines), len(rows))
            fresh = self.team.shared(self._batch, part)
            if self.team.leads:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in fresh))
                    file.flush()
                    os.fsync(file.fileno())
            lines += fresh
        tick(len(rows), len(rows))
        read = [json.loads(line) for line in lines]
        return {line["id"]: Tried(line["correct"], line.get("response")) for line in read}

    def _committed(self, rows: int, size: int) -> list[str]:
        """The lines of whole batches that are there; the file is cut to them, or begun."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        header, *lines = [*text.split("\n")[:-1]] or [""]  # what follows the last newline was cut short
        if header != self.header or (self.keep_text and lines and "texts" not in json.loads(lines[0])):
            lines = []
        if len(lines) < rows:
            lines = lines[: len(lines) // size * size]
        write_text_atomic(self.path, "\n".join([self.header, *lines, ""]))
        return lines

    def _batch(self, rows: Sequence[Example]) -> list[str]:
        """One line a row; the scorer is that of training."""
        lines = []
        for row, responses in zip(rows, self.attempt(rows), strict=True):
            right = [self._is_right(row, each) for each in responses]
            line: dict[str, Any] = {"id": row.id, "task": row.task, "correct": sum(right)}
            if self.stage.method.filter is None:
                pairs = zip(responses, right, strict=True)
                line["response"] = next((each.text for each, was_right in pairs if was_right and each.ended), None)
            if self.keep_text:
                line |= {"texts": [each.text for each in responses], "right": right}
            lines.append(json.dumps(line, ensure_ascii=False))
        return lines

    def _is_right(self, row: Example, response: Response) -> bool:
        graded = score(
            response.text,
            answer=row.answer,
            references=row.references,
            kind=row.kind,
            style=self.stage.method.style,
            truncated=not response.ended,
        )
        return graded.strict >= RIGHT_FROM


class LocalAttempt:
    """Tries by this process's own rollouts; the model is loaded with the first of them.

    Prompt and sampling are those of training. The seed depends on the row and the training seed and not on the method,
    so that arms that start from one model make the same tries.

    Args:
        stage: The stage.
        dtype: Arithmetic.
        device: Where.
    """

    def __init__(self, stage: Stage, dtype: torch.dtype, device: str) -> None:
        self.stage, self.dtype, self.device = stage, dtype, device
        self.policy: Policy | None = None

    @torch.no_grad()
    def __call__(self, rows: Sequence[Example]) -> list[list[Response]]:
        """The tries at each row."""
        stage, tries = self.stage, tries_of(self.stage.method)
        assert tries is not None  # it is asked only where there are tries
        if self.policy is None:
            checkpoint = source_of(stage).checkpoint
            vision = VisionSpec.read(checkpoint).with_limits(*stage.engine.pixel_limits)
            self.policy = load_policy(checkpoint, dtype=self.dtype, device=self.device, vision=vision)
        texts = [(row.images, user_text(row, stage.method.style, stage.prompt_preset)) for row in rows]
        groups = generate(
            self.policy,
            encode_prompts(self.policy, texts, [row.id for row in rows]),
            group=tries.number,
            max_new_tokens=tries.max_new_tokens,
            temperature=tries.temperature,
            top_p=stage.engine.top_p if isinstance(stage.engine, EasyR1Config) else 1.0,
            seeds=[derive_seed("instances", stage.seed, row.id) for row in rows],
        )
        decode = self.policy.tokenizer.decode
        return [
            [Response(decode(each.token_ids, skip_special_tokens=True), each.finish == "stop") for each in group]
            for group in groups
        ]
