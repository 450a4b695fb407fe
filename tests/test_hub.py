"""Resolving and downloading against a hub that fails in every known way; the client libraries are unpatched.

One test sets HF_ENDPOINT and HF_HUB_OFFLINE for a new process, as a user does; the others share this process and
point the libraries' constants at the hub (tests/helpers/hub/client.py).
"""

import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import huggingface_hub
from datasets import Features, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.utils.info_utils import NonMatchingSplitsSizesError

from cpt_rft.data.hub import Table, fetch_files, fetch_tables, stream
from cpt_rft.data.retry import Patience, asked_pause_s, is_transient, retrying
from cpt_rft.data.source import Source, SourceFile
from cpt_rft.errors import DataError
from tests.helpers.hub import Fault, Hub, Repo, sets
from tests.helpers.hub.client import connect, environment
from tests.helpers.tree import ROOT

NAME = "hiyouga/geometry3k"
TABLES = [Table(split, None, split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def geometry() -> Repo:
    return sets.geometry3k()


@pytest.fixture
def hub(geometry, tmp_path, monkeypatch):
    with Hub(geometry) as running:
        connect(running, tmp_path / "home", monkeypatch)
        yield running


def fetch(tmp_path: Path, *names: str, revision: str | None = None, tables: list[Table] = TABLES) -> Source:
    return fetch_tables(names or (NAME,), revision, tables, tmp_path / "lock.json")


def answers(source: Source, part: str = "train") -> list[str]:
    return [row["answer"] for row in stream(source.part(part), ["answer"])]


def test_tables_are_resolved_downloaded_and_locked(hub, geometry, tmp_path):
    source = fetch(tmp_path)
    assert (source.repo, source.revision, source.renamed_from) == (NAME, geometry.sha, None)
    assert dict(source.rows) == dict(source.card_rows) == {"train": 10, "test": 6}
    assert [file.name for file in source.part("train")] == [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert all(file.path.read_bytes() == geometry.files[file.name] for file in source.files)
    assert hub.count("GET", "validation") == 0  # only what is asked for
    assert answers(source)[:3] == ["3", "48", r"5 \sqrt { 3 }"]
    before = len(hub.requests)
    assert fetch(tmp_path) == source
    assert len(hub.requests) == before  # a complete lock needs no network


def test_pictures_come_as_the_original_bytes(hub, tmp_path):
    rows = list(stream(fetch(tmp_path).part("train"), ["images", "no such column"], batch=3))
    assert [row["images"][0]["bytes"] for row in rows] == [sets.picture(i, (60, 60))["bytes"] for i in range(10)]
    assert list(rows[0]) == ["images"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(r"/lfs/.*train-00001", "status", status=429, retry_after="0"),
        Fault(r"/api/.*/revision/", "status", status=503, times=2),
        Fault(r"/api/.*/paths-info/", "status", status=500, method="POST"),
        Fault(r"/lfs/.*train-00001", "status", status=502),
        Fault(r"/lfs/.*train-00001", "cut", at=700),
        Fault(r"/lfs/.*train-00001", "slow", pause_s=0.01),
        Fault(r"/lfs/.*train-00001", "corrupt", at=500),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.path}",
)
def test_a_passing_fault_changes_nothing(hub, geometry, tmp_path, fault):
    hub.faults = [fault]
    source = fetch(tmp_path)
    assert fault.seen == fault.times
    assert all(file.path.read_bytes() == geometry.files[file.name] for file in source.files)


def test_a_cut_body_is_continued_and_not_begun_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what is kept when the body is cut
    hub.faults = [Fault(r"/lfs/.*train-00001", "cut", at=700)]
    fetch(tmp_path)
    assert [line for line in hub.requests if line.startswith("GET /lfs") and "bytes=700-" in line]


def test_after_a_lasting_fault_only_the_missing_file_is_fetched(hub, geometry, tmp_path):
    hub.faults = [Fault(r"/lfs/.*train-00001", "status", status=503, times=-1)]
    with pytest.raises(DataError, match=r"could not be fetched .*complete files are kept"):
        fetch(tmp_path)
    hub.faults = []
    first = hub.count("GET", "/lfs/hiyouga/geometry3k/data/train-00000")
    source = fetch(tmp_path)
    assert hub.count("GET", "/lfs/hiyouga/geometry3k/data/train-00000") == first == 1
    assert all(file.path.read_bytes() == geometry.files[file.name] for file in source.files)


def test_a_file_that_is_not_what_the_hub_states_is_refused(hub, tmp_path):
    hub.faults = [Fault(r"/lfs/.*train-00001", "corrupt", at=500, times=-1)]
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet of hiyouga/geometry3k came twice"):
        fetch(tmp_path)


def test_a_file_changed_on_disk_is_fetched_again(hub, geometry, tmp_path):
    source = fetch(tmp_path)
    blob = source.files[0].path.resolve()
    blob.write_bytes(blob.read_bytes()[:-9])
    again = fetch(tmp_path)
    assert again == source
    assert again.files[0].path.read_bytes() == geometry.files[again.files[0].name]


def test_a_renamed_repository_is_followed_and_named(hub, geometry, tmp_path):
    hub.add(Repo("old/name", renamed_to=NAME))
    source = fetch(tmp_path, "old/name")
    assert (source.repo, source.renamed_from) == (NAME, "old/name")
    assert answers(source, "test")


def test_the_next_name_is_tried_where_the_first_is_gone(hub, tmp_path):
    assert fetch(tmp_path, "gone/name", NAME).repo == NAME


def refused(name: str, tmp_path: Path, message: str, **more) -> None:
    with pytest.raises(DataError, match=message):
        fetch(tmp_path, name, **more)
    assert not (tmp_path / "lock.json").exists()


def test_repositories_that_cannot_be_used_say_why_and_what_to_do(hub, geometry, tmp_path):
    script = Repo("facebook/textvqa", {"README.md": b"---\n---\n", "textvqa.py": b"import datasets"})
    gated = Repo("a/gated", geometry.files, gated=True)
    texts = Repo("a/texts", {"README.md": b"", "train.json": b'[{"answer": "1"}]', "test.json": b'[{"answer": "1"}]'})
    hub.add(script, gated, texts, Repo("a/private", private=True), Repo("a/empty", {"README.md": b"---\n---\n"}))
    refused("facebook/textvqa", tmp_path, r"Python script of its own.*copy of it in parquet")
    refused("a/gated", tmp_path, r"a/gated is gated.*datasets/a/gated.*hf auth login")
    refused("a/private", tmp_path, r"no dataset a/private at http.*'repos'")
    refused("a/texts", tmp_path, r"holds train.json, which is not parquet")
    refused("a/empty", tmp_path, r"a/empty holds no data files")
    refused(NAME, tmp_path, r"no revision v9.*'revision'", revision="v9")
    refused(NAME, tmp_path, r"no split 'val'.*train, validation, test", tables=[Table("val", None, "val")])
    refused(NAME, tmp_path, r"BuilderConfig 'full' not found.*'config'", tables=[Table("train", "full", "train")])


def test_nothing_is_downloaded_where_the_disk_is_too_small(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**31, 2**31, 2**20))
    with pytest.raises(DataError, match=r"needs 0.0 GB more in .* 0.0 GB are free.*HF_HOME"):
        fetch(tmp_path)
    assert hub.count("GET", "/lfs/") == 0


def test_long_listings_come_in_pages(hub, tmp_path):
    hub.page = 1
    assert dict(fetch(tmp_path).rows) == {"train": 10, "test": 6}
    assert hub.count("GET", "cursor=") > 0


def test_a_card_with_a_wrong_count_is_seen(hub, geometry, tmp_path):
    card = geometry.files["README.md"].replace(b"num_examples: 10", b"num_examples: 12")
    hub.add(Repo("a/miscounted", geometry.files | {"README.md": card}))
    source = fetch(tmp_path, "a/miscounted")
    assert (source.rows["train"], source.card_rows["train"]) == (10, 12)
    with pytest.raises(NonMatchingSplitsSizesError):
        load_dataset("a/miscounted", cache_dir=str(tmp_path / "arrow"))


def test_offline_uses_what_is_here_and_names_what_is_not(hub, tmp_path, monkeypatch):
    source = fetch(tmp_path)
    connect(hub, tmp_path / "home", monkeypatch, offline=True)
    before = len(hub.requests)
    assert fetch(tmp_path) == source
    assert answers(source)
    (tmp_path / "lock.json").unlink()
    with pytest.raises(DataError, match=r"hiyouga/geometry3k is not on this machine.*unset HF_HUB_OFFLINE"):
        fetch(tmp_path)
    source.files[0].path.unlink()
    assert len(hub.requests) == before


def test_plain_files_are_fetched_as_parts(hub, tmp_path):
    hub.add(Repo("a/files", {"README.md": b"", "big/a.zip": b"zip", "b.txt": b"text"}))
    source = fetch_files(
        ["a/files"], None, {"pictures": "big/a.zip", "notes": "b.txt"}, tmp_path / "lock.json", tmp_path
    )
    assert [file.path.read_bytes() for part in ("pictures", "notes") for file in source.part(part)] == [b"zip", b"text"]
    with pytest.raises(DataError, match=r"has no file c\.txt"):
        fetch_files(["a/files"], None, {"c": "c.txt"}, tmp_path / "other.json", tmp_path)


def test_a_large_file_goes_on_where_a_killed_download_ended(hub, tmp_path, monkeypatch):
    content = bytes(range(256)) * 40
    hub.add(Repo("a/files", {"README.md": b"", "a.zip": content}))
    asked = ["a/files"], None, {"pictures": "a.zip"}, tmp_path / "lock.json", tmp_path
    hub.faults = [Fault("/lfs/", "cut", at=3000), Fault("/lfs/", "status", times=-1)]
    with pytest.raises(DataError, match=r"a\.zip could not be fetched"):
        fetch_files(*asked)
    hub.faults = []
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = fetch_files(*asked)
    assert source.files[0].path.read_bytes() == content
    assert hub.requests[-1].endswith("bytes=3000-")
    assert any("/resolve/" in path for path in hub.authorized)
    assert not any("/lfs/" in path for path in hub.authorized)  # the token stays with the hub
    before = len(hub.requests)
    assert fetch_files(*asked) == source
    assert len(hub.requests) == before


def test_a_large_file_that_is_not_what_the_hub_states_is_refused(hub, tmp_path):
    hub.add(Repo("a/files", {"README.md": b"", "a.zip": b"zip"}, stated_sha256={"a.zip": "0" * 64}))
    with pytest.raises(DataError, match=r"a\.zip of a/files came twice"):
        fetch_files(["a/files"], None, {"pictures": "a.zip"}, tmp_path / "lock.json", tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_the_hub_answers_the_unpatched_library_as_the_real_one_does(hub, tmp_path):
    rows = load_dataset(NAME, cache_dir=str(tmp_path / "arrow"))
    assert {split: len(part) for split, part in rows.items()} == {"train": 10, "validation": 4, "test": 6}
    assert rows["train"][0]["images"][0].size == (60, 60)
    with pytest.raises(DatasetNotFoundError, match="doesn't exist"):
        load_dataset("a/nothing", cache_dir=str(tmp_path / "arrow"))


SCRIPT = """
import sys
import time
from pathlib import Path
from cpt_rft.data.hub import Table, fetch_tables, stream
source = fetch_tables([sys.argv[1]], None, [Table("test", None, "test")], Path(sys.argv[2]))
print(source.revision, sum(1 for row in stream(source.part("test"), ["answer"])))
"""


@pytest.mark.full
def test_a_mirror_and_offline_mode_are_set_by_the_environment(geometry, tmp_path):
    with Hub(geometry) as mirror:
        variables = environment(mirror, tmp_path / "home")
        command = [sys.executable, "-c", SCRIPT, NAME, str(tmp_path / "lock.json")]
        found = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True)
        assert found.stdout.split() == [geometry.sha, "6"]
        before = len(mirror.requests)
    offline = variables | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=offline, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [geometry.sha, "6"]
    assert len(mirror.requests) == before


@pytest.mark.full
def test_a_killed_fetch_is_completed_by_the_next(geometry, tmp_path):
    rng = random.Random(0)
    with Hub(geometry) as slow:
        variables = environment(slow, tmp_path / "home")
        command = [sys.executable, "-c", SCRIPT, NAME, str(tmp_path / "lock.json")]
        for _ in range(3):
            slow.faults = [Fault("", "slow", times=-1, pause_s=0.5)]
            before = len(slow.requests)
            process = subprocess.Popen(command, env=variables, cwd=ROOT)
            while len(slow.requests) < before + rng.randrange(1, 12) and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.wait()
        slow.faults = []
        found = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True)
        assert found.stdout.split() == [geometry.sha, "6"]


