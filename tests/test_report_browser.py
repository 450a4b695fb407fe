"""The page in a real browser: screenshots at two widths in two themes, nothing overflows, nothing complains.

Set ``REPORT_SCREENSHOTS`` to a directory to keep the screenshots and look at them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from eval.report import write_report
from eval.results import build_results
from tests.helpers.browser import Browser, chromium
from tests.helpers.synthetic_run import with_meters, write_run

pytestmark = pytest.mark.full

OVERFLOWING = """[...document.querySelectorAll("body *")]
  .filter((e) => !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("browser") / "run", rows=30)
    return write_report(run, with_meters(build_results(run)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_at(browser: Browser, page: Path, tmp_path: Path, width: int, theme: str) -> None:
    browser.open(page, width, theme)
    shot = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path)) / f"report_{width}_{theme}.png"
    browser.screenshot(shot)
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(
        "document.images.length > 0 && [...document.images].every((image) => image.naturalWidth > 0)"
    )
    with Image.open(shot) as picture:
        corner = picture.convert("L").getpixel((2, 2))
        assert picture.width == width
    assert isinstance(corner, int)
    assert corner > 200 if theme == "light" else corner < 60


def test_text_in_figures_is_legible_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, 390, "light")
    smallest = browser.evaluate(
        """Math.min(...[...document.querySelectorAll("figure svg text")].filter((t) => t.getClientRects().length)
        .map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))"""
    )
    assert smallest >= 8.5


def test_switches_work(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, "light")
    browser.evaluate('document.getElementById("theme").click()')
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    shown = '[...document.querySelectorAll("#matrix figure")].filter((f) => f.offsetParent).length'
    both = browser.evaluate('document.querySelectorAll("#matrix figure").length')
    assert browser.evaluate(shown) == both / 2
    browser.evaluate("document.querySelector('#matrix [data-choose=lenient]').click()")
    assert browser.evaluate("document.body.dataset.score") == "lenient"
    assert browser.evaluate(shown) == both / 2
    assert browser.complaints == []


def test_flips_can_be_filtered(browser: Browser, page: Path) -> None:
    browser.open(page, 390, "dark")
    cards = 'document.querySelectorAll(".flips article:not([hidden])").length'
    everything = browser.evaluate(cards)
    browser.evaluate(
        """(() => { const s = document.querySelector("#filter select[name=method]"); s.value = "sft";
        s.dispatchEvent(new Event("change", {bubbles: true})); })()"""
    )
    assert 0 < browser.evaluate(cards) < everything
    assert browser.evaluate('document.querySelector("#filter output").textContent').endswith(f"of {everything}")


def test_an_address_can_ask_for_a_theme(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, "light")
    browser.visit(f"{page.as_uri()}?theme=dark")
    assert browser.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
