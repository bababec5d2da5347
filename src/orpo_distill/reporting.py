"""`orpo-distill report`: the HTML report again, from files, at any time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orpo_distill.errors import ConfigError, DataError, OrpoDistillError
from orpo_distill.experiment import status
from orpo_distill.page import comparison_page, run_page, runs_page
from orpo_distill.records import write_text
from orpo_distill.runs import disk_errors_explained


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of a run folder, of several, or of a comparison's folder; where it stands.

    Without `out`: `report/report.html` in the run folder, `report.html` in a comparison's folder or, for several runs,
    in the current one. Raises RunError for a folder that is none of these, DataError for damaged files.
    """
    first = folders[0]
    comparison = [folder for folder in folders if (folder / "compare.json").exists()]
    if comparison and len(folders) > 1:
        raise ConfigError(
            f"expected run folders, or one comparison alone, found the comparison {comparison[0]} among "
            f"{len(folders)}; name the runs that stand in it, or it alone"
        )
    with disk_errors_explained(first):
        if comparison:
            page, default = comparison_page(_compared(first / "compare.json")), first / "report.html"
        elif len(folders) == 1:
            page, default = run_page(first, _missing(first)), first / "report" / "report.html"
        else:
            page, default = runs_page(folders), Path("report.html")
    path = out or default
    with disk_errors_explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    return path


def _compared(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"expected JSON in {path}, found: {error}; run compare again") from error
    if not isinstance(content, dict):
        raise DataError(f"expected an object in {path}, found {type(content).__name__}; run compare again")
    return content


def _missing(folder: Path) -> list[str]:
    """Stages that the run has yet to do. Unknown where its config cannot be planned, say without a user's module."""
    with suppress(OrpoDistillError):
        return [
            name for name, state, _ in status(folder) if state == "not started" and name not in ("report", "student")
        ]
    return []
