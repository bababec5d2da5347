"""Drawings by matplotlib as SVG that follows the page: its font, its light and dark colours, nothing from outside.

Colours are drawn as stand-ins and become classes (`f-ink` fills, `s-ink` strokes) that the page's style sheet colours.
The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from orpo_distill.page.blocks import Chart, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "#0a0b01": "ink",
    "#0a0b02": "muted",
    "#0a0b03": "line",
    "#0a0b04": "panel",
    **{f"#0a0b1{number}": f"c{number}" for number in range(8)},
}
"""What is drawn -> the name of the page's colour."""

_DRAWN = {name: drawn for drawn, name in COLOURS.items()}
SERIES = [f"c{number}" for number in range(8)]
MARKERS = "os^Dv*PX"
MARKER_SIZE = 4.5
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2))]
WIDTH = 4.8  # inches; a phone shows them as 328 px, a desk as up to 512 px
WIDE = 5.4

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_USED = re.compile(r"url\(#([^)]+)\)")
_DROPPED = {f"{_SVG}metadata", f"{_SVG}style"}
_FONT = re.compile(r"(?:\w+ )*(?P<size>[\d.]+)px .*")


def colour(name: str) -> str:
    """The stand-in for a colour of the page."""
    return _DRAWN[name]


def series(number: int) -> str:
    """The stand-in for the colour of series `number`."""
    return _DRAWN[SERIES[number % len(SERIES)]]


class Drawing:
    """One chart: draw on `axes`, then `chart`. `key` must be the only one of its kind on the page."""

    def __init__(self, key: str, height: float = 2.5, width: float = WIDTH) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.key = key
        with _style(key):
            self._figure = Figure(figsize=(width, height), layout="constrained")
            self._canvas: Any = FigureCanvasSVG(self._figure)
            self.axes: Axes = self._figure.add_subplot()
            self.axes.tick_params(length=2)

    def legend(self, columns: int = 3) -> None:
        """Name the series, above the axes: what has points first, then level lines."""
        from matplotlib.container import Container

        found = list(zip(*self.axes.get_legend_handles_labels(), strict=True))
        if found:
            ordered = sorted(found, key=lambda pair: not isinstance(pair[0], Container))
            handles, names = zip(*ordered, strict=True)
            with _style(self.key):
                self._figure.legend(handles, names, loc="outside upper left", ncols=min(columns, len(names)))

    def from_zero(self) -> None:
        """Let the vertical axis begin at zero."""
        self.axes.set_ylim(0, 1.05 * self.axes.get_ylim()[1])

    def chart(self, title: str, alternative: str, note: str = "") -> Chart:
        """The drawing as a block."""
        return Chart(title, themed(self._svg(), plain(alternative)), alternative, note)

    def _svg(self) -> str:
        out = io.StringIO()
        with _style(self.key), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks: the page's own font has them
            self._canvas.print_svg(out, metadata={"Date": None})  # `savefig` would draw twice
        return out.getvalue()


def labels(texts: list[str]) -> list[str]:
    """Names as matplotlib and XML can take them."""
    return [plain(text) if len(text) <= 40 else plain(text[:39]) + "…" for text in texts]


@contextmanager
def _style(key: str) -> Iterator[None]:
    import matplotlib

    ink, muted, line = colour("ink"), colour("muted"), colour("line")
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "text.parse_math": False,
        "font.size": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": line,
        "grid.color": line,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "grid.linewidth": 0.5,
        "axes.linewidth": 0.8,
        "legend.frameon": False,
        "legend.handlelength": 1.8,
        "legend.columnspacing": 1.2,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        yield


def themed(svg: str, alternative: str) -> str:
    """matplotlib's SVG for use inside a page: classes for colours, no style attributes, no ids but those in use.

    A page's Content-Security-Policy may forbid style attributes: what stands in them becomes presentation attributes.
    """
    root = ElementTree.fromstring(svg)
    used = {name[1:] for element in root.iter() if (name := element.get(_LINK, "")).startswith("#")}
    used |= {found for element in root.iter() for value in element.attrib.values() for found in _USED.findall(value)}
    for parent in root.iter():
        for child in [child for child in parent if child.tag in _DROPPED]:
            parent.remove(child)
        for child in parent:
            child.tail = None
        if parent.tag != f"{_SVG}text":
            parent.text = None
    for element in root.iter():
        _clean(element, used)
    root.attrib = {
        "class": "plot",
        "role": "img",
        "aria-label": alternative,
        "viewBox": root.get("viewBox", ""),
    }
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, used: set[str]) -> None:
    element.tag = element.tag.removeprefix(_SVG)
    attributes: dict[str, str] = {}
    classes: list[str] = []
    for name, value in element.attrib.items():
        if name == "style":
            _spread(value, attributes, classes)
        elif name == _LINK:
            attributes["href"] = value
        elif name != "id" or value in used:
            attributes[name] = value
    if element.tag == "text" and not any(name.startswith("f-") for name in classes):
        classes.append("f-ink")
    element.attrib = attributes | ({"class": " ".join(classes)} if classes else {})


def _spread(style: str, attributes: dict[str, str], classes: list[str]) -> None:
    """Turn the declarations of a style attribute into classes (colours) and presentation attributes (all else)."""
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name in ("fill", "stroke") and value in COLOURS:
            classes.append(f"{name[0]}-{COLOURS[value]}")
        elif name == "font":
            size = _FONT.fullmatch(value)
            attributes["font-size"] = size["size"] if size else "8"
        elif name == "font-size":
            attributes[name] = value.removesuffix("px")
        elif name and not name.startswith("font"):
            attributes[name] = value
