"""Back ends: the same prompts and pictures, token for token; the same answers; and what goes wrong on the way."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt_rft.checkpoint import encode_prompts
from cpt_rft.config.contracts import Decoding
from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.parquet import write_split
from cpt_rft.miniature.tasks import TASKS
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import user_text
from cpt_rft.vision import VisionSpec
from eval.__main__ import main as eval_main
from eval.backends import BackendError, Question, asked, check_seen, fingerprint, reader, resized, unexpanded
from eval.backends.openai import OpenAi
from eval.backends.vllm import Vllm
from eval.harness import evaluate_checkpoint
from eval.records import read_records, record_path
from tests.helpers.chat_server import Server, served
from tests.helpers.parity import differing

BASE = Path(__file__).resolve().parents[1] / "cpt_rft/miniature/base"
GREEDY = Decoding()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    rows = make_rows("mini_gqa", "test", 3, seed=0)
    texts = [(row.images, user_text(row, "direct", "miniature")) for row in rows]
    prompts = encode_prompts(reader(BASE, VisionSpec.read(BASE)), texts)
    return [Question(r.id, t, i, p) for r, (i, t), p in zip(rows, texts, prompts, strict=True)]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with served(BASE) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.bodies, shared_server.most = [], 0
    shared_server.fault = lambda count, reply: (200, reply)
    return shared_server


def client(server: Server, **changes: Any) -> OpenAi:
    return replace(OpenAi(server.url, "base", pause_s=0.01, retries=2), **changes)


def test_a_fingerprint_is_of_tokens_and_grid(questions: list[Question]) -> None:
    prints = [asked(question.prompt) for question in questions]
    assert len(set(prints)) == 3
    ids, grid = questions[0].prompt.ids.tolist(), [[1, 6, 6]]
    assert prints[0] == fingerprint(ids, grid)
    assert fingerprint(ids, [[1, 3, 12]]) != prints[0] != fingerprint([*ids[:-1], 0], grid)
    check_seen(questions[0], ids, grid, "it")
    with pytest.raises(BackendError, match=rf"{questions[0].id}: it saw another prompt .* first at 5"):
        check_seen(questions[0], [*ids[:5], -1, *ids[6:]], grid, "it")
    with pytest.raises(BackendError, match="another prompt"):
        check_seen(questions[0], ids, [[1, 3, 12]], "it")


def test_servers_get_one_pad_a_picture_and_a_picture_nobody_resizes_again(questions: list[Question]) -> None:
    spec = VisionSpec.read(BASE)
    policy = reader(BASE, spec)
    pad = policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids, short = questions[0].prompt.ids.tolist(), unexpanded(policy, questions[0].prompt)
    assert ids.count(pad) == 9
    assert short.count(pad) == 1
    assert [token for token in short if token != pad] == [token for token in ids if token != pad]
    small = spec.with_limits(3136, 56 * 56)
    data, grid = resized(small, questions[0].images[0], "a row")
    assert grid == (1, 4, 4)
    assert resized(small, data, "again") == (data, grid)


def test_a_server_answers_as_this_process_does(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "mini_gqa.parquet"
    write_split(data, make_rows("mini_gqa", "test", 6, seed=0))
    config = EvaluationConfig(rows=6, styles=("direct",), max_new_tokens=8)
    evaluate_checkpoint(BASE, {"mini_gqa": data}, tmp_path / "local", config, "miniature")
    arguments = [str(BASE), str(data), "--out", str(tmp_path / "served"), "--styles", "direct", "--max-new-tokens", "8"]
    served = ["--backend", "openai", "--url", f"{server.url}/", "--model", "base", "--concurrency", "2"]
    assert eval_main([*arguments, *served]) == 0
    one, other = (record_path(tmp_path / name, "mini_gqa", "direct") for name in ("local", "served"))
    assert one.read_bytes() == other.read_bytes()
    assert server.most <= 2
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["key"]) == ("base", 0.0, 8, None)
    assert len(body["logit_bias"]) == 5


def test_a_server_without_token_ids_is_checked_by_their_number(server: Server, questions: list[Question]) -> None:
    def plain(count: int, reply: dict[str, Any]) -> tuple[int, Any]:
        del reply["prompt_token_ids"], reply["choices"][0]["token_ids"]
        reply["usage"]["prompt_tokens"] += count > 3
        return 200, reply

    policy = reader(BASE, VisionSpec.read(BASE))
    whole = client(server, key="secret").answer(policy, questions, GREEDY, 8)
    assert {body["key"] for body in server.bodies} == {"Bearer secret"}
    server.bodies, server.fault = [], plain
    assert client(server).answer(policy, questions, GREEDY, 8) == whole
    with pytest.raises(BackendError, match=r"counts \d+ prompt tokens"):
        client(server).answer(policy, questions[:1], GREEDY, 8)


def test_what_passes_is_tried_again_and_what_does_not_is_not(server: Server, questions: list[Question]) -> None:
    policy, one = reader(BASE, VisionSpec.read(BASE)), questions[:1]
    server.fault = lambda count, reply: (503 if count < 3 else 200, reply)
    assert client(server).answer(policy, one, GREEDY, 4)
    assert len(server.bodies) == 3
    server.bodies, server.fault = [], lambda count, reply: (503, {"error": "busy"})
    with pytest.raises(BackendError, match=r"503 .*busy"):
        client(server).answer(policy, one, GREEDY, 4)
    assert len(server.bodies) == 3
    server.bodies, server.fault = [], lambda count, reply: (404, {"error": "no such model"})
    with pytest.raises(BackendError, match=rf"{one[0].id}: .*404 .*no such model"):
        client(server).answer(policy, one, GREEDY, 4)
    assert len(server.bodies) == 1
    server.fault = lambda count, reply: (200, {"choices": None, "usage": {"prompt_tokens": 1}})
    with pytest.raises(BackendError, match="no chat completion"):
        client(server).answer(policy, one, GREEDY, 4)
    server.fault = lambda count, reply: (time.sleep(0.5), (200, reply))[1]
    with pytest.raises(BackendError, match="timed out"):
        client(server, timeout_s=0.1, retries=0).answer(policy, one, GREEDY, 4)


def test_another_pixel_budget_at_the_server_is_noticed(server: Server, questions: list[Question]) -> None:
    policy = reader(BASE, VisionSpec.read(BASE).with_limits(3136, 56 * 56))
    texts = [(question.images, question.text) for question in questions]
    smaller = [replace(q, prompt=p) for q, p in zip(questions, encode_prompts(policy, texts), strict=True)]
    server.fault = lambda count, reply: (200, {**reply, "prompt_token_ids": questions[0].prompt.ids.tolist()})
    with pytest.raises(BackendError, match="another prompt"):
        client(server).answer(policy, smaller[:1], GREEDY, 4)


def test_no_server_and_no_vllm_are_one_clear_line(questions: list[Question], tmp_path: Path) -> None:
    policy = reader(BASE, VisionSpec.read(BASE))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(BackendError, match=r"gave no answer.*refused"):
        OpenAi(url, "base", retries=0).answer(policy, questions[:1], GREEDY, 4)
    engine = Vllm(BASE)
    with pytest.raises(BackendError, match="vLLM ended: ModuleNotFoundError: No module named 'vllm'"):
        engine.answer(policy, questions[:1], GREEDY, 4)
    engine.close()


def test_labels_are_forced_here_only(tmp_path: Path) -> None:
    data = tmp_path / "mini_gqa.parquet"
    write_split(data, make_rows("mini_gqa", "test", 2, seed=0))
    config = EvaluationConfig(styles=("direct",), max_new_tokens=1, contract="teacher_forced")
    with pytest.raises(BackendError, match="Only the local back end"):
        evaluate_checkpoint(BASE, {"mini_gqa": data}, tmp_path / "out", config, "miniature", backend=OpenAi("u", "m"))


# --- vLLM itself, in the environment that scripts/check_base.sh makes ---


def engine_python() -> str:
    """The interpreter with vLLM; the test fails where there is none, as `full` needs the environments."""
    root = Path(os.environ.get("CPT_RFT_ENVS", Path(__file__).resolve().parents[1] / ".envs"))
    found = sorted(path.parent for path in root.glob("vllm-*/ready"))
    if not found:
        pytest.fail(f"No vLLM below {root}. Fix: bash scripts/check_base.sh --only vllm, or set CPT_RFT_ENVS")
    return str(found[-1] / "bin" / "python")


VLLM_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "DO_NOT_TRACK": "1"}
SMALL = {"enforce_eager": True, "max_num_seqs": 64}


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """500 rows of seven tasks, answered here."""
    out = tmp_path_factory.mktemp("parity")
    rows = {task: make_rows(task, "test", 72, seed=0)[: 72 if n < 6 else 68] for n, task in enumerate(TASKS)}
    data = {}
    for task, examples in rows.items():
        data[task] = out / f"{task}.parquet"
        write_split(data[task], examples)
    config = EvaluationConfig(styles=("direct",), max_new_tokens=24)
    evaluate_checkpoint(BASE, data, out / "local", config, "miniature")
    return {"out": out, "rows": rows, "data": data, "config": config}


def _same(answered: dict[str, Any], name: str, record_property: Callable[[str, object], None]) -> None:
    count = same = 0
    for task, rows in answered["rows"].items():
        local, other = (read_records(record_path(answered["out"] / n, task, "direct")) for n in ("local", name))
        parted = differing(BASE, rows, "direct", local, other)
        assert all(one.gap < 1e-3 for one in parted), parted
        count, same = count + len(rows), same + len(rows) - len(parted)
    record_property("equal", f"{same} of {count}")
    assert same >= 0.99 * count


@pytest.mark.full  # 60 s
def test_vllm_gives_the_same_text(
    answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    for key, value in VLLM_ENV.items():
        monkeypatch.setenv(key, value)
    engine = Vllm(BASE, python=engine_python(), longest=512, engine=SMALL)
    try:
        out = answered["out"] / "vllm"
        evaluate_checkpoint(BASE, answered["data"], out, answered["config"], "miniature", backend=engine)
    finally:
        engine.close()
    _same(answered, "vllm", record_property)


@pytest.mark.full  # 70 s
def test_vllms_own_server_gives_the_same_text(
    answered: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [engine_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--served-model-name", "base", "--generation-config", "vllm", "--max-num-seqs", "64"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **VLLM_ENV, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", tmp_path / "log")
            backend = OpenAi(f"http://127.0.0.1:{port}/v1", "base", concurrency=32)
            out = answered["out"] / "served"
            evaluate_checkpoint(BASE, answered["data"], out, answered["config"], "miniature", backend=backend)
        finally:
            process.terminate()
            process.wait(30)
    _same(answered, "served", record_property)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-2000:])
