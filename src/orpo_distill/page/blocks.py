"""What a page is made of: sections of paragraphs, tables, charts and code, and how numbers are written in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

NOTHING = "–"
"""Stands for a number that there is not."""

_NUMERIC = re.compile(r"[<≤~]? ?[-+−]?[\d][\d.,]*(?:e[-+]?\d+)?(?:%| s| min| h)?(?: (?:to|of) [-+−]?[\d.,]+%?)?")
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\uffff]"
)


@dataclass(frozen=True)
class Text:
    """A paragraph. A warning says what may be wrong with the run; a note explains."""

    text: str
    tone: Literal["text", "note", "warning"] = "text"
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. `note` stands below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    kind: ClassVar[str] = "table"

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only: they are set flush right. The first one names the row."""
        return [
            place > 0 and all(_NUMERIC.fullmatch(row[place]) or row[place] in ("", NOTHING) for row in self.rows)
            for place in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Chart:
    """A drawing (`svg` from `drawing.Drawing`), with the words that stand for it where it cannot be seen."""

    title: str
    svg: str
    alternative: str
    note: str = ""
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Charts:
    """Charts beside each other where there is room."""

    charts: Sequence[Chart]
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file, folded away if `folded`."""

    title: str
    text: str
    folded: bool = False
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Browser:
    """The trace browser; its data stands at the end of the page."""

    traces: int
    pairs: int
    note: str = ""
    kind: ClassVar[str] = "browser"


Block = Text | Table | Chart | Charts | Code | Browser


@dataclass(frozen=True)
class Section:
    """A heading with an anchor and what stands below it."""

    anchor: str
    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def plain(text: object) -> str:
    r"""Text in which control characters, marks that turn the reading direction and lone surrogates show as \u202e."""
    written = text if isinstance(text, str) else str(text)
    shown = _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", written)
    return shown if shown.isascii() else re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", shown)


def percent(value: float | None) -> str:
    """A share as `78.4%`."""
    return NOTHING if value is None else f"{value:.1%}"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, with its sign: `+3.1`."""
    return NOTHING if value is None else f"{100 * value:+.1f}"


def between(low: float | None, high: float | None, signed: bool = False) -> str:
    """An interval, of a share or (with `signed`) of a difference in points."""
    if low is None or high is None:
        return NOTHING
    write = points if signed else percent
    return f"{write(low)} to {write(high)}"


def p_value(value: float | None) -> str:
    """Two digits, and no row of zeros."""
    if value is None:
        return NOTHING
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}" if value < 0.995 else "1"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return NOTHING if value is None else f"{round(value):,}"


def number(value: object, digits: int = 3) -> str:
    """Anything a file may hold in the place of a number."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return NOTHING
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"
