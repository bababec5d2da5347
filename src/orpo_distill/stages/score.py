"""Score: how likely a model finds the traces that the pairs use: the reference, or the teacher.

`scores.jsonl` has a line for each trace: those of the round before first, then those that this round's pairs use for
the first time. A trace is scored once, by a model here or by a server, as it stands in the pairs: its text without
surrounding space, its end of sequence included unless it was cut. What is scored is appended to `scores.partial.jsonl`,
which stays: a run that is resumed makes the batch anew that was broken off, and one whose pairs changed sends only what
is new through the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any

from pydantic import PositiveInt

from orpo_distill.component import SPEED_ONLY, Options
from orpo_distill.errors import DataError, ModelError
from orpo_distill.given import SCORES
from orpo_distill.groups import Row
from orpo_distill.likelihood import Reading, Response, rows_of, scores
from orpo_distill.models import Dtype, load_tokenizer
from orpo_distill.progress import say
from orpo_distill.records import JsonlAppender, Pair, Score, read_jsonl, write_jsonl
from orpo_distill.sampling import prompt_id_of, with_prefix
from orpo_distill.stages.scorer import ScoreServer, by_server

PARTIAL = "scores.partial.jsonl"
COMPARED = 64  # texts that are tokenised by both models
Key = tuple[str, str]  # trace id, prompt id


class ScoreOptions(Options):
    """Who scores. `model` None stands for the `model` folder of the input stage `model`.

    With `server` only the model's tokenizer is read here, and how it is loaded is the server's business.
    """

    model: str | None
    server: ScoreServer | None = None
    policy: str  # teacher, student-0, warmup, ...
    prefix: str = ""  # before the last user message: what only the teacher sees
    student: str  # whose tokens the model's are compared with
    student_trust_remote_code: bool = False
    dtype: Dtype = "float32"
    autocast: bool = False
    trust_remote_code: bool = False
    tokens_per_batch: Annotated[PositiveInt, SPEED_ONLY] = 4096


def score(options: ScoreOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `scores.jsonl` for the traces of inputs["pairs"] and those that inputs["previous"] has; return counts.

    Raises ModelError where a text's log-probability is not finite, DataError for pairs without trace ids.
    """
    before = list(read_jsonl(inputs["previous"] / SCORES, Score)) if "previous" in inputs else []
    known = _by_key(before)
    wanted = _wanted(read_jsonl(inputs["pairs"] / "pairs.jsonl", Pair), options.prefix)
    new = {key: response for key, response in wanted.items() if key not in known}
    partial = out / PARTIAL
    with JsonlAppender(partial) as appender:  # cuts off a torn line
        standing = _by_key(read_jsonl(partial, Score))
        finished = _by_key(read_jsonl(out / SCORES, Score)) if (out / SCORES).exists() else {}  # when it last ended
        settled = standing.keys() & finished.keys()
        found = _score_missing(options, new, standing, appender, inputs, settled) if new else {}
    scored = [standing[key] for key in new]
    write_jsonl(out / SCORES, [*before, *scored])
    tokens = sum(one.tokens for one in scored)
    return {
        "policy": options.policy,
        "traces": len(before) + len(scored),
        "scored": len(scored),
        "tokens": tokens,
        "mean_logp": sum(one.logp_sum for one in scored) / tokens if tokens else None,
        "same_tokens": found.get("same_tokens"),
        "prompt_tokens": found.get("prompt_tokens"),
    }


def _by_key(scores: Iterable[Score]) -> dict[Key, Score]:
    return {(one.trace_id, one.prompt_id): one for one in scores}


def _wanted(pairs: Iterable[Pair], prefix: str) -> dict[Key, Response]:
    """Every trace of the pairs once, in their order."""
    found: dict[Key, Response] = {}
    for pair in pairs:
        prompt = with_prefix(pair.prompt, prefix)
        sides = [(pair.chosen_id, pair.chosen, False)]
        if pair.rejected:
            sides.append((pair.rejected_id, pair.rejected, pair.rejected_cut))
        for trace, text, cut in sides:
            if not trace:
                raise DataError(
                    f"expected the ids of both traces in every pair, found none for problem {pair.problem_id!r}; "
                    "make the pairs again"
                )
            found.setdefault((trace, prompt_id_of(prompt)), Response(prompt, text, cut))
    return found


def _score_missing(
    options: ScoreOptions,
    new: Mapping[Key, Response],
    standing: dict[Key, Score],
    appender: JsonlAppender,
    inputs: Mapping[str, Path],
    settled: Set[Key],
) -> dict[str, Any]:
    """Have a score for every key in `standing`.

    Batches are of what is not `settled`, so that a run that is resumed gives what an uninterrupted one gives. Returns
    whether the model reads the texts in the student's tokens, and how many tokens a server has been sent.
    """
    model = options.model or str(inputs["model"] / "model")
    keys, responses = list(new), list(new.values())
    rows = rows_of(responses, load_tokenizer(model, options.trust_remote_code))
    same = _same_tokens(options, rows, responses)
    if not same:
        say(
            f"  {options.policy} splits texts into other tokens than the student: only the log-probabilities of whole "
            "texts are compared"
        )
    sent = sum(len(row.prompt) + len(row.chosen) for row in rows) if options.server else None
    metrics = {"same_tokens": same, "prompt_tokens": sent}
    rows = [row for row in rows if keys[row.number] not in settled]
    done = {row.number for row in rows if keys[row.number] in standing}
    if len(done) == len(rows):
        return metrics
    for number, (logp_sum, tokens, entropy) in _scores(options, model, rows, done):
        key = keys[number]
        if not (math.isfinite(logp_sum) and math.isfinite(entropy or 0.0)):
            key_of_type = "teacher.scorer_dtype" if options.policy == "teacher" else "train.dtype"
            name, other = model, f"load it in another number type ({key_of_type}, now {options.dtype})"
            if options.server:
                name, other = options.server.model, "see to its server"
            raise ModelError(
                f"expected a finite log-probability of every trace under {name}, found {logp_sum} for trace {key[0]}; "
                f"{other}, or look for broken weights"
            )
        if number not in done:
            standing[key] = Score(*key, logp_sum, tokens, entropy)
            appender.append(standing[key])
    return metrics


def _scores(
    options: ScoreOptions, model: str, rows: Sequence[Row], done: Collection[int]
) -> Iterator[tuple[int, tuple[float, int, float | None]]]:
    """What the server gives, or the model here: see `likelihood.scores`."""
    label = f"score by {options.policy}"
    if options.server is not None:
        return by_server(options.server, rows, label, done)
    reading = Reading(options.dtype, options.tokens_per_batch, options.autocast, options.trust_remote_code)
    return scores(model, rows, reading, label, done)


def _same_tokens(options: ScoreOptions, rows: Sequence[Row], responses: Sequence[Response]) -> bool:
    """Whether the model's tokens are the student's: the same vocabulary, and the same ids for some of the texts."""
    if options.model in (None, options.student):  # the student, trained or not
        return True
    own = load_tokenizer(options.student, options.student_trust_remote_code)
    other = load_tokenizer(options.model, options.trust_remote_code)
    if own.get_vocab() != other.get_vocab():
        return False
    return [row.chosen for row in rows_of(responses[:COMPARED], own)] == [row.chosen for row in rows[:COMPARED]]
