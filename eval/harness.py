"""Evaluate one checkpoint: answers in every prompt style, scored by the functions that give the reward.

Rows are read in order and answered in fixed batches. A batch is on the disk before the next one is asked, and a file of
records is there only whole (`eval.work`), so a killed evaluation goes on with the next missing batch and ends in the
same bits. What is there already is asked no more: records belong to the checkpoint, the data and the contract that
``reads.json`` and the records themselves name, and others are refused.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cpt_rft.checkpoint import EncodedPrompt, Policy, encode_prompts, load_policy
from cpt_rft.config.contracts import CONTRACTS, Decoding, Scorer
from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import read_split
from cpt_rft.data.picture import Picture
from cpt_rft.engines.local.generate import Completion, generate
from cpt_rft.engines.local.runtime import keep_freed_memory
from cpt_rft.errors import DataError
from cpt_rft.files import hash_tree, read_json, sha256_file, tree_sha256, write_json_atomic
from cpt_rft.prompts import Style, target_text, user_text
from cpt_rft.scoring import Score
from cpt_rft.seeds import derive_seed
from eval.backends import Backend, BackendError, Question, reader
from eval.contract import Contract, asked_vision, evaluation_contract, fingerprint
from eval.forced import Forced, teacher_forced
from eval.records import (
    VERSION,
    Record,
    RecordError,
    read_records,
    record_of,
    record_path,
    records_text,
    refuse_mixed,
    write_contract,
)
from eval.scorers import score_under
from eval.work import Work, work_path

READS_NAME = "reads.json"
#: Called with rows done, rows in all, and what is being answered.
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Job:
    """One file of records to be made.

    Attributes:
        task: Task or general ability.
        style: Prompt style.
        decoding: How the answers come about.
        out: Directory of the records.
        sampled: Whether these are the base model's samples, which have a file of their own.
    """

    task: str
    style: Style
    decoding: Decoding
    out: Path
    sampled: bool = False

    @property
    def path(self) -> Path:
        """The file."""
        return record_path(self.out, self.task, self.style, sampled=self.sampled)


@dataclass(frozen=True)
class Subject:
    """A checkpoint under evaluation; it is loaded only when something is left to answer.

    Attributes:
        directory: A Hugging Face directory.
        config: Split, rows, batch size, limits, scorer.
        prompt_preset: Name of the prompts.
        device: Where the model runs.
        backend: Who writes the answers, if not this process.
    """

    directory: Path
    config: EvaluationConfig
    prompt_preset: str
    device: str = "cpu"
    backend: Backend | None = None

    @cached_property
    def policy(self) -> Policy:
        """The loaded model; without its weights where a back end has them."""
        dtype, vision = getattr(torch, self.config.dtype), asked_vision(self.directory, self.config)
        if self.backend is not None:
            return reader(self.directory, vision)
        if self.device == "cpu":
            keep_freed_memory()
        return load_policy(self.directory, dtype=dtype, device=self.device, vision=vision)

    @cached_property
    def sha256(self) -> str:
        """The hash of all its files, as manifests have it."""
        return tree_sha256(hash_tree(self.directory))


def evaluate_checkpoint(
    checkpoint: Path,
    data: Mapping[str, Path],
    out: Path,
    config: EvaluationConfig,
    prompt_preset: str,
    *,
    samples: int = 0,
    device: str = "cpu",
    backend: Backend | None = None,
    progress: Progress = _silent,
) -> None:
    """Answer and score every row of every task in every style; write records under ``out``.

    Args:
        checkpoint: A Hugging Face directory.
        data: Parquet file by task or general ability.
        out: Directory of the records; files and batches already whole of the same key are kept.
        config: Contract, split, rows, styles, batch size and limits.
        prompt_preset: Name of the prompts.
        samples: Also draw this many samples a row at temperature 1 (the base model), general abilities excepted.
        device: Where the model runs.
        backend: Who writes the answers, if not this process.
        progress: Told after every batch.

    Raises:
        BackendError: The back end fails, saw another prompt, or cannot do what the contract asks.
        RecordError: ``out`` holds records of another checkpoint, of another contract or of other rows.
    """
    decoding = CONTRACTS[config.contract].decoding
    jobs = [Job(task, style, decoding, out) for task in data for style in config.styles]
    if samples:
        drawn, tasks = Decoding(temperature=1.0, samples=samples), [task for task in data if task not in config.general]
        jobs += [Job(task, style, drawn, out, sampled=True) for task in tasks for style in config.styles]
    do_jobs(Subject(checkpoint, config, prompt_preset, device, backend), jobs, data, progress=progress)


def do_jobs(
    subject: Subject,
    jobs: Sequence[Job],
    data: Mapping[str, Path],
    *,
    progress: Progress = _silent,
    finished: Callable[[Job, float], None] = lambda job, seconds: None,
) -> None:
    """Make every file of records that is not there yet; see `evaluate_checkpoint`.

    Args:
        subject: The checkpoint and how it is asked.
        jobs: The files.
        data: Parquet file by task or general ability.
        progress: Told after every batch.
        finished: Told every file that was made, and the seconds that its answers took, loading left out.
    """
    rows = {task: _rows(path, task, subject.config) for task, path in data.items()}
    reads = {task: _read(subject, data[task], rows[task]) for task in data}
    for out in dict.fromkeys(job.out for job in jobs):
        _note_reads(out, reads)
    total = sum(len(rows[job.task]) * job.decoding.samples for job in jobs)
    done = 0

    def batch_done(job: Job, count: int) -> None:
        nonlocal done
        done += count * job.decoding.samples
        progress(done, total, f"{job.task} {job.style}")

    for job in jobs:
        contract = evaluation_contract(subject.directory, subject.config, subject.prompt_preset, job.decoding)
        if job.path.exists():
            _check_finished(rows[job.task], job, contract)
            work_path(job.path).unlink(missing_ok=True)  # of a process killed right after it published
            batch_done(job, len(rows[job.task]))
            continue
        name = write_contract(job.out, contract)
        seconds = _do_job(subject, job, rows[job.task], {**reads[job.task], "contract": name}, batch_done)
        finished(job, seconds)


def _do_job(
    subject: Subject, job: Job, rows: Sequence[Example], read: Mapping[str, Any], done: Callable[[Job, int], None]
) -> float:
    """Make one file of records, or go on with it; returns the seconds that its answers took, in all its parts."""
    config = subject.config
    key = {**read, "task": job.task, "style": job.style, "batch_size": config.batch_size, "records": VERSION}
    batches = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    policy = subject.policy
    with Work(job.path, key) as work:
        for number, batch in enumerate(batches, start=1):
            if number > len(work.batches):
                started = time.perf_counter()
                text = records_text(_answer(subject, policy, batch, job, read["contract"]))
                commit = work.publish if number == len(batches) else work.add
                commit(text, time.perf_counter() - started)
            done(job, len(batch))
        return work.seconds


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


def _read(subject: Subject, path: Path, rows: Sequence[Example]) -> dict[str, Any]:
    """What is read for the scores of a task: who answers, which split, how many rows, which bytes."""
    return {
        "checkpoint": subject.sha256,
        "split": rows[0].split,
        "rows": len(rows),
        "sha256": sha256_file(path),
        **_shared_pictures(rows),
    }


def _note_reads(out: Path, reads: Mapping[str, Mapping[str, Any]]) -> None:
    """Every file that was read for scores leaves a trace beside them; another checkpoint's records are not touched."""
    path = out / READS_NAME
    known = read_json(path)
    for task, read in reads.items():
        asked = read["checkpoint"]
        before = known.get(task, {}).get("checkpoint", asked)
        if before != asked and any(out.glob(f"{task}.*.jsonl")):
            raise RecordError(
                f"{out} holds records of {task} by another checkpoint ({before[:12]}, this is {asked[:12]}).",
                "evaluate into another directory, or delete them",
            )
    if {**known, **reads} != known:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**known, **reads})


