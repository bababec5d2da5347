"""Sampling: useful tokens a second of the `hf` sampler, of transformers' `generate`, and of vLLM.

    python benchmarks/sampling.py            at most 45 minutes on 2 CPU cores
    python benchmarks/sampling.py --quick    a rough figure in about 5: 8 questions, at most 128 tokens

8 texts for each of 64 GSM8K questions, SmolLM2-135M-Instruct in bfloat16 (float32 where the machine multiplies faster
in it, `environments.fast_dtype`, or `--dtype` says so), temperature 0.8, natural lengths of at most 256 tokens. Each
side runs in a process of its own; they take turns, three unless the time is up before, and medians are given. Tokens
count up to each text's end. `generate` runs with as many prompts at once (of 1, 2, 4, 8) as were fastest on the first
8 prompts and 64 tokens.

Prints one JSON line. vLLM's figures are null where it cannot be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

from environments import Dtype, NotInstalledError, checkpoint, fast_dtype, python_of
from sampling_side import Result, Spec

from orpo_distill.models import load_tokenizer
from orpo_distill.progress import say
from orpo_distill.records import Problem
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.prompts import encode_prompt, end_of_response
from orpo_distill.tasks.gsm8k import Gsm8k

HERE = Path(__file__).parent
QUESTIONS = HERE / "data" / "gsm8k_questions.json"
SAMPLES = 8
MINUTES = 40  # no turn begins that would not end by then


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    prompts: int = 64
    max_new_tokens: int = 256
    turns: int = 3
    at_once: tuple[int, ...] = (1, 2, 4, 8)  # prompts, of which `generate` has the fastest
    trial_prompts: int = 8
    trial_tokens: int = 64


QUICK = Size(prompts=8, max_new_tokens=128, turns=1, at_once=(8,))


def specification(model: Path, size: Size, dtype: str) -> Spec:
    """What all sides have in common: the task's own prompts, in the model's tokens."""
    tokenizer = load_tokenizer(str(model))
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))["questions"][: size.prompts]
    task = Gsm8k()
    prompts = [encode_prompt(tokenizer, task.messages(Problem(text, text, "0"))) for text in questions]
    ends = sorted({token for token in (tokenizer.eos_token_id, end_of_response(tokenizer)) if token is not None})
    return Spec("ours", str(model), prompts, ends, SAMPLES, size.max_new_tokens, Decoding().temperature, dtype)


def measure(spec: Spec, python: str = sys.executable) -> Result:
    """Run one side. Raises SystemExit with its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "spec.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(asdict(spec)), encoding="utf-8")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
        done = subprocess.run(
            [python, str(HERE / "sampling_side.py"), str(asked), str(answer)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode or not answer.exists():
            raise SystemExit(f"{spec.side} ended with {done.returncode}:\n{done.stdout[-2000:]}")
        result = Result(**json.loads(answer.read_text(encoding="utf-8")))
    at_once = f", {spec.prompts_at_once} prompts at once" if spec.prompts_at_once else ""
    say(f"{spec.side}{at_once}: {result.tokens / result.seconds:.0f} tokens/s ({result})")
    return result


def best_at_once(spec: Spec, size: Size) -> int:
    """How many prompts at once are fastest for `generate`."""
    if len(size.at_once) == 1:
        return size.at_once[0]
    tokens = min(size.trial_tokens, size.max_new_tokens)
    trial = replace(spec, side="generate", prompts=spec.prompts[: size.trial_prompts], max_new_tokens=tokens)
    tried = {count: measure(replace(trial, prompts_at_once=count)) for count in size.at_once}
    return max(tried, key=lambda count: tried[count].tokens / tried[count].seconds)


def vllm_python() -> str | None:
    """The interpreter with vLLM, or None where it cannot be installed."""
    try:
        return str(python_of("vllm"))
    except NotInstalledError as error:
        say(f"without vLLM: {error}")
        return None


def compare(spec: Spec, size: Size, vllm: str | None) -> dict[str, Any]:
    """The JSON line."""
    started = time.monotonic()
    at_once = best_at_once(spec, size)
    sides = [(spec, sys.executable), (replace(spec, side="generate", prompts_at_once=at_once), sys.executable)]
    if vllm:
        sides.append((replace(spec, side="vllm"), vllm))
    found: dict[str, list[Result]] = {}
    for _ in range(size.turns):
        begun = time.monotonic()
        for side, python in sides:
            found.setdefault(side.side, []).append(measure(side, python))
        if (now := time.monotonic()) + (now - begun) > started + MINUTES * 60:
            break
    rates = {side: median(one.tokens / one.seconds for one in results) for side, results in found.items()}
    line: dict[str, Any] = {
        f"{side}_tokens_per_second": round(rates[side], 1) if side in rates else None
        for side in ("ours", "generate", "vllm")
    }
    line["ratio_generate"] = round(rates["ours"] / rates["generate"], 2)
    line["ratio_vllm"] = round(rates["ours"] / rates["vllm"], 2) if vllm else None
    line |= {"prompts": len(spec.prompts), "samples": spec.samples, "turns": len(found["ours"]), "dtype": spec.dtype}
    line |= {"generate_prompts_at_once": at_once}
    line |= {f"{side}_mean_tokens": round(mean_tokens(results), 1) for side, results in found.items()}
    return line


def mean_tokens(results: Sequence[Result]) -> float:
    """Tokens a text: the sides must agree up to chance."""
    return sum(one.tokens for one in results) / sum(one.texts for one in results)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 prompts, at most 128 tokens, one turn")
    parser.add_argument("--model", type=Path, help="another checkpoint's folder")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="of the weights (default: the faster one)")
    parser.add_argument("--prompts", type=int, help="use fewer of the questions")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--no-vllm", action="store_true")
    options = parser.parse_args(argv)
    size = QUICK if options.quick else Size()
    given = {name: getattr(options, name) for name in ("prompts", "max_new_tokens", "turns")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    model = options.model or checkpoint()
    spec = specification(model, size, options.dtype or fast_dtype())
    print(json.dumps(compare(spec, size, None if options.no_vllm else vllm_python())))


if __name__ == "__main__":
    main()
