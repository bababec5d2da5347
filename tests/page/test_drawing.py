"""Drawings: stand-ins become classes, nothing stays that a strict policy forbids."""

import re

from orpo_distill.page.drawing import Drawing, colour, series


def drawn(key: str = "key") -> str:
    drawing = Drawing(key)
    drawing.axes.plot([0, 1], [1, 2], color=series(0), marker="o", label="a & <b>")
    drawing.axes.axhline(1, color=colour("muted"))
    drawing.legend()
    return drawing.chart("title", 'said "so" & <more>').svg


def test_colours_are_classes_and_styles_are_attributes() -> None:
    svg = drawn()
    assert 'class="s-c0"' in svg
    assert "f-c0" in svg
    assert "s-muted" in svg
    assert not re.search(r'style=|<style|<metadata|#0a0b|xlink|<\?xml|<!DOCTYPE|"#[0-9a-f]{6}"', svg)
    assert "a &amp; &lt;b&gt;" in svg
    assert 'aria-label="said &quot;so&quot; &amp; &lt;more&gt;"' in svg


def test_ids_are_those_in_use_and_differ_between_drawings() -> None:
    first, second = (set(re.findall(r' id="([^"]+)"', drawn(key))) for key in ("one", "two"))
    assert first
    assert not first & second
    assert all(f"#{name}" in drawn("one") for name in first)


def test_the_same_numbers_give_the_same_drawing() -> None:
    assert drawn() == drawn()


def test_drawing_leaves_other_users_of_the_library_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn()
    assert dict(matplotlib.rcParams) == before
