"""Judge: which of two texts is better, where there are no gold answers. For pairs, and for the students' win rates.

The judge's texts are traces like all others (policy `judge`): kept, resumed, and billed by the ledger where they are
bought. `judgements.jsonl` has what each two of them mean together (`Preference`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from orpo_distill.component import Options
from orpo_distill.errors import DataError
from orpo_distill.judging import Judge, Match, preference, requests_of
from orpo_distill.progress import say
from orpo_distill.records import (
    Answer,
    FinishReason,
    Pair,
    Preference,
    Problem,
    Trace,
    atomic_file,
    read_jsonl,
    to_json,
    write_jsonl,
    write_text,
)
from orpo_distill.runs import read_manifest
from orpo_distill.sampling import Author, sample_traces, standing_traces, take_over
from orpo_distill.stages.pair import Tally
from orpo_distill.stages.sieve import SIDES, Dropped
from orpo_distill.win_rates import compared, counted, win_rate

JUDGEMENTS, WIN_RATES = "judgements.jsonl", "win-rates.json"
Row = dict[str, Any]


class JudgePairsOptions(Options):
    """Who judges. `judge.pairs` is true."""

    judge: Judge
    seed: int


class JudgeAnswersOptions(JudgePairsOptions):
    """Who judges whose answers."""

    policy: str
    against: tuple[str, ...]  # policies; inputs of these names are their evaluations


def judge_pairs(options: JudgePairsOptions, inputs: Mapping[str, Path], out: Path) -> Row:
    """Write `pairs.jsonl`: those of inputs["candidates"], with the text that the judge prefers as the chosen one.

    Where it cannot tell there is no pair, and `dropped.jsonl` has the reason. What was asked in inputs["previous"], the
    round before, is taken from there. Raises DataError where no pair is left.
    """
    problems = {one.id: one for one in read_jsonl(inputs["problems"] / "problems.jsonl", Problem)}
    candidates = list(read_jsonl(inputs["candidates"] / "pairs.jsonl", Pair))
    matches = [
        Match(problems[each.problem_id], each.chosen, each.rejected, each.chosen_id, each.rejected_id)
        for each in candidates
    ]
    found = _judged(options, matches, out, inputs.get("previous"))
    tally = Tally()
    before = (inputs["candidates"] / "dropped.jsonl").read_bytes()
    with atomic_file(out / "pairs.jsonl") as pair_file, atomic_file(out / "dropped.jsonl") as dropped_file:
        dropped_file.write(before)
        both = zip(candidates, found, strict=True)
        for _, group in groupby(both, key=lambda each: each[0].problem_id):
            pairs, dropped = _of_problem(list(group))
            tally.add(pairs, dropped)
            pair_file.writelines((to_json(row) + "\n").encode() for row in pairs)
            dropped_file.writelines((to_json(row) + "\n").encode() for row in dropped)
    counts = counted(found)
    if not tally.pairs:
        raise DataError(
            f"expected a judge that prefers one text of a pair or more in both orders, found none among {len(found)} "
            f"({_reasons(counts)}){''.join(f'; {warning}' for warning in counts['warnings'])}; read its answers in "
            f"{out / 'traces.jsonl'}, then change judge.prompt or judge.model, or set judge.pairs: false (by role)"
        )
    _warn(counts, "judge")
    return _metrics(read_manifest(inputs["candidates"]).metrics, tally) | {"judge": counts}


def judge_answers(options: JudgeAnswersOptions, inputs: Mapping[str, Path], out: Path) -> Row:
    """Write `win-rates.json`: how a policy's answers (inputs["answers"]) do against those of others, by split.

    Problems that one of the two has not answered are left out. Returns the rows by split and opponent.
    """
    own = _answers(inputs["answers"])
    problems = {
        (split, one.id): one
        for split in ("test", "validation")
        for one in read_jsonl(inputs["problems"] / f"{split}.jsonl", Problem)
    }
    matches: dict[tuple[str, str], list[Match]] = {}
    for against in options.against:
        others = _answers(inputs[against])
        for key, answer in own.items():
            if other := others.get(key):
                match = Match(problems[key], answer.text.strip(), other.text.strip(), answer.id, other.id)
                matches.setdefault((key[0], against), []).append(match)
    found = iter(_judged(options, [match for some in matches.values() for match in some], out))
    rows = []
    for (split, against), some in matches.items():
        preferences = [next(found) for _ in some]
        row = {"policy": options.policy, "against": against, "split": split, **win_rate(preferences)}
        _warn(row, compared(row))
        rows.append(row)
    write_text(out / WIN_RATES, json.dumps(rows, indent=1) + "\n")
    return {f"{row['split']}, against {row['against']}": row for row in rows}


def _judged(
    options: JudgePairsOptions, matches: Sequence[Match], out: Path, before: Path | None = None
) -> list[Preference]:
    """What the judge says of every match; writes `judgements.jsonl`. Raises DataError if all its answers failed."""
    judge = options.judge
    asked = [(match, requests_of(judge, match, options.seed)) for match in matches]
    requests = list(dict.fromkeys(one for _, both in asked for one in both))
    if before:
        take_over(requests, before, out)
    sample_traces(Author(judge.sampler, judge.model, judge.decoding, "judge"), requests, out)
    answers = dict(zip(requests, standing_traces(requests, out), strict=True))
    if answers and all(answer.finish_reason is FinishReason.ERROR for answer in answers.values()):
        first = next(iter(answers.values()))
        raise DataError(
            f"expected answers of the judge, found that all {len(answers)} failed, the first: {first.error}"
        )
    found = [preference(match, [answers[one] for one in both]) for match, both in asked]
    write_jsonl(out / JUDGEMENTS, found)
    return found


def _of_problem(judged: Sequence[tuple[Pair, Preference]]) -> tuple[list[Pair], list[Dropped]]:
    """A problem's pairs as the judge prefers them; and, with reasons, traces in none and the problem if it has none."""
    kept = [(pair, preference.result, _preferred(pair, preference.result)) for pair, preference in judged]
    pairs = [found for _, _, found in kept if found]
    used = {trace for found in pairs for trace in (found.chosen_id, found.rejected_id)}
    dropped = []
    for pair, result, found in kept:
        for side, trace in zip(SIDES, (pair.chosen_id, pair.rejected_id), strict=True):
            if not found and trace not in used:
                used.add(trace)
                dropped.append(Dropped(pair.problem_id, trace, side, result))
    if not pairs:
        dropped.append(Dropped(judged[0][0].problem_id, "", "problem", "undecided"))
    return pairs, dropped


