"""Whatever a model or a data set wrote: it is shown, and never becomes markup, script or style."""

import json
from pathlib import Path

import pytest

from orpo_distill.page import comparison_page, run_page, runs_page
from orpo_distill.page.blocks import plain
from tests.page.folders import whole_run
from tests.page.reading import Seen
from tests.page.test_comparison import CONTENT

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</SCRIPT ><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "--!><script>alert(1)</script>",
    "]]><svg onload=alert(1)>",
    "</style><style>*{display:none}</style>",
    "</textarea></title></pre></noscript><iframe src=//x>",
    '" onmouseover="alert(1)" x=\'',
    "' onfocus='alert(1)' autofocus='",
    "javascript:alert(1)",
    "{{ 7 * 7 }} {% raw %} {# #} ${7*7} <%= 7 %>",
    "\x00\x08\x0b\x1b[31m\x7f\x9f",
    "\u2028\u2029\ufeff\u200b",
    "\u202egpj.exe\u202c \u2066x\u2069",
    "\ud800 \udfff \ud83d",
    "\ufffe\uffff\U0010ffff",
    "&lt;b&gt; &#60; &amp;",
    "$x_1^2$ \\mathbf{x} $",
    "a" * 5000,
    "| a | b |\r\n\r| - |",
]


def hostile(text: str) -> str:
    """The text with everything hostile behind it."""
    return f"{text} {' '.join(HOSTILE)}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts, questions, choices, answers and reasons; and names in the config, the environment and other files."""
    run = whole_run(
        tmp_path_factory.mktemp("runs") / "demo",
        write=hostile,
        name=hostile("demo"),
        task={"type": hostile("task"), hostile("key"): hostile("value")},
        teacher={"model": hostile("model")},
    )
    bad = {"problem_id": hostile("p"), "side": "problem", "reason": hostile("reason")}
    with (run.path / "round-1" / "pairs" / "dropped.jsonl").open("a") as file:
        file.write(json.dumps(bad) + "\n")
    (run.path / "environment.json").write_text(json.dumps({"python": hostile("3"), "packages": {hostile("p"): "1"}}))
    rows = json.loads((run.path / "sft" / "evaluate" / "results.json").read_text())
    rows[0]["policy"] = hostile("sft")
    (run.path / "sft" / "evaluate" / "results.json").write_text(json.dumps(rows))
    metrics = {
        "pairs": 4,
        "problems": 6,
        "rejected_policies": {hostile("student").encode(errors="replace").decode(): 1.0},
    }
    run.finish("round-1/pairs", metrics, kept=(hostile("kept").encode(errors="replace").decode(),))
    tables = [{"title": hostile("t"), "note": hostile("n"), "columns": [hostile("c")], "rows": [[hostile("r")]]}]
    (run.path / "mechanisms").mkdir()
    (run.path / "mechanisms" / "mechanisms.json").write_text(json.dumps({"tables": tables}))
    return run_page(run.path, missing=[hostile("stage")])


def check(page: str, scripts: int) -> Seen:
    """No element and no attribute that the page's own templates and drawings do not make."""
    seen = Seen(page)
    assert not seen.tags & {"img", "iframe", "object", "embed", "base", "link", "textarea", "template"}
    assert len(seen.raw["script"]) == scripts
    assert len(seen.raw["style"]) == 1
    assert not seen.comments
    for tag, attrs in seen.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], tag
        assert not (attrs.get("href") or "#").lower().startswith("javascript")
    return seen


def test_the_page_has_no_element_that_a_text_brought(page: str) -> None:
    seen = check(page, scripts=2)
    assert "<script>alert(1)</script>" in seen.text
    assert "{{ 7 * 7 }} {% raw %} {# #} ${7*7} <%= 7 %>" in seen.text


def test_control_and_direction_characters_are_shown_as_codes(page: str) -> None:
    for character in "\x00\x08\x0b\x1b\x7f\x9f\u2028\u2029\u202e\u2066\ufeff\ufffe\uffff":
        assert character not in page
    assert "\\u202egpj.exe\\u202c" in page
    page.encode()


def test_the_browsers_data_are_base64_and_say_what_was_written(page: str) -> None:
    seen = check(page, scripts=2)
    assert seen.raw["script"][0].isascii()
    assert not set(seen.raw["script"][0]) & set("<>&\"'")
    texts = seen.packed()["traces"]["text"]
    assert all("</SCRIPT ><img src=x onerror=alert(1)>" in text for text in texts)
    assert all("\u202egpj.exe" in text for text in texts)


def test_several_runs_and_comparisons_are_escaped_too(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / name, name=hostile(name), task=hostile(name)).path for name in "ab"]
    check(runs_page(runs), scripts=0)

    def spoilt(value: object) -> object:
        if isinstance(value, dict):
            return {key: spoilt(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoilt(item) for item in value]
        return hostile(value) if isinstance(value, str) and value not in ("primary", "exploratory") else value

    check(comparison_page(spoilt(CONTENT)), scripts=0)


def test_plain_keeps_ordinary_text() -> None:
    assert plain("Zoë, 日本語, a\n\tb – ½ 😀") == "Zoë, 日本語, a\n\tb – ½ 😀"
    assert plain("\ud83d\u202e\x1b") == "\\ud83d\\u202e\\u001b"
