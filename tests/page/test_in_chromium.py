"""The page in a real browser: opened from disk, clicked through, looked at. Part of `make test-full`."""

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orpo_distill.page import comparison_page, run_page
from orpo_distill.page.drawing import SERIES
from tests.page.folders import FolderOfARun, whole_run
from tests.page.test_comparison import CONTENT
from tests.page.test_escaping import HOSTILE, hostile

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

LARGE = 50_000  # traces
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise RuntimeError(
            "expected Chromium, found none; apt-get install chromium (Debian), or name its program in CHROMIUM"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: "Browser", path: Path, **how: Any) -> "Iterator[Page]":
    """The page, opened from disk. Afterwards: nothing was asked of any network, nothing was complained about."""
    context = browser.new_context(**({"viewport": DESK} | how))
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert complaints == []
    assert requests == [path.as_uri()]


def ready(page: "Page", seconds: float = 30) -> None:
    found_ends(page, "traces", seconds)


def found_ends(page: "Page", text: str, seconds: float = 30) -> None:
    """Wait until the line above the list ends with this. (A function: the page's policy forbids evaluated strings.)"""
    said = "text => document.querySelector('#found').textContent.endsWith(text)"
    page.wait_for_function(said, arg=text, timeout=1000 * seconds)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "demo.html"
    path.write_text(run_page(whole_run(tmp_path_factory.mktemp("runs") / "demo").path))
    return path


def test_filters_and_search(chromium: "Browser", demo: Path) -> None:
    with opened(chromium, demo) as page:
        ready(page)
        found = page.locator("#found")
        assert found.inner_text() == "54 of 54 traces"

        def shows(text: str) -> None:
            found_ends(page, text)
            assert found.inner_text() == text

        page.select_option("[name=policy]", "student-0")
        shows("18 of 54 traces")
        page.select_option("[name=kind]", "sampled")
        shows("12 of 54 traces")
        page.select_option("[name=outcome]", label="wrong")
        shows("7 of 54 traces")
        page.fill("[name=problem]", "p0")
        shows("2 of 54 traces")
        assert "Problem p0" in page.locator("#detail h3").inner_text()
        page.click("button[type=reset]")
        shows("54 of 54 traces")
        page.fill("[name=search]", "TRY 1")
        shows("12 of 54 traces")
        assert page.locator("#detail mark").first.inner_text() == "try 1"
        page.fill("[name=search]", "and 3?")
        shows("5 of 54 traces")
        page.fill("[name=search]", "there is no such text")
        shows("0 of 54 traces")
        assert "Nothing passes" in page.locator("#detail").inner_text()
        page.fill("[name=search]", "")
        page.select_option("[name=round]", "2")  # the student's answers, and those of the control
        shows("12 of 54 traces")