def test_a_table_that_does_not_read_is_named(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(sets.parquet([{"a": "b"}], Features({"a": Value("string")}))[:-5])
    with pytest.raises(DataError, match=r"broken.parquet is not a readable parquet file"):
        list(stream([SourceFile("a", "a", 1, "", path)], ["a"]))


class AnswerError(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        self.response = namedtuple("Response", "status_code headers")(status, headers)


def test_only_what_may_pass_is_tried_again_with_growing_pauses():
    pauses: list[float] = []
    calls: list[int] = []

    def failing(*errors: Exception):
        left = list(errors)

        def call() -> str:
            calls.append(1)
            if left:
                raise left.pop(0)
            return "done"

        return call

    patience = Patience(attempts=4, base_s=1.0, longest_s=3.0)
    flaky = failing(ConnectionResetError(), OSError("Consistency check failed: ..."), AnswerError(503))
    assert retrying(flaky, patience, pauses.append) == "done"
    assert pauses == [1.0, 2.0, 3.0]
    pauses.clear()
    headers = {"Retry-After": "2"}
    assert retrying(failing(AnswerError(429, **headers)), patience, pauses.append) == "done"
    assert pauses == [2.0]
    for error in (AnswerError(404), AnswerError(403), FileNotFoundError("x"), ValueError("x")):
        calls.clear()
        with pytest.raises(type(error)):
            retrying(failing(error), patience, pauses.append)
        assert len(calls) == 1
    calls.clear()
    with pytest.raises(AnswerError):
        retrying(failing(*[AnswerError(503)] * 9), patience, pauses.append)
    assert len(calls) == patience.attempts


def test_the_status_within_a_wrapped_error_decides():
    def wrapped(status: int) -> Exception:
        try:
            try:
                raise AnswerError(status)
            except AnswerError as inner:
                raise OSError("wrapped") from inner
        except OSError as outer:
            return outer

    assert is_transient(wrapped(503))
    assert not is_transient(wrapped(404))
    assert asked_pause_s(wrapped(503)) is None
