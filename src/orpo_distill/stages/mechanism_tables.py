"""The measures of `mechanisms` as tables of text, with a note each, and the warnings that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from orpo_distill.measures import CHANGE

Row = dict[str, Any]

MEASURES = {
    "rouge_l": "mean pairwise ROUGE-L F1",
    "distinct_2": "distinct-2",
    "unique_answers": "unique answers",
    "words": "words a trace",
}
PERCENT = ("unique_answers",)
DRIED_UP = 0.5  # share of the latest student's problems without a usable negative, above which it is named
CUT = 0.1  # rise of the share of test answers that are cut, above which it is named

NO_NEGATIVES = "Left out: this run has no two sources with enough negatives for the same problems."
COMPARED = (
    "{traces} negatives of both sources for each problem that has as many of both, the first by sample index; "
    "`difference` is source - reference with a 95% interval, normal over problems (none for fewer than 10)."
)


def tables(measures: Row, open_ended: bool = False) -> list[Row]:
    """Every table: `title`, `note`, `columns`, `rows`. One that a run cannot fill has no rows, and says why."""
    return [
        _negatives(measures["negatives"], open_ended),
        _diversity(measures["diversity"]),
        _trained_on(measures["trained_on"], bool(measures["diversity"])),
        _likelihood(measures["likelihood"], bool(measures["diversity"])),
        _training(measures["training"]),
        _texts(measures["texts"]),
    ]


def _table(title: str, note: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Row:
    return {"title": title, "note": note, "columns": list(columns), "rows": [list(row) for row in rows]}


def _negatives(rows: Sequence[Row], open_ended: bool) -> Row:
    note = (
        "Outcomes of the samples that negatives are taken from. `dried up`: problems without a wrong trace; `fell "
        "back`: problems of the latest student for which the initial one's negatives stood in."
    )
    if not any(row["policy"] != "teacher" for row in rows):
        note += " No student was sampled: this objective or these settings use no negatives of it."
    if open_ended:
        note += " The task has no right answers: a student's text counts as wrong by role, the teacher's as correct."
    outcomes = ("wrong", "correct", "truncated", "unparseable", "failed")
    columns = ("round", "phi", "policy", "problems", "samples", *outcomes, "dried up", "fell back")
    shown = [
        (
            str(row["round"]),
            _number(row.get("phi")),
            _who(row),
            str(row["problems"]),
            str(row["samples"]),
            *(_percent(row[name]) for name in ("wrong", "correct", "truncated")),
            _percent(None if row["unparseable"] is None else row["unparseable"] + row["ambiguous"]),
            _percent(row["failed"]),
            _percent(row["dried_up"] / row["problems"] if row["problems"] else None),
            _percent(row["fell_back"] / row["sent_to_latest"] if row.get("sent_to_latest") else None),
        )
        for row in rows
    ]
    return _table("Negatives by round", note, columns, shown)


def _diversity(rows: Sequence[Row]) -> Row:
    note = COMPARED.format(traces=rows[0]["traces"]) if rows else NO_NEGATIVES
    columns = ("round", "negatives of", "reference", "measure", "problems", "source", "reference's", *_DIFFERENCE)
    shown = [(str(row["round"]), row["source"], row["reference"], *_compared(row)) for row in rows]
    return _table("Diversity of the negatives", note, columns, shown)


def _trained_on(rows: Sequence[Row], has_negatives: bool) -> Row:
    note = "Rejected sides as the pair stage kept them (after its filters), against those of round 1. "
    if rows:
        note += COMPARED.format(traces=rows[0]["traces"]).replace("by sample index", "in pairs.jsonl")
    elif has_negatives:
        note += "Left out: no later round has pairs of its own with enough rejected traces."
    else:
        note += NO_NEGATIVES
    columns = ("pairs of", "reference", "measure", "problems", "source", "reference's", *_DIFFERENCE)
    shown = [(row["source"], row["reference"], *_compared(row)) for row in rows]
    return _table("Diversity of what was trained on", note, columns, shown)


_DIFFERENCE = ("difference", "95% interval")


def _compared(row: Row) -> tuple[str, ...]:
    as_text = _percent if row["measure"] in PERCENT else _number
    values = (as_text(row["first"]), as_text(row["second"]))
    return (MEASURES[row["measure"]], str(row["problems"]), *values, *_difference(row, as_text))


def _difference(row: Row, as_text: Any) -> tuple[str, str]:
    def signed(value: float) -> str:
        return f"+{as_text(value)}" if value >= 0 else as_text(value)

    interval = "" if row["low"] is None else f"{signed(row['low'])} to {signed(row['high'])}"
    return signed(row["difference"]), interval


def _likelihood(rows: Sequence[Row], has_negatives: bool) -> Row:
    note = "Mean token log-probability (nats) of negatives under the student that the round begins with. "
    if rows:
        note += COMPARED.format(traces=rows[0]["traces"]) + " The problems are chosen by seed."
    else:
        note += "Left out: mechanisms.problems is 0, or no text fits." if has_negatives else NO_NEGATIVES
    columns = ("round", "student", "negatives of", "problems", "log-probability", "student-0's", *_DIFFERENCE)
    shown = [
        (
            str(row["round"]),
            row["student"],
            row["source"],
            str(row["problems"]),
            *(_number(row[name]) for name in ("first", "second")),
            *_difference(row, _number),
        )
        for row in rows
    ]
    return _table("Likelihood of the negatives", note, columns, shown)


def _training(rows: Sequence[Row]) -> Row:
    note = (
        "Mean token log-probabilities (nats) of the two sides in the training log: the mean of the first tenth of the "
        "steps, then of the last. `margin` is chosen - rejected. From round 2 on the rejected side may be other texts."
    )
    if not rows:
        note = "Left out: the objective does not log `logps/chosen`."
    elif any(row["rejected"] is None for row in rows):
        note += " Without a rejected side only the chosen one is shown."
    columns = ("training", "round", "steps", "chosen", "rejected", "margin")
    shown = [
        (
            "sft (control)" if row["control"] else "run",
            "all" if row["round"] is None else str(row["round"]),
            str(row["steps"]),
            *(_course(row[name]) for name in ("chosen", "rejected", "margin")),
        )
        for row in rows
    ]
    return _table("Log-probabilities in training", note, columns, shown)


def _texts(rows: Sequence[Row]) -> Row:
    note = (
        "Evaluation answers, and samples for training. Words are what spaces part; tokens are the sampler's own count. "
        "`parsed` is the share that states an answer."
    )
    columns = ("texts", "policy", "number", "words", "tokens", "parsed", "truncated")
    shown = [
        (
            row["where"],
            _who(row),
            str(row["texts"]),
            *(_number(row[name]) for name in ("words", "tokens")),
            *(_percent(row[name]) for name in ("parsed", "truncated")),
        )
        for row in rows
    ]
    return _table("Length and form of the texts", note, columns, shown)


def _who(row: Row) -> str:
    return f"{row['policy']}, same samples as {row['same_as']}" if row["same_as"] else str(row["policy"])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _course(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:.3f} to {values[1]:.3f}"


def warnings(measures: Row) -> list[str]:
    """What in the measures should make one stop and look, each with its name first."""
    return [*_falling(measures["training"]), *_drying(measures["negatives"]), *_cutting(measures["texts"])]


def _falling(rows: Sequence[Row]) -> Iterable[str]:
    falling = [row for row in rows if row["chosen_falls"] and not row["control"]]
    whole = [row for row in falling if row["round"] is None]
    for row in whole or falling:
        where = "over the training" if row["round"] is None else f"in round {row['round']}"
        yield (
            f"chosen falls while the margin grows: {where} the chosen side's log-probability went from "
            f"{_course(row['chosen'])} nats a token and its lead from {_course(row['margin'])} (named where both "
            f"change by more than {CHANGE})"
        )


def _drying(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        if row.get("sent_to_latest") and row["dried_up"] > DRIED_UP * row["problems"]:
            yield (
                f"negatives dry up: in round {row['round']} {row['policy']} gave no usable negative for "
                f"{row['dried_up']} of {row['problems']} problems"
            )


def _cutting(rows: Sequence[Row]) -> Iterable[str]:
    test = [row for row in rows if row["where"] == "test" and row["policy"].startswith("student-")]
    for row in test[1:]:
        if row["truncated"] - test[0]["truncated"] > CUT:
            yield (
                f"answers are cut: {row['truncated']:.1%} of {row['policy']}'s test answers, "
                f"{test[0]['truncated']:.1%} of {test[0]['policy']}'s, end before they state one"
            )