def _preferred(pair: Pair, result: str) -> Pair | None:
    """The pair with the text that won as the chosen one; None if none did, or if it was cut."""
    if result == "lost" and not pair.rejected_cut:
        return replace(
            pair,
            chosen=pair.rejected,
            rejected=pair.chosen,
            chosen_id=pair.rejected_id,
            rejected_id=pair.chosen_id,
            chosen_policy=pair.rejected_policy,
            rejected_policy=pair.chosen_policy,
        )
    return pair if result == "won" else None


def _metrics(candidates: Row, tally: Tally) -> Row:
    """The candidates' metrics with what the judge has left of them."""
    own = tally.metrics()
    changed = ("pairs", "paired_problems", "pairs_per_problem", "used", "rejected_policies")
    before = candidates["dropped"].items()
    dropped = {side: dict(Counter(reasons) + Counter(own["dropped"][side])) for side, reasons in before}
    return {**candidates, **{key: own[key] for key in changed}, "dropped": dropped, "candidates": candidates["pairs"]}


def _answers(evaluation: Path) -> dict[tuple[str, str], Trace]:
    """By split and problem, the texts of an evaluation, but for those that failed."""
    traces = {trace.problem_id: trace for trace in read_jsonl(evaluation / "traces.jsonl", Trace)}
    return {
        (answer.split, answer.problem_id): traces[answer.problem_id]
        for answer in read_jsonl(evaluation / "answers.jsonl", Answer)
        if traces[answer.problem_id].finish_reason is not FinishReason.ERROR
    }


def _warn(counts: Row, where: str) -> None:
    for warning in counts["warnings"]:
        say(f"  {where}: {warning}")


def _reasons(counts: Row) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("tie", "orders_disagree", "nonsense", "no_answer", "same"))
