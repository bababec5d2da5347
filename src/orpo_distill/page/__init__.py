"""The HTML report: one file that needs no network, from the files of a run, of several, or of a comparison."""

from orpo_distill.page.comparison import comparison_page
from orpo_distill.page.run import run_page
from orpo_distill.page.several import runs_page

__all__ = ["comparison_page", "run_page", "runs_page"]
