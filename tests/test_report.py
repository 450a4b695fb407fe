"""The page as a document: self-contained, well-formed, escaped, and with the numbers of results.json."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.records import read_records, record_path
from eval.report import write_report
from eval.report.svg import Scale, Svg, scale
from eval.words import number
from tests.helpers.synthetic_run import write_run

TASKS = ("mini_textvqa", "mini_gqa", "mini_scienceqa")
_VOID = {"meta", "link", "img", "line", "rect", "path", "circle"}


class Document(HTMLParser):
    """Every element with its attributes; an element that is closed out of turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run", tasks=TASKS, seeds=(0, 1), rows=24)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text()


@pytest.fixture(scope="module")
def document(page: str) -> Document:
    return Document(page)


def test_it_asks_no_server_for_anything(page: str, document: Document) -> None:
    addresses = [
        value
        for _, attributes in document.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "poster", "data")
    ]
    assert addresses
    assert all(value and value.startswith(("data:", "#")) for value in addresses)
    assert not re.search(r"https?://|@import|url\(", page)


def test_no_place_of_this_machine_is_on_the_page(page: str, run: Path) -> None:
    assert str(run) not in page


def test_every_figure_has_a_text_alternative_and_its_numbers(document: Document, page: str) -> None:
    drawings = [attributes for attributes in document.all("svg") if attributes.get("aria-hidden") != "true"]
    assert len(drawings) > 20
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 20
    figures = page.split("<figure")[1:]
    assert all("<table>" in figure and "<figcaption>" in figure and "<title>" in figure for figure in figures)
    assert all(attributes.get("alt") for attributes in document.all("img"))


def test_the_numbers_are_those_of_the_results(page: str, run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    for method in results["methods"].values():
        for scores in method["summary"].values():
            for score in ("strict", "lenient"):
                for metric in ("avg_acc", "bwt", "fm", "learned"):
                    if metric in scores[score]:
                        assert f"<td>{number(scores[score][metric]['value'])} <span" in page
    for name in ("sft", "grpo"):
        matrices = [entry["matrix"] for entry in results["methods"][name]["seeds"].values()]
        last = [sum(matrix[-1][0] for matrix in matrices) / len(matrices)]
        assert f"<td>{number(last[0])}</td>" in page


def test_flips_show_picture_question_and_both_answers(page: str, run: Path) -> None:
    cards = re.findall(
        r"<article data-method=\"(\w+)\" data-task=\"(\w+)\" data-lost=\"(\w+)\">(.*?)</article>", page, re.S
    )
    assert {method for method, *_ in cards} == {"sft", "grpo"}
    assert {task for _, task, *_ in cards} <= set(TASKS[:-1])  # nothing can be lost of the last task yet
    method, task, lost, card = cards[0]
    style = "direct" if method == "sft" else "cot"
    chain = run / method / "order0" / "seed0"
    place = TASKS.index(task) + 1
    before, after = (
        {record.id: record for record in read_records(record_path(stage / "eval", task, style))}
        for stage in (chain / f"{place}_{task}", chain / f"{len(TASKS)}_{TASKS[-1]}")
    )
    flipped = [(before[key], after[key]) for key in before if before[key].strict == 1.0 and after[key].strict == 0.0]
    shown = [dd for dd in re.findall(r"<dd[^>]*>(.*?)</dd>", card, re.S)]
    assert any(shown == [b.answer, b.response, a.response] for b, a in flipped)
    assert lost in ("form", "answer")
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', card)
    assert picture
    assert base64.b64decode(picture[1]).startswith(b"\x89PNG")
    assert "&lt;image&gt;" not in card


def test_what_a_model_writes_cannot_break_the_page(run: Path, tmp_path: Path) -> None:
    hostile = Path(shutil.copytree(run, tmp_path / "run"))
    attack = "</dd></article><script>alert(1)</script><img src=x onerror=alert(1)>"
    for path in hostile.glob("sft/order0/seed0/3_*/eval/mini_textvqa.direct.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**line, "response": attack, "strict": 0.0}) + "\n" for line in lines))
    text = write_report(hostile).read_text()
    assert "alert(1)" in text
    document = Document(text)
    assert len(document.all("script")) == 1
    assert not any("onerror" in attributes for attributes in document.all("img"))


def test_one_seed_one_arm_and_no_logs_make_a_page_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tasks=TASKS[:2], seeds=(0,), rows=8, arms=("sft",))
    for log in run.rglob("log.jsonl"):
        log.unlink()
    text = write_report(run).read_text()
    Document(text)
    assert "There are no two sequential methods" in text
    assert 'id="training"' not in text


def test_an_incomplete_run_says_so_on_the_page(run: Path, tmp_path: Path) -> None:
    partial = Path(shutil.copytree(run, tmp_path / "run"))
    record_path(partial / "grpo" / "order0" / "seed1" / "2_mini_gqa" / "eval", "mini_gqa", "cot").unlink()
    text = write_report(partial).read_text()
    assert "1 cells are missing" not in text
    assert "1 cell is missing" in text
    assert "grpo/order0/seed1/2_mini_gqa: mini_gqa (cot)" in text


def test_scales_have_round_ticks_within_reach() -> None:
    assert Scale(0, 100, 0, 1).ticks(4) == [0, 50, 100]
    assert Scale(0.0, 0.013, 0, 1).ticks(3) == [0, 0.005, 0.01]
    assert scale([5.0, 5.0], 0, 10)(5.0) == 5.0
    assert Scale(-10, 10, 100, 0)(10) == 0


def test_drawings_are_escaped() -> None:
    svg = Svg(10, 10, 'a "<b>"', "c & d")
    svg.text(1, 2, "<script>")
    drawn = svg.done()
    assert "<script>" not in drawn
    assert 'aria-label="a &quot;&lt;b&gt;&quot;. c &amp; d"' in drawn
