"""From problems to pairs: the funnel, what fell out and why, outcomes, lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from orpo_distill.page.blocks import Block, Chart, Charts, Section, Table, Text, count, number, percent
from orpo_distill.page.drawing import MARKER_SIZE, MARKERS, Drawing, colour, labels, series
from orpo_distill.page.files import round_of
from orpo_distill.page.measures import OUTCOMES, UNJUDGED, Lengths, Measured, Paired, mean, quantile

MOST_BARS = 3  # rounds that the funnel chart shows: the first, and the last ones
REASONS = {
    "no_chosen": "no chosen trace was left",
    "no_rejected": "no rejected trace was left",
    "prompt_too_long": "the prompt is too long",
    "too_long": "too long",
    "too_short": "too short",
    "too_similar": "too similar to a kept one",
    "duplicate": "the same text as an earlier one",
    "over_max_chosen": "more than max_chosen",
    "unpaired": "usable, but not needed",
    "undecided": "the judge could not tell in any of its pairs",
    "orders_disagree": "the judge's two orders disagree",
    "tie": "the judge sees no difference",
    "nonsense": "the judge talks nonsense",
    "no_answer": "the judge gave no answer",
    "same": "both texts are equal",
    "lost": "the judge prefers the rejected one, which was cut",
}
"""Of `dropped.jsonl`, in words. Outcomes stand for themselves."""


def yield_section(pairings: Sequence[Paired]) -> Section | None:
    """The funnel, the yield and what was dropped, by round; None before the first pairs."""
    if not pairings:
        return None
    blocks: list[Block] = [_funnel(pairings), Charts([_funnel_chart(pairings), _yield_chart(pairings)])]
    blocks += [_yield(pairings), *(table for side in SIDES if (table := _dropped(pairings, side)))]
    return Section("yield", "From problems to pairs", blocks)


Step = tuple[str, Callable[[Paired], int | None]]
STEPS: list[Step] = [
    ("problems", lambda each: each.problems),
    ("with a correct teacher trace", lambda each: each.solved),
    ("and a wrong trace against it", lambda each: each.contrasted),
    ("in a pair", lambda each: each.paired),
]
SIDES = {
    "problem": "Problems without a pair",
    "chosen": "Unused on the chosen side",
    "rejected": "Unused, rejected side",
}


def _funnel(pairings: Sequence[Paired]) -> Table:
    rows = [[name, *(_of(step(each), each.problems) for each in pairings)] for name, step in _steps(pairings)]
    note = (
        "A round's wrong traces are those of the student that the coin of phi asked, with the initial student's where "
        "it stands in. What lies between the last two steps fell to length, likeness or pairing."
    )
    return Table("Funnel", ["step", *(f"round {each.round}" for each in pairings)], rows, note)


def _steps(pairings: Sequence[Paired]) -> list[Step]:
    """Those that there are: without a rejected side no wrong trace is needed."""
    return [(name, step) for name, step in STEPS if any(step(each) is not None for each in pairings)]


def _of(value: int | None, whole: int) -> str:
    return "–" if value is None else f"{value:,} ({value / whole:.0%})" if whole else count(value)


def _funnel_chart(pairings: Sequence[Paired]) -> Chart:
    shown = [pairings[0], *pairings[1:][-(MOST_BARS - 1) :]]
    drawing = Drawing("funnel", height=2.9)
    steps, size = _steps(shown), 0.8 / len(shown)
    for place, each in enumerate(shown):
        values = [step(each) or 0 for _, step in steps]
        at = [row + place * size for row in range(len(steps))]
        bars = drawing.axes.barh(at, values, height=size * 0.9, color=series(place), label=f"round {each.round}")
        drawing.axes.bar_label(bars, [f" {value:,}" for value in values], color=colour("muted"), fontsize=7)
    drawing.axes.set_yticks([row + 0.4 - size / 2 for row in range(len(steps))], [name for name, _ in steps])
    drawing.axes.invert_yaxis()
    drawing.axes.grid(axis="y", visible=False)
    drawing.axes.set_xlabel("problems")
    drawing.axes.margins(x=0.12)
    drawing.legend()
    said = "; ".join(
        f"round {each.round}: " + ", ".join(f"{step(each) or 0} {name}" for name, step in steps) for each in shown
    )
    return drawing.chart("Funnel", f"Problems left after each step. {said}.")


def _yield_chart(pairings: Sequence[Paired]) -> Chart:
    """Pairs by round, by who wrote the rejected side."""
    drawing = Drawing("yield", height=2.9)
    policies = sorted({policy for each in pairings for policy in each.metrics.get("rejected_policies", {})})
    xs = [each.round for each in pairings]
    totals = [each.metrics.get("pairs") or len(each.chosen.words) for each in pairings]
    base = [0.0] * len(pairings)
    for place, policy in enumerate(policies):
        shares = [each.metrics.get("rejected_policies", {}).get(policy, 0) for each in pairings]
        parts = [share * total for share, total in zip(shares, totals, strict=True)]
        name = labels([f"against {policy}"])[0]
        drawing.axes.bar(xs, parts, 0.6, base, color=series(place), label=name)
        base = [low + part for low, part in zip(base, parts, strict=True)]
    if not policies:
        drawing.axes.bar(xs, totals, 0.6, color=series(0))
    drawing.axes.set_xticks(xs)
    drawing.axes.set_xlabel("round")
    drawing.axes.set_ylabel("pairs")
    drawing.from_zero()
    drawing.axes.grid(axis="x", visible=False)
    drawing.legend(columns=2)
    said = ", ".join(f"round {x}: {total:,}" for x, total in zip(xs, totals, strict=True))
    return drawing.chart("Pairs by round", f"Pairs by round, by who wrote the rejected side. {said}.")


def _yield(pairings: Sequence[Paired]) -> Table:
    rows = []
    for each in pairings:
        found = each.metrics
        sources = ", ".join(f"{policy} {share:.0%}" for policy, share in found.get("rejected_policies", {}).items())
        fell_back = f"{found.get('fell_back', 0):,} of {found.get('sent_to_latest', 0):,}"
        pairs = found.get("pairs", len(each.chosen.words))
        used = found.get("used", {})
        rows.append(
            [
                str(each.round),
                count(pairs),
                number(found.get("pairs_per_problem")),
                count(used.get("chosen")),
                count(used.get("rejected")),
                sources or "–",
                fell_back if found.get("sent_to_latest") else "–",
            ]
        )
    columns = ["round", "pairs", "a paired problem", "chosen traces", "rejected traces", "rejected side by"]
    note = "Fell back: problems whose latest student made no usable wrong trace, so that the initial one's stood in."
    return Table("Yield", [*columns, "fell back"], rows, note)


def _dropped(pairings: Sequence[Paired], side: str) -> Table | None:
    """Why things fell out on a side, by round."""
    reasons = sorted(
        {reason for each in pairings for reason in each.dropped[side]},
        key=lambda reason: (-sum(each.dropped[side][reason] for each in pairings), reason),
    )
    if not reasons:
        return None
    rows = [
        [REASONS.get(reason, reason), *(count(each.dropped[side][reason]) for each in pairings)] for reason in reasons
    ]
    return Table(SIDES[side], ["reason", *(f"round {each.round}" for each in pairings)], rows)


def outcomes_section(measured: Sequence[Measured]) -> Section | None:
    """Traces by outcome, parse and truncation rates."""
    shown = [each for each in measured if each.traces]
    if not shown:
        return None
    names = [name for name in (*OUTCOMES, UNJUDGED) if any(each.outcomes[name] for each in shown)]
    rows = [
        [
            each.source.name,
            count(each.traces),
            *(percent(each.share(name)) for name in names),
            percent(each.parsed),
            percent(each.cut / each.traces),
        ]
        for each in shown
    ]
    note = "States an answer: right or wrong. Cut: at max_new_tokens, before or after the answer."
    table = Table("Traces by outcome", ["written by", "traces", *names, "states an answer", "cut"], rows, note)
    charts = [_outcomes_chart(shown, names), _rates_chart(shown)]
    return Section("outcomes", "Outcomes, parsing, truncation", [table, Charts(charts)])


def _outcomes_chart(measured: Sequence[Measured], names: Sequence[str]) -> Chart:
    drawing = Drawing("outcomes", height=0.9 + 0.24 * len(measured))
    places = list(range(len(measured)))
    base = [0.0] * len(measured)
    for name in names:
        shares = [each.share(name) or 0.0 for each in measured]
        drawing.axes.barh(places, shares, 0.7, base, color=outcome_colour(name), label=name)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    drawing.axes.set_yticks(places, labels([each.source.name for each in measured]))
    drawing.axes.invert_yaxis()
    drawing.axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    drawing.axes.grid(axis="y", visible=False)
    drawing.legend()
    said = "; ".join(f"{each.source.name}: {percent(each.share('correct'))} correct" for each in measured)
    return drawing.chart("Outcomes", f"Share of traces by outcome. {said}.")


def outcome_colour(name: str) -> str:
    """One colour an outcome, the same everywhere on the page."""
    return series([*OUTCOMES, UNJUDGED].index(name))


def _rates_chart(measured: Sequence[Measured]) -> Chart:
    """Parse and truncation rates of evaluated students by round."""
    drawing = Drawing("rates", height=2.5)
    rounds = [each for each in measured if each.source.kind == "evaluated" and round_of(each.source.policy) is not None]
    rounds = rounds or list(measured)
    xs = [each.source.round for each in rounds]
    said = []
    parsed = [each.parsed or 0 for each in rounds]
    cut = [each.cut / each.traces for each in rounds]
    for place, (name, values) in enumerate((("states an answer", parsed), ("cut", cut))):
        drawing.axes.plot(xs, values, color=series(place), marker=MARKERS[place], markersize=MARKER_SIZE, label=name)
        said.append(f"{name}: " + ", ".join(f"{value:.1%}" for value in values))
    drawing.axes.set_ylim(-0.03, 1.03)
    drawing.axes.set_xticks(sorted(set(xs)))
    drawing.axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    drawing.axes.set_xlabel("rounds of training")
    drawing.axes.set_ylabel("share of evaluated answers")
    drawing.legend()
    return drawing.chart("Parsed and cut", f"Evaluated students by rounds of training. {'; '.join(said)}.")


def lengths_section(measured: Sequence[Measured], pairings: Sequence[Paired]) -> Section | None:
    """How long texts are, by round."""
    shown = [each for each in measured if each.lengths.words]
    if not shown:
        return None
    rows = [[each.source.name, *_spread(each.lengths)] for each in shown]
    for each in pairings:
        rows.append([f"chosen in pairs of round {each.round}", *_spread(each.chosen)])
        if each.rejected.words:
            rows.append([f"rejected in pairs of round {each.round}", *_spread(each.rejected)])
    columns = ["texts", "words, mean", "10% below", "median", "90% below", "tokens, mean"]
    note = "Tokens are those of the model that wrote the text, so teacher and student do not compare in them."
    students = [each for each in shown if round_of(each.source.policy) is not None]
    blocks: list[Block] = []
    if students:
        blocks.append(Charts([_lengths_chart(students), *([_sides_chart(pairings)] if pairings else [])]))
    return Section("lengths", "Lengths", [*blocks, Table("Lengths of texts", columns, rows, note), *_drift(students)])


def _spread(lengths: Lengths) -> list[str]:
    words = lengths.words
    quantiles = [count(quantile(words, share)) for share in (0.1, 0.5, 0.9)]
    return [number(mean(words)), *quantiles, number(mean(lengths.tokens))]


def _drift(students: Sequence[Measured]) -> list[Block]:
    """A warning where the last evaluated student writes much longer or shorter than the first."""
    evaluated = [each for each in students if each.source.kind == "evaluated"]
    if len(evaluated) < 2:
        return []
    first, last = (mean(each.lengths.words) or 0.0 for each in (evaluated[0], evaluated[-1]))
    if not first or 1 / 1.5 <= last / first <= 1.5:
        return []
    text = (
        f"Answers went from {first:.0f} to {last:.0f} words from {evaluated[0].source.policy} to "
        f"{evaluated[-1].source.policy}. Look at the share of answers that were cut."
    )
    return [Text(text, "warning")]


def _lengths_chart(students: Sequence[Measured]) -> Chart:
    drawing, said = Drawing("lengths", height=2.5), []
    kinds = {"sampled": "sampled for training", "evaluated": "evaluated"}
    for place, (kind, name) in enumerate(kinds.items()):
        rows = [each for each in students if each.source.kind == kind]
        if not rows:
            continue
        xs = [(round_of(each.source.policy) or 0) + 0.06 * (2 * place - 1) for each in rows]
        ys = [mean(each.lengths.words) or 0.0 for each in rows]
        low = [max(0.0, y - (quantile(each.lengths.words, 0.1) or 0)) for y, each in zip(ys, rows, strict=True)]
        high = [max(0.0, (quantile(each.lengths.words, 0.9) or 0) - y) for y, each in zip(ys, rows, strict=True)]
        drawing.axes.errorbar(
            xs,
            ys,
            yerr=[low, high],
            color=series(place),
            marker=MARKERS[place],
            markersize=MARKER_SIZE,
            capsize=3,
            elinewidth=0.8,
            label=name,
        )
        said.append(f"{name}: " + ", ".join(f"{y:.0f}" for y in ys))
    drawing.axes.set_xticks(range(max(round_of(each.source.policy) or 0 for each in students) + 1))
    drawing.from_zero()
    drawing.axes.set_xlabel("rounds of training")
    drawing.axes.set_ylabel("words")
    drawing.legend()
    note = "Means; bars from the shortest to the longest tenth."
    return drawing.chart("Length of the student's texts", f"Mean words by rounds of training. {'; '.join(said)}.", note)


def _sides_chart(pairings: Sequence[Paired]) -> Chart:
    drawing, said = Drawing("sides", height=2.5), []
    xs = [each.round for each in pairings]
    for place, name in enumerate(("chosen", "rejected")):
        sides = [each.chosen.words if name == "chosen" else each.rejected.words for each in pairings]
        ys = [fmean(words) for words in sides if words]
        if len(ys) == len(xs):  # a round has pairs; without an objective that contrasts, none has a rejected side
            drawing.axes.plot(xs, ys, color=series(place), marker=MARKERS[place], markersize=MARKER_SIZE, label=name)
            said.append(f"{name}: " + ", ".join(number(y) for y in ys))
    drawing.axes.set_xticks(xs)
    drawing.from_zero()
    drawing.axes.set_xlabel("round")
    drawing.axes.set_ylabel("words")
    drawing.legend()
    return drawing.chart("Length of both sides", f"Mean words in pairs, by round. {'; '.join(said)}.")
