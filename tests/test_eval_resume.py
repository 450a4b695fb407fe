"""A killed evaluation goes on at the batch and ends in the same bits; nothing is asked twice, of anyone."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.parquet import write_split
from cpt_rft.miniature.world import make_rows
from eval.backends import Backend
from eval.backends.openai import OpenAi
from eval.backends.vllm import Vllm
from eval.harness import evaluate_checkpoint
from eval.records import RecordError, record_path
from eval.work import Work, work_path
from tests.helpers.chat_server import Server, served
from tests.helpers.engine import make_base
from tests.helpers.tiny_run import in_child, kill_at_write
from tests.test_eval_backends import SMALL, VLLM_ENV, engine_python

TASKS = ("mini_gqa", "mini_mmlu_pro")  # one with pictures, one without
ROWS, BATCH = 8, 3
BATCHES = 3


def silent(done: int, total: int, what: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """A checkpoint with opinions and a file of rows a task."""

    base: Path
    data: dict[str, Path]

    def evaluate(self, out: Path, *, progress: Callable[[int, int, str], None] = silent, **changes: Any) -> None:
        backend, tasks = changes.pop("backend", None), changes.pop("tasks", TASKS)
        samples, base = changes.pop("samples", 0), changes.pop("base", self.base)
        config = {"max_new_tokens": 4, "batch_size": BATCH, "styles": ("direct",), "general": TASKS[1:], **changes}
        evaluate_checkpoint(
            base,
            {task: self.data[task] for task in tasks},
            out,
            EvaluationConfig.model_validate(config),
            "miniature",
            samples=samples,
            backend=backend,
            progress=progress,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("resume")
    data = {task: folder / f"{task}.parquet" for task in TASKS}
    for task, path in data.items():
        write_split(path, make_rows(task, "test", ROWS, seed=0))
    return Place(make_base(folder / "base", scale=3.0), data)


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An evaluation that nothing disturbed, with samples."""
    out = tmp_path_factory.mktemp("whole")
    place.evaluate(out, samples=2)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def killed_after(place: Place, out: Path, batches: int, **changes: Any) -> None:
    """An evaluation in a child process that kills itself once so many batches were reported."""
    left = batches

    def report(done: int, total: int, what: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: place.evaluate(out, progress=report, **changes)) == -signal.SIGKILL


@pytest.mark.parametrize("batches", [1, 5, 7])
def test_killed_it_goes_on_at_the_batch_and_ends_in_the_same_bits(
    place: Place, whole: dict[str, bytes], tmp_path: Path, batches: int
) -> None:
    killed_after(place, tmp_path, batches, samples=2)
    files, within = divmod(batches, BATCHES)
    assert len(list(tmp_path.glob("*.jsonl"))) == files
    [work] = tmp_path.glob("*.partial")
    assert len(work.read_bytes().splitlines()) == 1 + within
    seen: list[int] = []
    place.evaluate(tmp_path, samples=2, progress=lambda done, total, what: seen.append(done))
    assert contents(tmp_path) == whole
    assert len(seen) == files + BATCHES * (3 - files)
    assert seen == sorted(seen) and seen[-1] == ROWS * 4


@pytest.mark.parametrize("number", [5, 6, 7, 9])
def test_killed_before_a_write_it_ends_in_the_same_bits(
    place: Place, whole: dict[str, bytes], tmp_path: Path, number: int
) -> None:
    def work() -> None:
        kill_at_write(number, tmp_path / "out")
        place.evaluate(tmp_path / "out", samples=2)

    assert in_child(work) == -signal.SIGKILL
    place.evaluate(tmp_path / "out", samples=2)
    assert contents(tmp_path / "out") == whole


@pytest.fixture(scope="module")
def shared_server(place: Place) -> Any:
    with served(place.base) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.bodies = []
    return shared_server


def asked_rows(server: Server) -> list[str]:
    """What each request said, pictures included."""
    return sorted(json.dumps(body["messages"]) for body in server.bodies)


def test_a_server_is_asked_each_row_once_however_often_its_client_is_killed(
    place: Place, whole: dict[str, bytes], tmp_path: Path, server: Server
) -> None:
    backend = OpenAi(server.url, "base", concurrency=2)
    place.evaluate(tmp_path / "once", backend=backend)
    once, server.bodies = asked_rows(server), []
    assert len(once) == 2 * ROWS
    for reports, asked in ((2, 2 * BATCH), (4, ROWS + BATCH), (3, ROWS + 2 * BATCH)):  # a finished file is one report
        killed_after(place, tmp_path / "out", reports, backend=backend)
        assert len(server.bodies) == asked
    place.evaluate(tmp_path / "out", backend=backend)
    assert asked_rows(server) == once
    names = {record_path(tmp_path, task, "direct").name for task in TASKS}
    assert names == {path.name for path in (tmp_path / "out").glob("*.jsonl")}
    assert all((tmp_path / "out" / name).read_bytes() == whole[name] for name in names)


