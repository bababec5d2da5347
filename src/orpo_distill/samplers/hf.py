"""Sample from any Hugging Face causal language model, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import PositiveInt

from orpo_distill import progress
from orpo_distill.component import SPEED_ONLY
from orpo_distill.errors import missing_extra
from orpo_distill.models import Dtype, load_model, load_tokenizer
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from orpo_distill.samplers.tokens import completion, encode_requests, end_tokens, failed, plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orpo_distill.samplers.decode import Stops

MARGIN = 4  # tokens more than the bytes of the longest stop text that are decoded to look for it


class HF(Sampler):
    """Local folders, hub ids and LoRA adapters, through transformers.

    A trace's text follows from its prompt, its seed and the decoding settings alone, except for rounding: other rows of
    the batch change the logits by about 1e-6 in float32 (by hundredths in bfloat16, whose numbers from 8 to 16 are 0.06
    apart), and that is about the probability of each token to come out otherwise. The checkpoint's own sampling
    defaults (top-k, repetition penalty) are not used.
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
        self.ends = end_tokens(model.generation_config, tokenizer)
        self.own_loop = manages(model)
        if not self.own_loop:
            progress.say(f"  {type(model).__name__} needs its own cache: sampling through `generate`, which is slower")

    def __call__(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Every request's completion, in any order. Prompts that leave no room in the model's context are errors."""
        from orpo_distill.samplers.decode import Job, Rules, decode
        from orpo_distill.samplers.generate import decode_by_generate

        context = context_length(self.model)
        asked = encode_requests(self.tokenizer, requests, decoding.max_new_tokens, context)
        yield from (failed(one, one.error) for one in asked if one.error)
        jobs = [Job(i, one.prompt, one.request.seed, one.room) for i, one in enumerate(asked) if not one.error]
        if not jobs:
            return
        rules = Rules(decoding, self.ends, self._stops(decoding))
        run = decode if self.own_loop else decode_by_generate
        for drawn in run(self.model, jobs, rules, self.rows):
            one = asked[drawn.index]
            if drawn.error:
                yield failed(one, drawn.error)
            else:
                yield completion(self.tokenizer, one, drawn.tokens, drawn.stopped, decoding)

    def _stops(self, decoding: Decoding) -> Stops | None:
        from orpo_distill.samplers.decode import Stops

        if not decoding.stop:
            return None

        def found(tails: list[list[int]]) -> list[bool]:
            return [any(stop in plain_text(self.tokenizer, tail) for stop in decoding.stop) for tail in tails]

        return Stops(found, MARGIN + max(len(stop.encode()) for stop in decoding.stop))


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens of prompt and text together, where the model has such a limit."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
