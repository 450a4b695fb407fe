"""Evaluate one checkpoint: greedy answers in every prompt style, scored by the functions that give the reward.

Rows are read in order and answered in fixed batches; the records of a (task, style) are written whole once its last
batch is scored, so a killed evaluation goes on with the next missing file.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import read_split
from cpt_rft.engines.local.generate import Completion, generate
from cpt_rft.errors import DataError
from cpt_rft.files import sha256_file, write_json_atomic
from cpt_rft.prompts import Style, user_text
from cpt_rft.scoring import score
from cpt_rft.seeds import derive_seed
from eval.contract import Contract, evaluation_contract, fingerprint
from eval.records import Record, RecordError, read_records, record_path, refuse_mixed, write_contract, write_records

READS_NAME = "reads.json"
#: Called with rows done, rows in all, and what is being answered.
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class _Job:
    """One file of records to be made: a task in a style, greedy or sampled."""

    task: str
    style: Style
    samples: int  # 0: greedy

    @property
    def repeats(self) -> int:
        return max(1, self.samples)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint that is loaded only when something is left to answer."""

    directory: Path
    dtype: str
    device: str

    @cached_property
    def policy(self) -> Policy:
        return load_policy(self.directory, dtype=getattr(torch, self.dtype), device=self.device)


def evaluate_checkpoint(
    checkpoint: Path,
    data: Mapping[str, Path],
    out: Path,
    config: EvaluationConfig,
    prompt_preset: str,
    *,
    samples: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress = _silent,
) -> None:
    """Answer and score every row of every task in every style; write records under ``out``.

    Args:
        checkpoint: A Hugging Face directory.
        data: Parquet file by task or general ability.
        out: Directory of the records; files already whole under the same contract and rows are kept.
        config: Split, rows, styles, batch size and limits.
        prompt_preset: Name of the prompts.
        samples: Also draw this many samples a row at temperature 1 (the base model), general abilities excepted.
        dtype: Floating type of the model, part of the contract.
        device: Where the model runs.
        progress: Told after every batch.

    Raises:
        RecordError: ``out`` holds records of another contract or of other rows.
    """
    held = _Checkpoint(checkpoint, dtype, device)
    jobs = [_Job(task, style, 0) for task in data for style in config.styles]
    if samples:
        jobs += [_Job(task, style, samples) for task in data for style in config.styles if task not in config.general]
    rows = {task: _rows(path, task, config) for task, path in data.items()}
    _note_reads(out, data, rows)
    total = sum(len(rows[job.task]) * job.repeats for job in jobs)
    done = 0
    for job in jobs:
        contract = evaluation_contract(
            checkpoint,
            prompt_preset=prompt_preset,
            max_new_tokens=config.max_new_tokens,
            dtype=dtype,
            temperature=1.0 if job.samples else 0.0,
            samples=job.repeats,
        )
        path = record_path(out, job.task, job.style, sampled=job.samples > 0)
        if path.exists():
            _check_finished(path, rows[job.task], job, contract)
            done += len(rows[job.task]) * job.repeats
            progress(done, total, f"{job.task} {job.style}")
        else:
            name = write_contract(out, contract)
            records: list[Record] = []
            for batch in _batches(rows[job.task], config.batch_size):
                records += _answer(held.policy, batch, job, config, prompt_preset, name)
                done += len(batch) * job.repeats
                progress(done, total, f"{job.task} {job.style}")
            write_records(path, records)


def _rows(path: Path, task: str, config: EvaluationConfig) -> list[Example]:
    rows = read_split(path)
    for row in rows:
        if row.task != task or row.split != config.split:
            raise DataError(
                f"{path}: row {row.id} is of {row.task}/{row.split}, not {task}/{config.split}.",
                "name the parquet file of this task and split",
            )
    chosen = rows[: config.rows]
    if not chosen:
        raise DataError(f"{path} has no rows.", "prepare the data again")
    return chosen


def _note_reads(out: Path, data: Mapping[str, Path], rows: Mapping[str, Sequence[Example]]) -> None:
    """Every file that was read for scores leaves a trace beside them: which split, how many rows, which bytes."""
    path = out / READS_NAME
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    read = {
        task: {"split": rows[task][0].split, "rows": len(rows[task]), "sha256": sha256_file(file)}
        for task, file in data.items()
    }
    if {**known, **read} != known:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**known, **read})


def _batches(rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _check_finished(path: Path, rows: Sequence[Example], job: _Job, contract: Contract) -> None:
    """A file that exists must be exactly what this evaluation would make."""
    records, asked = read_records(path), fingerprint(contract)
    sources = {str(path): (records[0].contract, path.parent), "the evaluation asked for": (asked, path.parent)}
    refuse_mixed(sources, also={asked: contract})
    wanted = [(row.id, number) for row in rows for number in range(job.repeats)]
    if [(record.id, record.sample) for record in records] != wanted:
        raise RecordError(f"{path} holds other rows than the data.", "delete it, or evaluate into another directory")


def _answer(
    policy: Policy, batch: Sequence[Example], job: _Job, config: EvaluationConfig, prompt_preset: str, contract: str
) -> list[Record]:
    prompts = encode_prompts(policy, [(row.images, user_text(row, job.style, prompt_preset)) for row in batch])
    completions = generate(
        policy,
        prompts,
        group=job.repeats,
        max_new_tokens=config.max_new_tokens,
        temperature=1.0 if job.samples else 0.0,
        seeds=[derive_seed("samples", row.id, job.style) for row in batch] if job.samples else None,
    )
    return [
        _record(policy, row, job, number, completion, contract)
        for row, group in zip(batch, completions, strict=True)
        for number, completion in enumerate(group)
    ]


def _record(policy: Policy, row: Example, job: _Job, number: int, completion: Completion, contract: str) -> Record:
    response = str(policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
    result = score(
        response,
        answer=row.answer,
        references=row.references,
        kind=row.kind,
        style=job.style,
        truncated=completion.finish == "length",
    )
    return Record(
        id=row.id,
        task=row.task,
        style=job.style,
        sample=number,
        response=response,
        tokens=len(completion.token_ids),
        finish=completion.finish,
        extracted=result.extracted,
        strict=result.strict,
        lenient=result.lenient,
        format=result.format,
        status=result.status,
        answer=row.answer,
        contract=contract,
    )
