"""The command line. Exit codes: 0 done, 1 the work could not be done, 2 wrong command line or config, 130 and 143
stopped by Ctrl-C and SIGTERM (everything is kept: the same command goes on)."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from orpo_distill import __version__
from orpo_distill.compare.cells import Wanted, design_of
from orpo_distill.compare.methods import DEFAULT as DEFAULT_METHODS
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, Interrupted, OrpoDistillError
from orpo_distill.experiment import run as run_experiment
from orpo_distill.experiment import status as run_status
from orpo_distill.exporting import Format, export_rows
from orpo_distill.forms import Form
from orpo_distill.importing import import_texts
from orpo_distill.interrupt import signals_raise
from orpo_distill.loading import load_config, parse_component, parse_yaml
from orpo_distill.progress import say
from orpo_distill.samplers import Decoding, Sampler
from orpo_distill.tasks import Task
from orpo_distill.verifiers import Verifier

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
QUICKSTART = Path(__file__).parent / "quickstart"
"""What is embedded: three checkpoints, problems and a config."""

EMBEDDED = {"quickstart": "student", "quickstart-sibling": "sibling"}
"""Configs that need no file, and the folder of their student."""

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
"""How a setting begins, where it stands among file names."""

ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help=f"an experiment's YAML file, or {' or '.join(EMBEDDED)}")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings, for instance train.learning_rate=1e-5")]
Redo = Annotated[list[str] | None, typer.Option(help="make this stage, and what depends on it, anew (repeatable)")]
Keep = Annotated[list[str] | None, typer.Option(help="accept this stage although its settings changed (repeatable)")]


LedgerPath = Annotated[Path | None, typer.Option(help="the ledger of paid calls; default: in your data folder")]


@app.command()
def run(
    config: ConfigName,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="do only this stage and what it needs")] = None,
    pilot: Annotated[int | None, typer.Option(min=1, help="only up to pairs, on this many problems")] = None,
    redo: Redo = None,
    keep: Keep = None,
    ledger: LedgerPath = None,
) -> None:
    """Distil: run every stage that is missing, to the report and the final student."""
    settings = _config(config, _with_ledger(overrides, ledger))
    if pilot is not None and until is not None:
        raise ConfigError("expected --until or --pilot, found both; a pilot always ends with round 1's pairs")
    if pilot is not None:
        from orpo_distill.pilot import pilot as run_pilot

        print(run_pilot(settings, pilot, redo or (), keep or ()))
        _print_bill(settings)
        return
    folder = run_experiment(settings, until, redo or (), keep or ())
    if until is None:
        _print_results(folder)
    else:
        say(f"done up to {until}: {folder / until}")


@app.command()
def check(
    config: ConfigName,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="print this many rendered prompts and one training row")] = 0,
    ledger: LedgerPath = None,
) -> None:
    """Find every error of a config, then print the plan with its sizes and the bill to expect. Loads no model."""
    from orpo_distill.preview import plan_table, rendered

    settings = _config(config, _with_ledger(overrides, ledger))
    table, missing = plan_table(settings)
    _print_table(table)
    _print_bill(settings)
    if show:
        print(rendered(settings, show))
    if missing:
        sys.stdout.flush()
        raise ConfigError(missing)


@app.command(name="ledger")
def show_ledger(
    ledger: LedgerPath = None,
    export: Annotated[Path | None, typer.Option(help="write everything to this .jsonl or .parquet file")] = None,
    what: Annotated[Literal["samples", "attempts"], typer.Option(help="what to export")] = "samples",
) -> None:
    """Say what was bought from APIs, by day and model: calls, tokens, money, and what may have been paid unseen."""
    from orpo_distill.billing import export_ledger, ledger_table, nothing_bought

    if (words := nothing_bought(ledger)) is not None:
        print(words)
    elif export is None:
        _print_table(ledger_table(ledger))
    else:
        say(f"{export_ledger(ledger, export, what)} {what} in {export}")


@app.command()
def compare(
    items: Annotated[
        list[str], typer.Argument(metavar="CONFIG", help=f"experiments, {' or '.join(EMBEDDED)}; settings as for run")
    ],
    methods: Annotated[str, typer.Option(help="a list with commas")] = ",".join(DEFAULT_METHODS),
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method, from the config's seed on")] = 3,
    sweep: Annotated[list[str] | None, typer.Option(help="key=value,value,... (repeatable); K: traces used")] = None,
    vary: Annotated[Literal["traces"] | None, typer.Option(help="sample teacher and student anew for a seed")] = None,
    budgets: Annotated[
        str, typer.Option(help="epochs: as many for all; tokens: as many trained tokens")
    ] = "epochs,tokens",
    learning_rates: Annotated[
        str | None, typer.Option(help="to choose from on validation; default: multiples of the config's")
    ] = None,
    name: Annotated[str | None, typer.Option(help="folder below runs/; default: CONFIG's name and -compare")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time, each with its share of the devices")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="only print how many stages there are, and are shared")] = False,
    ledger: LedgerPath = None,
) -> None:
    """Run methods, seeds and sweeps of one config on the same traces, and test what differs."""
    from orpo_distill.compare.running import compare as run_comparison
    from orpo_distill.compare.tables import plan_table, summary

    files, overrides = _files_and_settings(items)
    configs = [_config(file, _with_ledger(overrides, ledger)) for file in files]
    wanted = Wanted(methods, tuple(sweep or ()), seeds, learning_rates, budgets, vary == "traces", name)
    design = design_of(configs, wanted)
    if plan:
        _print_table(plan_table(design))
        return
    folder = run_comparison(design, jobs, shlex.join(["orpo-distill", *sys.argv[1:]]))
    for table in summary(json.loads((folder / "compare.json").read_bytes())):
        _print_table(table)
        print()
    print(f"report: {folder / 'report.html'}   tables: {folder / 'compare.md'}   figures: {folder / 'compare.json'}")


@app.command()
def status(folder: Annotated[Path, typer.Argument(help="a run folder, for instance runs/quickstart")]) -> None:
    """Say which stages of a run are finished."""
    _print_table([("stage", "state", "result"), *run_status(folder)])


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a checkpoint folder or hub id")],
    task: Annotated[str, typer.Option(help="a task's name, or its options as YAML: '{type: jsonl, ...}'")],
    path: Annotated[Path | None, typer.Option(help="the task's local folder or file")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="number of problems")] = None,
    split: Annotated[str, typer.Option(help="the split to answer")] = "test",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    sampler: Annotated[str, typer.Option(help="a sampler's name, or its options as YAML")] = "hf",
    ledger: LedgerPath = None,
) -> None:
    """Measure a model on a task; prints JSON with n, correct, accuracy, low, high."""
    from orpo_distill.stages.evaluate import evaluate_model

    spec = _spec(task)
    if path is not None:
        spec["path"] = str(path)
    decoding = Decoding(temperature=0.0, max_new_tokens=max_new_tokens)
    engine = parse_component(Sampler, _spec(sampler), "--sampler").for_run("eval", ledger)
    print(json.dumps(evaluate_model(model, parse_component(Task, spec, "--task"), engine, decoding, split, limit)))


@app.command()
def verify(
    verifier: Annotated[str, typer.Option(help="number, choice, yes_no, exact, math, or module:Class")],
) -> None:
    """Judge JSON Lines (text, answer, optional question, choices, finish_reason): verdicts with reasons out."""
    from orpo_distill.cases import judge_lines

    for line in judge_lines(parse_component(Verifier, _spec(verifier), "--verifier"), sys.stdin):
        print(line, flush=True)


@app.command(name="import")
def import_(
    config: ConfigName,
    items: Annotated[list[str], typer.Argument(metavar="FILE", help="files of texts; settings as for `run`")],
    policy: Annotated[str, typer.Option(help="who wrote the texts: teacher or student-0")] = "teacher",
    form: Annotated[Form | None, typer.Option(help="what the files hold; found out from their content")] = None,
    redo: Redo = None,
    ledger: LedgerPath = None,
) -> None:
    """Put texts you already own into a run; the next `run` samples only what is missing."""
    files, overrides = _files_and_settings(items)
    if not files:
        raise ConfigError("expected files of texts behind the config, found none; name at least one")
    settings = _config(config, _with_ledger(overrides, ledger))
    print(import_texts(settings, [Path(file) for file in files], policy, form, redo or ()))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="a run folder, for instance runs/quickstart")],
    form: Annotated[Format, typer.Option(help="whose format; batch: requests for missing teacher texts")],
    out: Annotated[Path, typer.Option(help="the file to write, .jsonl or .parquet")],
    number: Annotated[int | None, typer.Option("--round", min=1, help="default: the last one with pairs")] = None,
    ledger: LedgerPath = None,
) -> None:
    """Write a run's pairs in the format of another trainer, or requests for the teacher's missing texts."""
    print(export_rows(folder, form, out, number, ledger))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folders, or the folder of a comparison")],
    out: Annotated[Path | None, typer.Option(help="the file to write; default: report.html where it belongs")] = None,
) -> None:
    """Write the HTML report of a run, of several side by side, or of a comparison, from the files that are there."""
    from orpo_distill.reporting import write_report

    print(write_report(folders, out))


@app.command()
def quickstart(overrides: Overrides = None, redo: Redo = None, keep: Keep = None, ledger: LedgerPath = None) -> None:
    """Run the whole job on the embedded tiny teacher and student (1 to 2 minutes on 2 CPU cores)."""
    settings = _config("quickstart", _with_ledger(overrides, ledger))
    _print_results(run_experiment(settings, None, redo or (), keep or ()))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one message and an exit code."""
    sys.path.append(str(Path.cwd()))  # for components of a user's own, named as module:Class
    try:
        with signals_raise():
            app(standalone_mode=True)
    except Interrupted as error:
        say("interrupted; everything finished so far is kept: run the same command to go on")
        raise SystemExit(error.exit_code) from None
    except OrpoDistillError as error:
        say(f"error: {error}")
        raise SystemExit(error.exit_code) from None