def test_a_pair_shows_both_sides_with_answer_and_reason(chromium: "Browser", demo: Path) -> None:
    with opened(chromium, demo) as page:
        ready(page)
        page.select_option("[name=mode]", "pairs")
        found_ends(page, "8 of 8 pairs")
        cards = page.locator("#detail .card")
        assert [cards.nth(i).locator("h4").inner_text().split("\n") for i in (0, 1)] == [
            ["Chosen", "correct"],
            ["Rejected", "wrong"],
        ]
        boxes = [cards.nth(i).bounding_box() for i in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        assert cards.nth(1).locator(".stated").inner_text() == "The answer is 99"
        assert cards.nth(1).locator(".answer").inner_text() == "99"
        assert 'Reason: states "The answer is 99"' in cards.nth(1).inner_text()
        page.select_option("[name=mode]", "traces")
        page.fill("[name=problem]", "p3")
        page.select_option("[name=policy]", "student-0")
        found_ends(page, "2 of 54 traces")
        assert "Round 1: in no pair, too similar to a kept one." in page.locator("#detail").inner_text()
        page.fill("[name=problem]", "p2")
        page.get_by_role("button", name="Round 2: rejected against teacher, sample 0").click()
        assert "Pair of round 2" in page.locator("#detail").inner_text()


def test_the_keyboard_is_enough(chromium: "Browser", demo: Path) -> None:
    with opened(chromium, demo) as page:
        ready(page)
        page.keyboard.press("/")
        page.keyboard.type("student-0 thinks")
        found_ends(page, "18 of 54 traces")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "list"
        selected = page.locator("#list [aria-selected=true]")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        assert selected.get_attribute("aria-posinset") == "3"
        assert page.locator("#list").get_attribute("aria-activedescendant") == selected.get_attribute("id")
        page.keyboard.press("End")
        assert selected.get_attribute("aria-posinset") == "18"
        assert selected.is_visible()
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "detail"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "list"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(chromium: "Browser", demo: Path, tmp_path: Path, scheme: str) -> None:
    """Text and series against the background: WCAG's contrast of 4.5 and 3; and the pixels are what was asked for."""
    with opened(chromium, demo, color_scheme=scheme) as page:
        ready(page)
        colours = page.evaluate(
            "names => { const style = getComputedStyle(document.documentElement);"
            " return Object.fromEntries(names.map(name => [name, style.getPropertyValue('--' + name)])); }",
            ["page", "ink", "muted", "link", "panel", "warn-ink", "warn-page", "hit", "pick", *SERIES[:7]],
        )
        for name in ("ink", "muted", "link"):
            assert contrast(colours[name], colours["page"]) >= 4.5
        for back in ("panel", "hit", "pick"):
            assert contrast(colours["ink"], colours[back]) >= 4.5
        assert contrast(colours["warn-ink"], colours["warn-page"]) >= 4.5
        for number in range(7):
            assert contrast(colours[f"c{number}"], colours["page"]) >= 3
        fill = page.locator("svg.plot text").first.evaluate("node => getComputedStyle(node).fill")
        brightness = sum(int(part) for part in fill[4:-1].split(",")) / 3
        assert (brightness > 120) == (scheme == "dark")
        page.screenshot(path=tmp_path / "shot.png")
    pixels = read_png(tmp_path / "shot.png")
    assert pixels.shape[:2] == (DESK["height"], DESK["width"])
    corner = pixels[-5, 5, :3].mean()
    assert corner < 0.2 if scheme == "dark" else corner > 0.9
    assert (abs(pixels[..., :3] - pixels[-5, 5, :3]).max(-1) > 0.3).mean() > 0.01  # something is drawn on it


def read_png(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's contrast ratio of two colours #rrggbb, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("kind", ["run", "hostile", "comparison"])
def test_a_phone_scrolls_down_only(chromium: "Browser", demo: Path, tmp_path: Path, kind: str) -> None:
    path = demo
    if kind != "run":
        path = tmp_path / "page.html"
        hostile_run = (
            whole_run(tmp_path / "demo", write=hostile, name=hostile("demo")).path if kind == "hostile" else None
        )
        path.write_text(run_page(hostile_run) if hostile_run else comparison_page(CONTENT))
    with opened(chromium, path, viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True) as page:
        if kind != "comparison":
            ready(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        wide = page.evaluate(
            "() => [...document.querySelectorAll('.table')].filter(box => box.scrollWidth > box.clientWidth).length"
        )
        assert wide > 0  # tables scroll in their own box
        smallest = page.evaluate(
            "() => Math.min(...[...document.querySelectorAll('svg.plot text')].map(node => "
            "node.getBoundingClientRect().height))"
        )
        assert smallest >= 7
        if kind == "run":
            page.locator("#list .row").nth(1).tap()
            page.wait_for_function("() => document.querySelector('#detail').getBoundingClientRect().top < 100")


def test_print_has_everything_but_the_trace_browser(chromium: "Browser", demo: Path) -> None:
    with opened(chromium, demo) as page:
        ready(page)
        page.emulate_media(media="print", color_scheme="dark")
        assert not page.locator("#browser").is_visible()
        assert page.locator(".printed").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        pdf = page.pdf()
        assert pdf.startswith(b"%PDF")


def test_hostile_texts_are_shown_and_do_nothing(chromium: "Browser", tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    run = whole_run(tmp_path / "demo", write=hostile, name=hostile("demo"))
    path.write_text(run_page(run.path))
    with opened(chromium, path) as page:
        ready(page)
        for mode in ("traces", "pairs"):
            page.select_option("[name=mode]", mode)
            found_ends(page, mode)
            shown = page.locator("#detail").inner_text()
            for text in HOSTILE[:12]:
                assert text in shown
            assert "U+202E" in shown
            assert page.locator("#detail img, #detail script, #detail iframe, #detail svg").count() == 0
        page.fill("[name=search]", "<script>alert(1)")
        found_ends(page, "8 of 8 pairs")
        assert page.locator("#detail mark").first.inner_text() == "<script>alert(1)"


def test_fifty_thousand_traces(chromium: "Browser", tmp_path: Path) -> None:
    """The list holds only what is in view, and a search answers at once."""
    path = tmp_path / "page.html"
    path.write_text(run_page(large_run(tmp_path / "large", LARGE).path))
    with opened(chromium, path) as page:
        started = time.monotonic()
        ready(page, 60)
        assert time.monotonic() - started < 20
        assert page.locator("#found").inner_text() == "50,000 of 50,000 traces"
        assert page.locator("#list .row").count() < 60
        page.focus("#list")
        page.keyboard.press("End")
        assert page.locator("#list [aria-selected=true]").get_attribute("aria-posinset") == "50000"
        assert page.locator("#list [aria-selected=true]").is_visible()
        took = page.evaluate(
            "() => { const started = performance.now(); form.search.value = 'zebra 49'; filter();"
            " return performance.now() - started; }"
        )
        assert page.locator("#found").inner_text() != "50,000 of 50,000 traces"
        assert took < 1000  # about 50 ms on an idle machine


def large_run(path: Path, traces: int) -> FolderOfARun:
    """Traces of some 90 random words each, 8 a problem for each of teacher and student."""
    coin = random.Random(0)
    words = [f"{coin.choice(['zebra', 'apple', 'sum', 'then', 'so', 'add'])}{coin.randrange(400)}" for _ in range(2000)]

    def longer(text: str) -> str:
        if "thinks" not in text:  # a question, an answer or a reason
            return text
        return " ".join([*coin.choices(words, k=90), "zebra", str(coin.randrange(1000)), text])

    run = FolderOfARun(path, problems=traces // 16, write=longer)
    for policy in ("teacher", "student-0"):
        run.sampled(policy, policy, "".join(coin.choices("+-", k=traces // 2)), samples=8)
    return run