def test_another_task_later_is_all_that_is_asked(place: Place, tmp_path: Path, server: Server) -> None:
    backend = OpenAi(server.url, "base")
    place.evaluate(tmp_path, backend=backend, tasks=TASKS[:1])
    before, server.bodies = contents(tmp_path), []
    place.evaluate(tmp_path, backend=backend)
    pictures = [
        part for body in server.bodies for m in body["messages"] for part in m["content"] if "image_url" in part
    ]
    assert (len(server.bodies), pictures) == (ROWS, [])
    server.bodies = []
    place.evaluate(tmp_path, backend=backend, tasks=TASKS[::-1])
    assert server.bodies == []
    name = record_path(tmp_path, TASKS[0], "direct").name
    assert contents(tmp_path)[name] == before[name]


def test_another_checkpoints_records_are_refused(place: Place, tmp_path: Path) -> None:
    out, other = tmp_path / "out", make_base(tmp_path / "other", seed=1, scale=3.0)
    place.evaluate(out, tasks=TASKS[:1])
    before = contents(out)
    with pytest.raises(RecordError, match="holds records of mini_gqa by another checkpoint"):
        place.evaluate(out, base=other)
    assert contents(out) == before
    place.evaluate(out, base=other, tasks=TASKS[1:])  # a stage may have a judge for each task
    reads = json.loads((out / "reads.json").read_text())
    assert reads[TASKS[0]]["checkpoint"] != reads[TASKS[1]]["checkpoint"]


@pytest.mark.parametrize("change", ["base", "batch_size"])
def test_batches_of_other_work_are_not_taken_up(place: Place, tmp_path: Path, change: str) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    killed_after(place, out, 2, tasks=TASKS[:1])
    changes = {"base": make_base(tmp_path / "base", seed=1, scale=3.0), "batch_size": 2}
    for where in (out, again):
        place.evaluate(where, tasks=TASKS[:1], **{change: changes[change]})
    name = record_path(out, TASKS[0], "direct").name
    assert contents(out)[name] == contents(again)[name]
    assert not list(out.glob("*.partial"))


KEY = {"checkpoint": "a", "rows": 3}
PARTS = ("one\n", "tw\u2028o\n", "three\n")


def work_of(path: Path, parts: int) -> bytes:
    with Work(path, KEY) as work:
        for part in PARTS[:parts]:
            work.add(part, 0.5)
    return work_path(path).read_bytes()


def test_a_tail_cut_anywhere_is_dropped_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    text = work_of(path, 2)
    ends = [len(b"".join(text.splitlines(keepends=True)[:lines])) for lines in (1, 2, 3)]
    for cut in range(len(text) + 1):
        work_path(path).write_bytes(text[:cut])
        with Work(path, KEY) as work:
            whole = sum(cut >= end for end in ends[1:])
            assert work.batches == list(PARTS[:whole]), cut
            assert work.seconds == 0.5 * whole
            for part in PARTS[whole:2]:
                work.add(part, 0.5)
        assert work_path(path).read_bytes() == text, cut


def test_noise_after_a_batch_is_dropped(tmp_path: Path) -> None:
    """A machine that goes down may leave a line of the right length and no content."""
    path = tmp_path / "records.jsonl"
    text = work_of(path, 1)
    work_path(path).write_bytes(text + bytes(400) + b"\n" + text.splitlines(keepends=True)[1])
    with Work(path, KEY) as work:
        assert work.batches == [PARTS[0]]
        work.add(PARTS[1], 0.5)
        assert work_path(path).read_bytes().startswith(text) and b"\0" not in work_path(path).read_bytes()
        work.publish(PARTS[2], 0.5)
    assert path.read_text(encoding="utf-8") == "".join(PARTS)
    assert work.seconds == 1.5
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_work_of_another_key_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    work_of(path, 2)
    with Work(path, {**KEY, "checkpoint": "b"}) as work:
        assert work.batches == []


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Work(path, KEY) as late, Work(path, KEY) as work:
        work.add(PARTS[0], 0.5)
        with pytest.raises(RecordError, match="is being made by another process"):
            late.add(PARTS[0], 0.5)
        with pytest.raises(RecordError, match="is being made by another process"), Work(path, KEY):
            pass
    with Work(path, KEY) as work:
        assert work.batches == [PARTS[0]]


@pytest.mark.full  # 45 s
def test_killed_beside_vllm_it_goes_on_at_the_batch(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    for key, value in VLLM_ENV.items():
        monkeypatch.setenv(key, value)

    def engine() -> Backend:
        return Vllm(place.base, python=engine_python(), longest=256, engine=SMALL)

    killed_after(place, tmp_path, 2, backend=engine())
    [work] = tmp_path.glob("*.partial")
    before = work.read_bytes()
    assert len(before.splitlines()) == 3
    backend = engine()
    try:
        place.evaluate(tmp_path, backend=backend)
    finally:
        backend.close()
    done = record_path(tmp_path, TASKS[0], "direct").read_bytes()
    assert done.startswith("".join(json.loads(line)["text"] for line in before.splitlines()[1:]).encode())
    assert all(done == whole[name] for name, done in contents(tmp_path).items() if name.endswith(".jsonl"))