def _config(name: str, overrides: Sequence[str]) -> Config:
    """The config in a file, or an embedded one where there is no file of that name."""
    if name not in EMBEDDED or Path(name).is_file():
        return load_config(Path(name), overrides)
    folders = {"task.path": "problems", "teacher.model": "teacher", "student.model": EMBEDDED[name]}
    embedded = [_path_setting(key, QUICKSTART / folder) for key, folder in folders.items()]
    return load_config(QUICKSTART / "quickstart.yaml", [f"name={name}", *embedded, *overrides])


def _files_and_settings(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """File names, and settings that stand among them."""
    settings = [item for item in items if OVERRIDE.match(item) and not Path(item).exists()]
    return [item for item in items if item not in settings], settings


def _with_ledger(overrides: Sequence[str] | None, ledger: Path | None) -> list[str]:
    return [*(overrides or ()), *([_path_setting("ledger", ledger)] if ledger else [])]


def _path_setting(key: str, path: Path) -> str:
    """An override whose value YAML reads as this path, whatever signs it has."""
    return f"{key}={json.dumps(str(path))}"


def _spec(text: str) -> dict[str, Any]:
    """A component's options from the command line: a name, or a mapping in YAML."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"expected a name or a mapping in YAML, found {text!r}: {error}") from error
    return value if isinstance(value, dict) else {"type": str(value)}


def _print_results(folder: Path) -> None:
    from orpo_distill.stages.report import headline_text, results_table

    content: dict[str, Any] = json.loads((folder / "report" / "report.json").read_bytes())
    _print_table(results_table(content, content["headline"]["split"]))
    print(headline_text(content["headline"]))
    print(f"report: {folder / 'report' / 'report.html'}   model: {folder / 'student'}")


def _print_bill(settings: Config) -> None:
    """What paid calls will come to, if there are any."""
    from orpo_distill.billing import forecast

    if bill := forecast(settings):
        print()
        _print_table(bill)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
