"""Sample what is missing: the resumable part that the sample and evaluate stages share.

A stage's folder holds `traces.jsonl` (finished, in the order asked for), `traces.partial*.jsonl` (as they arrive, one
file a process) and, where fewer are asked for than before, `traces.spare.jsonl` with what is not needed now. Memory
holds where each trace stands in these files, never its text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from orpo_distill import interrupt, progress
from orpo_distill.component import blamed, type_name
from orpo_distill.errors import DataError, RunError
from orpo_distill.records import (
    FinishReason,
    JsonlAppender,
    Message,
    Trace,
    atomic_file,
    from_json,
    stable_hash,
    write_jsonl,
)
from orpo_distill.samplers import Completion, Decoding, Request, Sampler

Key = tuple[str, int, str]  # problem id, sample index, prompt id
Usable = Callable[[Trace], bool]
"""Whether a trace is of use. Asked of every trace as it arrives, so it must be quick."""


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes the texts, and how; `policy` is the name that their traces carry."""

    sampler: Sampler
    model: str
    decoding: Decoding
    policy: str


def sample_traces(
    author: Author,
    requests: Sequence[Request],
    out: Path,
    shard: tuple[int, int] | None = None,
    usable: Usable | None = None,
) -> int:
    """Have a trace for every request in `out/traces.jsonl`, in their order; returns how many had to be sampled.

    With `shard` = (i, n) only every n-th problem, starting with the i-th, is sampled, into a partial file that a later
    call without `shard` takes in. The rest is as in `sample_missing`.
    """
    mine = requests if shard is None else share(requests, *shard)
    sampled = sample_missing(author, mine, out, shard, usable)
    if shard is None:
        finish_traces(requests, out)
    return sampled


def sample_missing(
    author: Author,
    requests: Sequence[Request],
    out: Path,
    shard: tuple[int, int] | None = None,
    usable: Usable | None = None,
) -> int:
    """Have a trace for every request in one of the files of `out`; returns how many had to be sampled.

    Traces that stand in `out` are kept (failed ones only if the sampler's failures do not heal), and the engine is
    opened only if one is missing. With `shard` what is new goes to that process's own partial file. With `usable` the
    progress line has the yield of what is new. Raises what the sampler raises; RunError if it leaves a request without
    an answer.
    """
    standing, sampler, policy = Standing(out), author.sampler, author.policy
    missing = [request for request in requests if standing.lacks(_key(request), failed=sampler.heals)]
    if missing:
        partial = out / ("traces.partial.jsonl" if shard is None else f"traces.partial-{shard[0]}.jsonl")
        label = f"sample {policy}" if shard is None else f"sample {policy}, process {shard[0] + 1} of {shard[1]}"
        done, found = len(requests) - len(missing), _Yield(usable)
        with (
            blamed(sampler),
            JsonlAppender(partial) as traces,
            sampler.open(author.model) as generate,
            progress.progress(label, len(requests), done, found.note, getattr(generate, "note", None)) as advance,
        ):
            asked = {_key(request) for request in missing}
            for completion in generate(missing, author.decoding):
                interrupt.check()
                trace = trace_of(completion, policy)
                if _key(trace) not in asked:
                    raise RunError(
                        f"expected one completion a request of {type_name(type(sampler))}, found another one"
                    )
                asked.remove(_key(trace))
                standing.add(trace, partial, traces.append(trace))
                found.add(trace)
                advance(1)
    _check([_key(request) for request in requests], standing, policy)
    return len(missing)


class _Yield:
    """Counts the traces that are of use."""

    def __init__(self, usable: Usable | None) -> None:
        self._usable = usable
        self._count = self._total = 0

    def add(self, trace: Trace) -> None:
        """Count a trace that has arrived."""
        if self._usable is not None:
            self._total += 1
            self._count += self._usable(trace)

    def note(self) -> str:
        """In words; "" where nothing was counted."""
        if not self._total:
            return ""
        return f"yield {self._count / self._total:.0%} ({self._count} of {self._total} usable)"


def finish_traces(requests: Sequence[Request], out: Path) -> None:
    """Put the traces of these requests, all of which stand in `out`, into `out/traces.jsonl`, in their order."""
    Standing(out).finish([_key(request) for request in requests])


def take_over(requests: Sequence[Request], before: Path, out: Path) -> None:
    """Let what another stage's finished traces answer of these requests stand in `out` too."""
    there, keys = Standing(before), [_key(request) for request in requests]
    found = [key for key in keys if not there.lacks(key, failed=True)]
    write_jsonl(out / "traces.partial-before.jsonl", there.traces(found))


def standing_traces(requests: Sequence[Request], out: Path) -> Iterator[Trace]:
    """The traces of these requests, all of which stand in one of the files of `out`, in their order."""
    return Standing(out).traces([_key(request) for request in requests])


