"""Sample from any Hugging Face causal language model, in this process."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PositiveInt

from orpo_distill import progress
from orpo_distill.component import SPEED_ONLY
from orpo_distill.errors import missing_extra
from orpo_distill.models import Dtype, load_model, load_tokenizer
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from orpo_distill.samplers.prompts import encode_prompt, end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orpo_distill.samplers.decode import Drawn, Job, Stops

MARGIN = 4  # tokens more than the bytes of the longest stop text that are decoded to look for it


class HF(Sampler):
    """Local folders, hub ids and LoRA adapters, through transformers.

    A trace's text follows from its prompt, its seed and the decoding settings alone, except for rounding: other rows of
    the batch change the logits by about 1e-6 in float32 (1e-2 in bfloat16), and that is about the probability of each
    token to come out otherwise. The checkpoint's own sampling defaults (top-k, repetition penalty) are not used.
    """

    rows: Annotated[PositiveInt, SPEED_ONLY] = 512  # traces decoded at once; halved when memory runs out
    device: Annotated[str, SPEED_ONLY] = "auto"
    dtype: Dtype = "auto"  # float32 on a CPU, the checkpoint's own elsewhere
    trust_remote_code: bool = False

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        """Load the model and its tokenizer. Raises ModelError; ConfigError where torch or transformers is missing."""
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError as error:
            raise missing_extra(error.name or "transformers", "hf") from error
        tokenizer = load_tokenizer(model, self.trust_remote_code)
        loaded = load_model(model, self.dtype, self.device, self.trust_remote_code)
        engine = Engine(loaded, tokenizer, self.rows)
        try:
            yield engine
        finally:
            device = loaded.device
            del loaded, engine.model  # the caller may still hold the engine
            if device.type == "cuda":
                torch.cuda.empty_cache()


class Engine:
    """A model and its tokenizer as a `Generate` function."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        from orpo_distill.samplers.cache import manages

        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.ends = end_tokens(model, tokenizer)
        self.own_loop = manages(model)
        if not self.own_loop:
            progress.say(f"  {type(model).__name__} keeps its own cache: sampling through `generate`, which is slower")

    def __call__(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Every request's completion, in any order. Prompts that leave no room in the model's context are errors."""
        from orpo_distill.samplers.decode import Job, Rules, decode
        from orpo_distill.samplers.generate import decode_by_generate

        asked = list(requests)
        context = context_length(self.model)
        encoded = {messages: tuple(encode_prompt(self.tokenizer, messages)) for messages in {r.messages for r in asked}}
        jobs: dict[int, Job] = {}
        for index, request in enumerate(asked):
            prompt = encoded[request.messages]
            room = decoding.max_new_tokens if context is None else min(decoding.max_new_tokens, context - len(prompt))
            if prompt and room > 0:
                jobs[index] = Job(index, prompt, request.seed, room)
            else:
                found = f"{len(prompt)} tokens in the prompt (the model takes 1 to {context})"
                yield Completion(request, "", FinishReason.ERROR, len(prompt), 0, found)
        if not jobs:
            return
        rules = Rules(decoding, self.ends, self._stops(decoding))
        run = decode if self.own_loop else decode_by_generate
        for drawn in run(self.model, list(jobs.values()), rules, self.rows):
            yield self._completion(asked[drawn.index], len(jobs[drawn.index].prompt), drawn, decoding)

    def _completion(self, request: Request, prompt: int, drawn: Drawn, decoding: Decoding) -> Completion:
        if drawn.error:
            return Completion(request, "", FinishReason.ERROR, prompt, 0, drawn.error)
        text, tokens, stopped = self._text(drawn.tokens), len(drawn.tokens), drawn.stopped
        if places := [place for stop in decoding.stop if (place := text.find(stop)) >= 0]:
            text, stopped = text[: min(places)], True
            tokens = bisect_left(
                range(tokens), True, key=lambda n: any(stop in self._text(drawn.tokens[:n]) for stop in decoding.stop)
            )
        return Completion(request, text, FinishReason.STOP if stopped else FinishReason.LENGTH, prompt, tokens)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _stops(self, decoding: Decoding) -> Stops | None:
        from orpo_distill.samplers.decode import Stops

        if not decoding.stop:
            return None

        def found(tails: list[list[int]]) -> list[bool]:
            return [any(stop in self._text(tail) for stop in decoding.stop) for tail in tails]

        return Stops(found, MARGIN + max(len(stop.encode()) for stop in decoding.stop))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a text: of the generation config, the tokenizer, and the chat template's end of a turn."""
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return tuple(sorted({token for token in found if token is not None}))


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens of prompt and text together, where the model has such a limit."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
