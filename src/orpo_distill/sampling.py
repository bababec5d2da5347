"""Sample what is missing: the resumable part that the sample and evaluate stages share.

A stage's folder holds `traces.jsonl` (finished, in the order asked for), `traces.partial*.jsonl` (as they arrive, one
file a process) and, where fewer are asked for than before, `traces.spare.jsonl` with what is not needed now.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from orpo_distill import interrupt, progress
from orpo_distill.component import blamed, type_name
from orpo_distill.errors import DataError, RunError
from orpo_distill.records import FinishReason, JsonlAppender, Message, Trace, from_json, stable_hash, write_jsonl
from orpo_distill.samplers import Completion, Decoding, Request, Sampler

Key = tuple[str, int, str]  # problem id, sample index, prompt id


def sample_traces(
    sampler: Sampler,
    model: str,
    requests: Sequence[Request],
    decoding: Decoding,
    policy: str,
    out: Path,
    shard: tuple[int, int] | None = None,
) -> int:
    """Have a trace for every request in `out/traces.jsonl`, in their order; returns how many had to be sampled.

    Traces that stand in `out` are kept, also failed ones, and the engine is opened only if one is missing. With
    `shard` = (i, n) only every n-th problem, starting with the i-th, is sampled, into a partial file that a later call
    without `shard` takes in. Raises what the sampler raises; RunError if it leaves a request without an answer.
    """
    standing = _standing(out)
    mine = requests if shard is None else _share(requests, *shard)
    missing = [request for request in mine if _key(request) not in standing]
    if missing:
        partial = out / ("traces.partial.jsonl" if shard is None else f"traces.partial-{shard[0]}.jsonl")
        label = f"sample {policy}" if shard is None else f"sample {policy}, process {shard[0] + 1} of {shard[1]}"
        with (
            blamed(sampler),
            JsonlAppender(partial) as traces,
            sampler.open(model) as generate,
            progress.progress(label, len(mine), len(mine) - len(missing)) as advance,
        ):
            asked = {_key(request) for request in missing}
            for completion in generate(missing, decoding):
                interrupt.check()
                trace = _trace(completion, policy)
                if _key(trace) not in asked or _key(trace) in standing:
                    raise RunError(
                        f"expected one completion a request of {type_name(type(sampler))}, found another one"
                    )
                traces.append(trace)
                standing[_key(trace)] = trace
                advance(1)
    _check(mine, standing, policy)
    if shard is None:
        _finish(requests, standing, out)
    return len(missing)


def with_prefix(messages: tuple[Message, ...], prefix: str) -> tuple[Message, ...]:
    """The prompt with `prefix` and a blank line before the last user message; unchanged if the prefix is empty."""
    if not prefix:
        return messages
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    asked = Message("user", f"{prefix}\n\n{messages[last].content}")
    return (*messages[:last], asked, *messages[last + 1 :])


def _key(item: Request | Trace) -> Key:
    prompt = item.prompt_id if isinstance(item, Trace) else _prompt_id(item)
    return item.problem_id, item.sample_index, prompt


def _prompt_id(request: Request) -> str:
    return stable_hash([(message.role, message.content) for message in request.messages])[:16]


def _share(requests: Sequence[Request], index: int, count: int) -> list[Request]:
    order = {problem: place for place, problem in enumerate(dict.fromkeys(one.problem_id for one in requests))}
    return [request for request in requests if order[request.problem_id] % count == index]


def _standing(out: Path) -> dict[Key, Trace]:
    """Every trace in the folder by its key; a finished one goes before a partial one."""
    found: dict[Key, Trace] = {}
    for path in (out / "traces.jsonl", *_partials(out), out / "traces.spare.jsonl"):
        if path.exists():
            for trace in _whole_lines(path):
                found.setdefault(_key(trace), trace)
    return found


def _partials(out: Path) -> list[Path]:
    return sorted(out.glob("traces.partial*.jsonl"))


def _whole_lines(path: Path) -> Iterator[Trace]:
    """The records of a file that another process may be writing: a last line without its end is left alone."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield from_json(Trace, json.loads(line))
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: expected a Trace, found {error}; remove the line to sample it again"
                ) from error


def _trace(completion: Completion, policy: str) -> Trace:
    request = completion.request
    return Trace(
        id=Trace.make_id(policy, request.problem_id, request.sample_index, completion.text, completion.finish_reason),
        problem_id=request.problem_id,
        policy=policy,
        sample_index=request.sample_index,
        text=completion.text.encode(errors="replace").decode(),  # no lone surrogates: tokenizers refuse them
        finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        error=completion.error,
        prompt_id=_prompt_id(request),
    )


def _check(requests: Sequence[Request], standing: dict[Key, Trace], policy: str) -> None:
    found = [standing[_key(request)] for request in requests if _key(request) in standing]
    if len(found) < len(requests):
        raise RunError(
            f"expected {len(requests)} traces of {policy}, found {len(found)}: the sampler left requests unanswered; "
            "run the same command to ask for the others again"
        )
    failed = [trace for trace in found if trace.finish_reason is FinishReason.ERROR]
    if failed:
        progress.say(f"  {policy}: {len(failed)} of {len(found)} samples failed, the first: {failed[0].error}")


def _finish(requests: Sequence[Request], standing: dict[Key, Trace], out: Path) -> None:
    """Write the result; a crash between any two of these steps loses nothing, for the partial files go last."""
    spare = out / "traces.spare.jsonl"
    asked = dict.fromkeys(_key(request) for request in requests)
    unasked: Iterable[Trace] = [trace for key, trace in standing.items() if key not in asked]
    if unasked or spare.exists():
        write_jsonl(spare, unasked)
    write_jsonl(out / "traces.jsonl", (standing[key] for key in asked))
    for path in _partials(out):
        path.unlink()
