"""What the faulty server says of given tokens, in both forms that servers have, as vLLM 0.32 gives them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def logp(row: Sequence[int]) -> float:
    """The log-probability of a row's last token behind the others, in nats: a number that only the row decides."""
    return -int(hashlib.sha256(json.dumps(list(row)).encode()).hexdigest()[:4], 16) / 4096


class Scores:
    """The scores of a model whose tokens' texts stand in a file: a list in JSON, by token id."""

    def __init__(self, vocabulary: Path) -> None:
        self._texts = json.loads(vocabulary.read_text(encoding="utf-8"))

    def fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a choice has beside the text that was drawn, as the request asks for it."""
        row = body["prompt"]
        texts = [self._texts[token] for token in row]
        logps = [logp(row[: place + 1]) if place else None for place in range(len(row))]
        fields: dict[str, Any] = {}
        if body.get("prompt_logprobs") is not None:
            fields["prompt_logprobs"] = [
                None if found is None else {str(token): {"logprob": found, "rank": 1, "decoded_token": text}}
                for token, text, found in zip(row, texts, logps, strict=True)
            ]
        if body.get("echo") and body.get("logprobs") is not None:
            fields["logprobs"] = {"tokens": [*texts, "x"], "token_logprobs": [*logps, -1.0], "top_logprobs": None}
        return fields
