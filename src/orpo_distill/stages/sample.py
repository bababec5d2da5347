"""Sample: K traces a problem from one model, texts only. Whether they are right is found out by the verify stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, SerializeAsAny

from orpo_distill.component import SPEED_ONLY, Options
from orpo_distill.config import VerifySection
from orpo_distill.diversity import diverse
from orpo_distill.mixing import Phi, PhiUnit, latest_share, phi_in_force
from orpo_distill.progress import say
from orpo_distill.records import FinishReason, Outcome, Problem, Trace, derive_seed, read_jsonl, write_jsonl
from orpo_distill.samplers import Decoding, Request, Sampler
from orpo_distill.sampling import (
    Author,
    Usable,
    finish_traces,
    sample_missing,
    sample_traces,
    standing_traces,
    with_prefix,
)
from orpo_distill.tasks import Task
from orpo_distill.verification import judge, verify_all

NAMED = 10  # unsolved problems that are named on the screen; all stand in unsolved.jsonl


class StopRule(Options):
    """Sample in waves of K a problem, until a problem has `at` correct traces that are not alike, or `most` in all."""

    at: PositiveInt
    most: PositiveInt
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of each wave; the last one goes on
    rouge_l_max: float  # above this, two traces are alike
    verify: VerifySection = VerifySection()


class SampleOptions(Options):
    """What is sampled. `model` None stands for the `model` folder of the input stage `model`."""

    task: SerializeAsAny[Task]
    sampler: SerializeAsAny[Sampler]
    model: str | None
    decoding: Decoding
    samples: PositiveInt  # K
    policy: str  # teacher, student-0, ...
    prefix: str = ""  # before the last user message, with a blank line between them
    seed: int
    round: int = 0  # the round of training that this is for, if only the problems that phi's coin gives are sampled
    phi: Phi | None = 1.0  # None: as the stage inputs["phi"] has found
    phi_unit: PhiUnit = "problem"
    stopping: StopRule | None = None
    shard: Annotated[tuple[int, int] | None, SPEED_ONLY] = None  # process i of n


def sample(options: SampleOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `traces.jsonl`, in the order of problems and sample indices; return counts of traces and tokens.

    With a stop rule also `unsolved.jsonl`: the problems that got no correct trace. Raises ModelError or DataError if
    the sampler cannot be opened.
    """
    problems = list(read_jsonl(inputs["problems"] / "problems.jsonl", Problem))
    model = options.model or str(inputs["model"] / "model")
    author = Author(options.sampler, model, options.decoding, options.policy)
    if options.stopping is not None:
        return _in_waves(options, options.stopping, problems, author, out)
    phi = phi_in_force(options.phi, inputs)
    requests = [request for problem in problems for request in _requests(options, phi, problem)]
    sample_traces(author, requests, out, options.shard, _usable(options, problems))
    return {} if options.shard else _metrics(read_jsonl(out / "traces.jsonl", Trace))


def _usable(options: SampleOptions, problems: Sequence[Problem]) -> Usable | None:
    """Whether a trace can stand in a pair: the teacher's if it is right and whole, a student's if it is wrong.

    None, and no yield while it is sampled, for a verifier that may hang or take its time (`isolated`).
    """
    verifier = options.task.judge()
    if verifier.isolated:
        return None
    by_id = {problem.id: problem for problem in problems}

    def usable(trace: Trace) -> bool:
        verdict = judge(verifier, by_id[trace.problem_id], trace)
        if options.policy == "teacher":
            return verdict.correct is True and trace.finish_reason is FinishReason.STOP
        return verdict.outcome is Outcome.WRONG

    return usable