def _shared_pictures(rows: Sequence[Example]) -> dict[str, list[int]]:
    """The pictures of each row by number, where rows share them: such rows are no independent examples."""
    seen: dict[tuple[bytes, ...], int] = {}
    numbers = [seen.setdefault(row.images, len(seen)) if row.images else -1 - place for place, row in enumerate(rows)]
    return {"pictures": numbers} if len(set(numbers)) < len(rows) else {}


def _check_finished(rows: Sequence[Example], job: Job, contract: Contract) -> None:
    """A file that exists must be exactly what this evaluation would make."""
    records, asked = read_records(job.path), fingerprint(contract)
    sources = {str(job.path): (records[0].contract, job.out), "the evaluation asked for": (asked, job.out)}
    refuse_mixed(sources, also={asked: contract})
    wanted = [(row.id, number) for row in rows for number in range(job.decoding.samples)]
    if [(record.id, record.sample) for record in records] != wanted:
        raise RecordError(
            f"{job.path} holds other rows than the data.", "delete it, or evaluate into another directory"
        )


def _answer(subject: Subject, policy: Policy, batch: Sequence[Example], job: Job, contract: str) -> list[Record]:
    config, decoding = subject.config, job.decoding
    texts = [(row.images, user_text(row, job.style, subject.prompt_preset)) for row in batch]
    prompts = encode_prompts(policy, texts, [row.id for row in batch])
    _refuse_long(batch, prompts, config.max_prompt_tokens)
    seeds = [derive_seed("samples", row.id, job.style) for row in batch] if decoding.temperature else None
    if subject.backend is not None:
        completions = _ask(subject, subject.backend, batch, texts, prompts, seeds, decoding)
    elif decoding.forced:
        forced = teacher_forced(policy, prompts, [target_text(row, job.style) for row in batch])
        return [_forced_record(row, job, said, contract) for row, said in zip(batch, forced, strict=True)]
    else:
        completions = generate(
            policy,
            prompts,
            group=decoding.samples,
            max_new_tokens=config.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seeds=seeds,
        )
    return [
        _record(policy, row, job, number, completion, config.scorer, contract)
        for row, group in zip(batch, completions, strict=True)
        for number, completion in enumerate(group)
    ]


