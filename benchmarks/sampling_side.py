"""One side of `sampling.py` in a process of its own: the `hf` sampler, transformers' `generate`, or vLLM.

    python benchmarks/sampling_side.py SPEC RESULT

SPEC is a JSON file with the fields of `Spec`; RESULT gets what `Result` holds. The sides of `generate` and vLLM import
nothing of this project. All draw from the whole vocabulary at one temperature, and end at the same tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Spec:
    """What one process is to do."""

    side: Literal["ours", "generate", "vllm"]
    model: str  # a checkpoint's folder
    prompts: list[list[int]]
    ends: list[int]  # tokens that end a text
    samples: int
    max_new_tokens: int
    temperature: float
    dtype: str
    prompts_at_once: int = 0  # of `generate`


@dataclass(frozen=True)
class Result:
    """What one process found."""

    seconds: float  # from the prompts to the last text, models loaded and warmed up
    tokens: int  # up to each text's end, the end token not counted
    texts: int
    cut: int  # texts that reached `max_new_tokens`


def useful(text: Sequence[int], ends: Sequence[int]) -> int:
    """Tokens of a text before its end."""
    return next((place for place, token in enumerate(text) if token in ends), len(text))


def ours(spec: Spec) -> Result:
    """The decoding loop of the `hf` sampler, with its default options."""
    from orpo_distill.models import load_model
    from orpo_distill.samplers import Decoding
    from orpo_distill.samplers.cache import manages
    from orpo_distill.samplers.decode import Job, Rules, decode
    from orpo_distill.samplers.hf import HF

    model = load_model(spec.model, spec.dtype)
    if not manages(model):
        raise SystemExit(f"expected a model that the sampler's own loop can decode, found {type(model).__name__}")
    rules = Rules(Decoding(temperature=spec.temperature, max_new_tokens=spec.max_new_tokens), tuple(spec.ends))

    def run(prompts: Sequence[Sequence[int]], limit: int) -> list[int]:
        asked = [tuple(prompt) for prompt in prompts for _ in range(spec.samples)]
        jobs = [Job(number, prompt, number, limit) for number, prompt in enumerate(asked)]
        return [len(drawn.tokens) for drawn in decode(model, jobs, rules, HF().rows)]

    return timed(run, spec)


def generate(spec: Spec) -> Result:
    """`generate(num_return_sequences=samples)` on `prompts_at_once` prompts of like length."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(spec.model, dtype=getattr(torch, spec.dtype)).eval()
    settings: dict[str, Any] = {"do_sample": True, "temperature": spec.temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig()

    def run(prompts: Sequence[Sequence[int]], limit: int) -> list[int]:
        found = []
        ordered = sorted(prompts, key=len)
        for at in range(0, len(ordered), spec.prompts_at_once):
            some = ordered[at : at + spec.prompts_at_once]
            width = max(map(len, some))
            ids = torch.tensor([[spec.ends[0]] * (width - len(prompt)) + list(prompt) for prompt in some])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in some])
            config = GenerationConfig(
                **settings,
                max_new_tokens=limit,
                num_return_sequences=spec.samples,
                eos_token_id=spec.ends,
                pad_token_id=spec.ends[0],
            )
            texts = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
            found += [useful(text, spec.ends) for text in texts]
        return found

    return timed(run, spec)


def vllm(spec: Spec) -> Result:
    """vLLM's offline engine, n = samples, with its prefix cache."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, spec.prompts)) + spec.max_new_tokens
    engine = LLM(
        model=spec.model,
        dtype=spec.dtype,
        max_model_len=longest,
        max_num_seqs=256,
        enable_prefix_caching=True,
        generation_config="vllm",
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def run(prompts: Sequence[Sequence[int]], limit: int) -> list[int]:
        rules = SamplingParams(
            n=spec.samples,
            temperature=spec.temperature,
            max_tokens=limit,
            stop_token_ids=spec.ends,
            detokenize=False,
        )
        outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], rules, use_tqdm=False)
        return [useful(text.token_ids, spec.ends) for output in outputs for text in output.outputs]

    return timed(run, spec)


def timed(run: Any, spec: Spec) -> Result:
    """Draw a few tokens to warm up, then all texts."""
    run(spec.prompts[:8], 4)
    start = time.perf_counter()
    lengths = run(spec.prompts, spec.max_new_tokens)
    seconds = time.perf_counter() - start
    return Result(seconds, sum(lengths), len(lengths), sum(length == spec.max_new_tokens for length in lengths))


def main() -> None:
    """The command line."""
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    result = {"ours": ours, "generate": generate, "vllm": vllm}[spec.side](spec)
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
