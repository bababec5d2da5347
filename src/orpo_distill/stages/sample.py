"""Sample: K traces a problem from one model, texts only. Whether they are right is found out by the verify stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import PositiveInt, SerializeAsAny

from orpo_distill.component import SPEED_ONLY, Options
from orpo_distill.mixing import Phi, PhiUnit, latest_share
from orpo_distill.records import FinishReason, Problem, Trace, derive_seed, read_jsonl
from orpo_distill.samplers import Decoding, Request, Sampler
from orpo_distill.sampling import sample_traces, with_prefix
from orpo_distill.tasks import Task


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
    phi: Phi = 1.0
    phi_unit: PhiUnit = "problem"
    shard: Annotated[tuple[int, int] | None, SPEED_ONLY] = None  # process i of n


def sample(options: SampleOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `traces.jsonl`, in the order of problems and sample indices; return counts of traces and tokens.

    Raises ModelError or DataError if the sampler cannot be opened.
    """
    requests = [
        request
        for problem in read_jsonl(inputs["problems"] / "problems.jsonl", Problem)
        for request in _requests(options, problem)
    ]
    model = options.model or str(inputs["model"] / "model")
    sample_traces(options.sampler, model, requests, options.decoding, options.policy, out, options.shard)
    return {} if options.shard else _metrics(read_jsonl(out / "traces.jsonl", Trace))


def _requests(options: SampleOptions, problem: Problem) -> list[Request]:
    count = options.samples
    if options.round:
        coin = (options.phi, options.phi_unit, options.seed, options.round)
        count = latest_share(*coin, problem.id, options.samples)
    messages = with_prefix(options.task.messages(problem), options.prefix)
    return [
        Request(problem.id, index, messages, derive_seed(options.seed, options.policy, problem.id, index))
        for index in range(count)
    ]


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