def _ask(
    subject: Subject,
    backend: Backend,
    batch: Sequence[Example],
    texts: Sequence[tuple[Sequence[Picture], str]],
    prompts: Sequence[EncodedPrompt],
    seeds: Sequence[int] | None,
    decoding: Decoding,
) -> list[list[Completion]]:
    """The answers of a back end."""
    if decoding.forced:
        raise BackendError("Only the local back end can force a label on a model.", "leave --backend out")
    drawn: Sequence[int | None] = seeds or [None] * len(batch)
    questions = [
        Question(row.id, text, tuple(images), prompt, seed)
        for row, (images, text), prompt, seed in zip(batch, texts, prompts, drawn, strict=True)
    ]
    return backend.answer(subject.policy, questions, decoding, subject.config.max_new_tokens)


def _refuse_long(batch: Sequence[Example], prompts: Sequence[EncodedPrompt], limit: int | None) -> None:
    """Rather stop than leave a row out of one checkpoint's score."""
    for row, prompt in zip(batch, prompts, strict=True):
        if limit is not None and len(prompt.ids) > limit:
            raise DataError(
                f"Row {row.id}: its prompt takes {len(prompt.ids)} tokens, the contract allows {limit}.",
                "raise evaluation.max_prompt_tokens, lower evaluation.max_pixels, or drop the row",
            )


def _record(
    policy: Policy, row: Example, job: Job, number: int, completion: Completion, scorer: Scorer, contract: str
) -> Record:
    response = str(policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
    result = score_under(scorer, response, row, style=job.style, truncated=completion.finish == "length")
    return record_of(
        row,
        result,
        style=job.style,
        sample=number,
        response=response,
        tokens=len(completion.token_ids),
        finish=completion.finish,
        contract=contract,
    )


def _forced_record(row: Example, job: Job, said: Forced, contract: str) -> Record:
    text = said.said.strip().lower()
    form = 1.0  # the label's own
    result = Score(said.strict, said.lenient, form, text or None, "answered" if text else "no_answer")
    return record_of(
        row,
        result,
        style=job.style,
        sample=0,
        response=said.said,
        tokens=said.tokens,
        finish="stop",
        contract=contract,
    )