def with_prefix(messages: tuple[Message, ...], prefix: str) -> tuple[Message, ...]:
    """The prompt with `prefix` and a blank line before the last user message; unchanged if the prefix is empty."""
    if not prefix:
        return messages
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    asked = Message("user", f"{prefix}\n\n{messages[last].content}")
    return (*messages[:last], asked, *messages[last + 1 :])


def _key(item: Request | Trace) -> Key:
    prompt = item.prompt_id if isinstance(item, Trace) else prompt_id_of(item.messages)
    return sys.intern(item.problem_id), item.sample_index, sys.intern(prompt)  # many keys share these texts


@lru_cache(maxsize=1024)
def prompt_id_of(messages: tuple[Message, ...]) -> str:
    return stable_hash([(message.role, message.content) for message in messages])[:16]


def share(requests: Sequence[Request], index: int, count: int) -> list[Request]:
    """The requests for every `count`-th problem, starting with number `index`."""
    order = {problem: place for place, problem in enumerate(dict.fromkeys(one.problem_id for one in requests))}
    return [request for request in requests if order[request.problem_id] % count == index]


class Standing:
    """The traces of a stage's folder by their keys; a finished one goes before a partial one."""

    def __init__(self, out: Path) -> None:
        self._finished, self._spare = out / "traces.jsonl", out / "traces.spare.jsonl"
        self._partials = sorted(out.glob("traces.partial*.jsonl"))
        self._places: dict[Key, tuple[Path, int]] = {}  # file, offset in bytes
        self.failed: set[Key] = set()
        for path in (self._finished, *self._partials, self._spare):
            if path.exists():
                for trace, at in whole_lines(path):
                    if self.lacks(_key(trace), failed=True):
                        self.add(trace, path, at)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def lacks(self, key: Key, failed: bool) -> bool:
        """Whether a trace is missing or, with `failed`, there is none that has not failed."""
        return key not in self._places or (failed and key in self.failed)

    def add(self, trace: Trace, path: Path, at: int) -> None:
        """Take note of a trace that stands in `path`, `at` bytes from its beginning."""
        key = _key(trace)
        self._places[key] = (path, at)
        if trace.finish_reason is FinishReason.ERROR:
            self.failed.add(key)
        else:
            self.failed.discard(key)
        if path not in (self._finished, self._spare, *self._partials):
            self._partials.append(path)

    def traces(self, keys: Sequence[Key]) -> Iterator[Trace]:
        """Traces, read again."""
        with self._lines() as line:
            for key in keys:
                yield from_json(Trace, json.loads(line(key)))

    def finish(self, keys: Sequence[Key]) -> None:
        """Write the result. A crash between any two of these steps loses nothing: until the result stands, the spare
        file keeps what it held, and the partial files go last.
        """
        asked = dict.fromkeys(keys)
        spare = [key for key, (path, _) in self._places.items() if key not in asked or path == self._spare]
        with self._lines() as line:
            if spare or self._spare.exists():
                with atomic_file(self._spare) as file:
                    file.writelines(map(line, spare))
            with atomic_file(self._finished) as file:
                file.writelines(map(line, asked))
        for path in self._partials:
            path.unlink()

    @contextmanager
    def _lines(self) -> Iterator[Callable[[Key], bytes]]:
        """Inside the block: a function that gives a trace's line. The files may be replaced meanwhile."""
        with ExitStack() as stack:
            paths = dict.fromkeys(path for path, _ in self._places.values())
            files = {path: stack.enter_context(path.open("rb")) for path in paths}

            def line(key: Key) -> bytes:
                path, at = self._places[key]
                if files[path].tell() != at:
                    files[path].seek(at)
                return files[path].readline()

            yield line


def whole_lines(path: Path) -> Iterator[tuple[Trace, int]]:
    """The records of a file that another process may be writing, each with its offset in bytes.

    A last line without its end is left alone.
    """
    at = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield from_json(Trace, json.loads(line.decode())), at
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: expected a Trace, found {error}; remove the line to sample it again"
                ) from error
            at += len(line)


def trace_of(completion: Completion, policy: str) -> Trace:
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
        prompt_id=prompt_id_of(request.messages),
    )


def _check(keys: Sequence[Key], standing: Standing, policy: str) -> None:
    found = [key for key in keys if key in standing]
    if len(found) < len(keys):
        raise RunError(
            f"expected {len(keys)} traces of {policy}, found {len(found)}: the sampler left requests unanswered; "
            "run the same command to ask for the others again"
        )
    if failed := [key for key in found if key in standing.failed]:
        (first,) = standing.traces(failed[:1])
        progress.say(f"  {policy}: {len(failed)} of {len(found)} samples failed, the first: {first.error}")
