"""From sections to one HTML file that needs nothing else: templates with escaping, and a policy against what slips.

Every text passes through Jinja2's autoescaping, and control characters and marks that turn the reading direction are
shown as codes. The Content-Security-Policy lets run only this page's own style sheet and script, by their hashes, and
lets nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from orpo_distill.page.blocks import Section, plain


@dataclass(frozen=True)
class Page:
    """A page's head and its sections. Notices are set off, notes are not; `data` is from `browser.packed`."""

    title: str
    headline: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    version: str
    notices: Sequence[str] = ()
    notes: Sequence[str] = ()
    data: str = ""


def render(page: Page) -> str:
    """The whole HTML file."""
    style, script = _asset("page.css"), _asset("page.js") if page.data else ""
    template = _environment().get_template("page.html")
    return str(template.render(page=page, style=style, script=script, policy=_policy(style, script)))


def _policy(style: str, script: str) -> str:
    rules = ["default-src 'none'", f"style-src {_hash(style)}", "base-uri 'none'", "form-action 'none'"]
    if script:
        rules += [f"script-src {_hash(script)}", "require-trusted-types-for 'script'", "trusted-types 'none'"]
    return "; ".join(rules)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return files("orpo_distill.page").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else plain(value)

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["own"] = Markup  # only for what this package made itself: styles, scripts, drawings
    return environment
