"""Scorer: whether the teacher's server can score given texts, asked once before anything else is asked of it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny

from orpo_distill import interrupt
from orpo_distill.component import Options
from orpo_distill.errors import ModelError
from orpo_distill.groups import Row
from orpo_distill.likelihood import Response, rows_of
from orpo_distill.models import load_tokenizer
from orpo_distill.progress import progress
from orpo_distill.records import Message, write_text
from orpo_distill.samplers import Sampler
from orpo_distill.samplers.openai import OpenAI
from orpo_distill.samplers.server_scores import NEVER, Way, server_scores

TRIED = Response((Message("user", "Say it."),), "The quick brown fox jumps over the lazy dog.", cut=False)


class ScoreServer(Options):
    """A server that scores given texts. `model` is what it calls the model."""

    sampler: SerializeAsAny[Sampler]
    model: str
    way: Way


class ScorerOptions(Options):
    """Which server is asked, in the tokens of which checkpoint."""

    server: ScoreServer
    tokenizer: str
    trust_remote_code: bool = False


def scorer(options: ScorerOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `scorer.json` once the server has scored a text in the tokenizer's tokens.

    Raises ModelError where it cannot, or reads the tokens as another text.
    """
    server = options.server
    tokenizer = load_tokenizer(options.tokenizer, options.trust_remote_code)
    (row,) = rows_of([TRIED], tokenizer)
    ((_, scored),) = server_scores(_api(server), server.model, server.way, [(*row.prompt, *row.chosen)])
    said = str(tokenizer.decode(list(row.chosen), skip_special_tokens=True))
    if _letters(said) not in _letters(scored.text):
        raise ModelError(
            f"expected {options.tokenizer} to have the tokens of {server.model}, found that the server reads {said!r} "
            f"as {scored.text!r}; name the checkpoint that it runs in teacher.scorer"
        )
    write_text(out / "scorer.json", json.dumps({"model": server.model, "scoring": server.way}) + "\n")
    return {"scoring": server.way}


def by_server(
    server: ScoreServer, rows: Sequence[Row], label: str, done: Collection[int]
) -> Iterator[tuple[int, tuple[float, int, None]]]:
    """Each row's number with its chosen side's `logp_sum, tokens, entropy` as in `records.Score`, as replies come.

    Rows in `done` (by number) are left out. Raises ModelError and RunError.
    """
    missing = [row for row in rows if row.number not in done]
    texts = [(*row.prompt, *row.chosen) for row in missing]
    with progress(label, len(rows), len(done)) as advance:
        for place, scored in server_scores(_api(server), server.model, server.way, texts):
            interrupt.check()
            row = missing[place]
            logps = scored.logps[-len(row.chosen) :]
            logp_sum = math.fsum(logps) if min(logps) > NEVER else -math.inf
            yield row.number, (logp_sum, len(row.chosen), None)
            advance(1)


def _api(server: ScoreServer) -> OpenAI:
    assert isinstance(server.sampler, OpenAI)
    return server.sampler


def _letters(text: str) -> str:
    """The text without space, which tokenizers write each in their own way."""
    return "".join(text.split())