def _in_waves(
    options: SampleOptions, rule: StopRule, problems: Sequence[Problem], author: Author, out: Path
) -> dict[str, Any]:
    """Sample wave after wave. What a wave holds depends on the texts before it, never on when they arrived."""
    if options.shard is not None:
        problems = problems[options.shard[0] :: options.shard[1]]
    correct: dict[str, list[str]] = {problem.id: [] for problem in problems}
    asked: dict[str, list[Request]] = {problem.id: [] for problem in problems}
    unfinished, is_usable = list(problems), _usable(options, problems)
    for number, (indices, decoding) in enumerate(waves(options)):
        wave = [request for problem in unfinished for request in _asking(options, problem, indices)]
        sample_missing(replace(author, decoding=decoding), wave, out, options.shard, is_usable)
        for request in wave:
            asked[request.problem_id].append(request)
        for problem_id, text in _correct(options, rule, unfinished, standing_traces(wave, out)):
            correct[problem_id].append(text)
        kept = {name: diverse(texts, rule.rouge_l_max).count("") for name, texts in correct.items()}
        unfinished = [problem for problem in unfinished if kept[problem.id] < rule.at]
        usable = sum(kept.values())
        say(f"  {options.policy}, wave {number + 1}: {usable} usable traces, {len(unfinished)} problems left")
        if not unfinished:
            break
    if options.shard is not None:
        return {}
    finish_traces([request for requests in asked.values() for request in requests], out)
    write_jsonl(out / "unsolved.jsonl", (problem for problem in problems if not correct[problem.id]))
    return _metrics(read_jsonl(out / "traces.jsonl", Trace)) | _yield(options.sampler, kept)


def waves(options: SampleOptions) -> Iterator[tuple[range, Decoding]]:
    """Which samples of a problem are asked for together, and how they are drawn: one wave without a stop rule."""
    rule = options.stopping
    if rule is None:
        yield range(options.samples), options.decoding
        return
    for number, first in enumerate(range(0, rule.most, options.samples)):
        decoding = options.decoding
        if rule.temperatures:
            temperature = rule.temperatures[min(number, len(rule.temperatures) - 1)]
            decoding = decoding.model_copy(update={"temperature": temperature})
        yield range(first, min(first + options.samples, rule.most)), decoding


def _correct(
    options: SampleOptions, rule: StopRule, problems: Sequence[Problem], traces: Iterable[Trace]
) -> Iterator[tuple[str, str]]:
    """Problem and text of every trace that is right and whole."""
    by_id = {problem.id: problem for problem in problems}
    traces = list(traces)
    pairs = ((by_id[trace.problem_id], trace) for trace in traces)
    verdicts = verify_all(options.task.judge(), pairs, rule.verify.timeout, rule.verify.processes)
    for trace, verdict in zip(traces, verdicts, strict=True):
        if verdict.correct and trace.finish_reason is FinishReason.STOP:
            yield trace.problem_id, trace.text.strip()


def _yield(sampler: Sampler, kept: Mapping[str, int]) -> dict[str, Any]:
    """What the waves came to: usable traces (correct, not alike), problems without one, and money a usable trace."""
    usable, unsolved = sum(kept.values()), [name for name, count in kept.items() if not count]
    if unsolved:
        more = ", ..." if len(unsolved) > NAMED else ""
        say(f"  no correct trace for {len(unsolved)} of {len(kept)} problems: {', '.join(unsolved[:NAMED])}{more}")
    spent = sampler.spent()
    each = spent / usable if spent is not None and usable else None
    return {"usable": usable, "unsolved": len(unsolved), "money_a_usable_trace": each}


def _asking(options: SampleOptions, problem: Problem, indices: Iterable[int]) -> list[Request]:
    messages = with_prefix(options.task.messages(problem), options.prefix)
    return [
        Request(problem.id, index, messages, derive_seed(options.seed, options.policy, problem.id, index))
        for index in indices
    ]


def _requests(options: SampleOptions, phi: float, problem: Problem) -> list[Request]:
    count = options.samples
    if options.round:
        coin = (phi, options.phi_unit, options.seed, options.round)
        count = latest_share(*coin, problem.id, options.samples)
    return _asking(options, problem, range(count))


def _metrics(traces: Iterable[Trace]) -> dict[str, Any]:
    problems: set[str] = set()
    reasons: Counter[FinishReason] = Counter()
    prompt_tokens = completion_tokens = counted = 0
    for trace in traces:
        problems.add(trace.problem_id)
        reasons[trace.finish_reason] += 1
        prompt_tokens += trace.prompt_tokens or 0
        completion_tokens += trace.completion_tokens or 0
        counted += trace.completion_tokens is not None
    return {
        "problems": len(problems),
        "traces": reasons.total(),
        "finish_reasons": {reason.value: reasons[reason] for reason in FinishReason},
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "mean_completion_tokens": completion_tokens / counted if counted else None,
    }
