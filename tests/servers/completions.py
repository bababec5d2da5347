"""The faulty server's two endpoints that generate: what they refuse, what they make, how they answer."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.servers.account import Account, Count
from tests.servers.answers import NASTY, Limits, Style, Text, generate, in_tokens, messages_hash, prompt_tokens
from tests.servers.faults import Fault, error_reply, wrong_usage
from tests.servers.http1 import Reply
from tests.servers.scores import Scores

MOST_CHOICES = 128
COMMON = {"model", "n", "seed", "max_tokens", "stop", "temperature", "top_p", "frequency_penalty", "presence_penalty"}
COMMON |= {"logprobs", "logit_bias", "stream", "user", "metadata", "store", "service_tier"}
CHAT = COMMON | {"messages", "max_completion_tokens", "reasoning_effort", "response_format", "top_logprobs"}
PLAIN = COMMON | {"prompt", "echo", "best_of", "suffix"}


@dataclass(frozen=True, slots=True)
class Made:
    """What was generated for a request: the response (with its usage), the bill, and the texts."""

    response: dict[str, Any]
    count: Count
    texts: list[str]


class Completions:
    """Generates for both endpoints. Without a seed, or with `--ignore-seed`, every request gets other texts."""

    def __init__(self, options: Namespace, style: Style, account: Account) -> None:
        self.options, self.style, self.account = options, style, account
        self.scores = Scores(options.vocabulary) if options.vocabulary else None
        self.seen: set[str] = set()
        self.unseeded = 0

    def refuse(self, body: dict[str, Any], chat: bool) -> Reply | None:
        """The 400 or 404 that a request earns, or None."""
        asked, options = ("messages" if chat else "prompt"), self.options
        if not isinstance(body.get("model"), str) or not body.get(asked):
            missing = asked if isinstance(body.get("model"), str) else "model"
            return error_reply(400, f"Missing required parameter: '{missing}'.", param=missing)
        if body["model"] not in options.models:
            found = f"The model `{body['model']}` does not exist or you do not have access to it."
            return error_reply(404, found, code="model_not_found", param="model")
        if body.get("stream"):
            return error_reply(400, "Streaming is not supported here.", param="stream")
        if options.refuse_text and options.refuse_text in json.dumps(body[asked], ensure_ascii=False):
            return error_reply(
                options.refuse_status, f"Inappropriate: {options.refuse_text}{NASTY if options.nasty else ''}"
            )
        for name in sorted(body):
            if name in options.refuse:
                return error_reply(
                    400, f"Unsupported parameter: '{name}' is not supported with this model.", param=name
                )
            if options.strict and name not in (CHAT if chat else PLAIN):
                return error_reply(400, f"Unrecognized request argument supplied: {name}")
        n = body.get("n") or 1
        most = options.max_n if options.max_n and options.max_n_mode == "refuse" else MOST_CHOICES
        if not isinstance(n, int) or not 1 <= n <= most:
            return error_reply(400, f"Invalid 'n': expected a value from 1 to {most}, but got {n} instead.", param="n")
        return None

    def make(self, body: dict[str, Any], chat: bool, fault: Fault) -> Made:
        """Generate, put it on no bill yet. `fault` may leave choices out or tell a wrong count."""
        asked = body["messages"] if chat else body["prompt"]
        hashed, n = messages_hash(asked), body.get("n") or 1
        if self.options.max_n:
            n = min(n, self.options.max_n)
        if fault.name == "no_choices":
            n = 0
        elif fault.name == "fewer_choices":
            n = fault.draw.randrange(1, n) if n > 1 and fault.draw else 0
        key = self._key(body, hashed)
        plain = isinstance(asked, str) or in_tokens(asked)
        question = str(asked) if plain else str(asked[-1].get("content") or "")
        limits = _limits(body)
        greedy = body.get("temperature") == 0
        texts = [generate(question, key if greedy else f"{key}|{index}", self.style, limits) for index in range(n)]
        count = self._count(asked, hashed, texts)
        response = self._response(body["model"], chat, texts, count)
        if self.scores and in_tokens(asked):
            for choice in response["choices"]:
                choice.update(self.scores.fields(body))
        if fault.name == "wrong_usage":
            response["usage"] = wrong_usage(response["usage"], fault.kind, texts[0].tokens)
            if fault.kind == "missing":
                del response["usage"]
        return Made(response, count, [text.content for text in texts])

    def _key(self, body: dict[str, Any], hashed: str) -> str:
        if body.get("temperature") == 0:
            return hashed
        if body.get("seed") is None or self.options.ignore_seed:
            self.unseeded += 1
            return f"{self.options.seed}|{hashed}|#{self.unseeded}"
        return f"{hashed}|{body['seed']}|{body.get('temperature', 1)}"

    def _count(self, asked: Any, hashed: str, texts: list[Text]) -> Count:
        prompt = prompt_tokens(asked)
        cached = prompt - 1 if self.options.prompt_cache and hashed in self.seen else 0
        self.seen.add(hashed)
        spoken, thought = sum(text.tokens for text in texts), sum(text.reasoning_tokens for text in texts)
        return Count(prompt, spoken, cached, thought, len(texts))

    def _response(self, model: str, chat: bool, texts: list[Text], count: Count) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": count.prompt_tokens,
            "completion_tokens": count.completion_tokens,
            "total_tokens": count.prompt_tokens + count.completion_tokens,
        }
        if self.options.prompt_cache:
            usage["prompt_tokens_details"] = {"cached_tokens": count.cached_tokens}
        if self.style.reasoning != "none":
            usage["completion_tokens_details"] = {"reasoning_tokens": count.reasoning_tokens}
        shape: Callable[[int, Text], dict[str, Any]] = _chat_choice if chat else _plain_choice
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.account.requests}-{self.unseeded}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": [shape(index, text) for index, text in enumerate(texts)],
            "usage": usage,
            "system_fingerprint": "fp_faulty",
        }


def _limits(body: dict[str, Any]) -> Limits:
    stop = body.get("stop") or ()
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    return Limits(most, (stop,) if isinstance(stop, str) else tuple(stop))


def _chat_choice(index: int, text: Text) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text.content, "refusal": None}
    if text.reasoning:
        message["reasoning_content"] = text.reasoning
    return {"index": index, "message": message, "logprobs": None, "finish_reason": text.finish_reason}


def _plain_choice(index: int, text: Text) -> dict[str, Any]:
    return {"index": index, "text": text.content, "logprobs": None, "finish_reason": text.finish_reason}
