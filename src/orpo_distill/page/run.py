"""The page of one run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from orpo_distill.errors import DataError
from orpo_distill.page.blocks import Section, Table, number, plain
from orpo_distill.page.browser import MOST_TRACES, embedded
from orpo_distill.page.costs import cost_section
from orpo_distill.page.files import Row, RunFiles
from orpo_distill.page.health import health_section
from orpo_distill.page.measures import measure, pairings
from orpo_distill.page.rendering import Page, render
from orpo_distill.page.results import all_results, comparisons, headline, results_section, whole_texts
from orpo_distill.page.settings import settings_section
from orpo_distill.page.win_rates import BY_ROLE, win_headline, win_section
from orpo_distill.page.yields import lengths_section, outcomes_section, yield_section


def run_page(path: Path, missing: Sequence[str] = (), traces: int = MOST_TRACES) -> str:
    """The report of the run folder `path` as one HTML file, with what is there by now.

    `missing` are stages that the run has yet to do, where the caller knows them. At most `traces` traces stand in the
    trace browser. The same files give the same bytes. Raises RunError if `path` is no run folder, DataError for files
    that are damaged.
    """
    files = RunFiles(path)
    results, paired = all_results(files), comparisons(files)
    measured = [measure(source) for source in files.sources]
    teacher = next((each for each in measured if each.source.stage == "teacher"), None)
    rounds = pairings(files, teacher)
    browser, said = embedded(files, measured, traces), whole_texts(_scores(files))
    sections = [
        win_section(files, said or "") if files.open_ended else results_section(results, paired, said),
        health_section(files),
        yield_section(rounds),
        None if files.open_ended else outcomes_section(measured),
        lengths_section(measured, rounds),
        mechanisms_section(files),
        Section("traces", "Traces and pairs", [browser.block]) if browser else None,
        cost_section(files, measured),
        settings_section(files),
    ]
    page = Page(
        title=files.name,
        headline=win_headline(files) if files.open_ended else headline(results, paired, files.final_student),
        facts=facts(files.config),
        sections=[section for section in sections if section],
        version=metadata.version("orpo-distill"),
        notices=_notices(files, missing),
        data=browser.data if browser else "",
    )
    return render(page)


def _scores(files: RunFiles) -> dict[str, Row]:
    """What the stages counted that score given texts."""
    stages = [f"round-{number}/{name}-scores" for number in files.rounds for name in ("reference", "teacher")]
    return {stage: files.metrics(stage) for stage in stages}


def facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants to know first."""

    def named(value: Any) -> str:
        return str(value.get("type", "") if isinstance(value, dict) else value or "")

    def model(role: str) -> str:
        found = config.get(role)
        return Path(str(found.get("model", ""))).name if isinstance(found, dict) else ""

    pairs = config.get("pairs")
    phi = pairs.get("phi", "") if isinstance(pairs, dict) else ""
    found = [
        ("task", named(config.get("task"))),
        ("teacher", model("teacher")),
        ("student", model("student")),
        ("objective", named(config.get("objective"))),
        ("rounds", str(config.get("rounds", ""))),
        ("phi", str(phi)),
        ("seed", str(config.get("seed", ""))),
    ]
    return [(name, value) for name, value in found if value]


def mechanisms_section(files: RunFiles) -> Section | None:
    """The tables of the stage `mechanisms`, if it is there. Raises DataError if they are not as docs/report.md says."""
    content = files.json("mechanisms/mechanisms.json", {})
    if not content:
        return None
    return Section("mechanisms", "Measured mechanisms", free_tables(content, str(files.path / "mechanisms")))


def free_tables(content: Any, where: str) -> list[Table]:
    """Tables as another stage wrote them: title, note, columns, rows of text or numbers."""
    try:
        tables = []
        for table in content["tables"]:
            columns = [str(column) for column in table["columns"]]
            rows = [[number(cell) for cell in row] for row in table["rows"]]
            if wrong := [row for row in rows if len(row) != len(columns)]:
                raise ValueError(f"a row of {len(wrong[0])} cells under {len(columns)} columns")
            tables.append(Table(str(table["title"]), columns, rows, str(table.get("note") or "")))
        return tables
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"expected tables with title, columns and rows in {where}, found: {error!r}; make the stage anew"
        ) from error


def _notices(files: RunFiles, missing: Sequence[str]) -> list[str]:
    found = [BY_ROLE] if files.open_ended else []
    waiting = [stage for stage in missing if stage not in files.unfinished]
    if files.unfinished:
        found.append(f"This run is not finished. Begun: {', '.join(map(plain, files.unfinished))}.")
    if waiting:
        start = "Yet to come" if files.unfinished else "This run is not finished. Yet to come"
        found.append(f"{start}: {', '.join(map(plain, waiting))}. This page shows what is there.")
    return found
