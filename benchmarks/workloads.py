"""What `orpo_step.py` trains on: real lengths, carried in data/orpo_step.json, filled with real text.

    python benchmarks/workloads.py SHARED        draws the lengths again from SHARED/data and prints what they are

Three problems a workload, each a prompt with 8 chosen and 8 rejected traces. Lengths are in tokens of SmolLM2, drawn
with a fixed seed. A prompt's is that of the task's own question in the model's chat form; a trace's includes the token
that ends it.

    gsm8k      a train question; traces as long as gold rationales of 16 other train questions, calculator marks off
    medqa      a train question; 8 recorded GPT-3.5 traces of it, and 8 of another question
    few_shot   gsm8k behind worked questions, as many as bring the prompt to 580 to 620 tokens
    all_pairs  gsm8k's lengths, every chosen trace with every rejected one

The tokens are those of 48 carried GSM8K train questions with their rationales (Cobbe et al. 2021, MIT licence), joined
and cut to the drawn lengths, so that losses are those of text and not of noise. Every trace of a problem starts at
another rationale: no two are the same.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

DATA = Path(__file__).parent / "data" / "orpo_step.json"
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m-instruct"
WORKLOADS = ("gsm8k", "medqa", "few_shot", "all_pairs")
PROBLEMS = 3
TRACES = 8  # of each side
TEXTS = 48
FEW_SHOT_TOKENS = range(580, 621)

Row = dict[str, list[int]]  # token ids of `prompt`, `chosen` and `rejected`


def problems(workload: str, tokenizer: Any) -> list[list[Row]]:
    """The pairs of each problem. The first 8 are those of chosen trace n with rejected trace n."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for pair in data["text"] for text in pair]
    found = []
    for number, lengths in enumerate(data["lengths"]["gsm8k" if workload == "all_pairs" else workload]):
        # Text 2n is question n, text 2n + 1 its rationale. The prompt's come after those of the traces.
        first = number * 2 * TRACES
        prompt = _tokens(texts, 2 * (first + 2 * TRACES + 4), lengths["prompt"])
        starts = itertools.count(2 * first + 1, 2)
        chosen, rejected = (
            [[*_tokens(texts, next(starts), length - 1), tokenizer.eos_token_id] for length in lengths[side]]
            for side in ("chosen", "rejected")
        )
        shifts = range(TRACES if workload == "all_pairs" else 1)
        found.append(
            [
                {"prompt": prompt, "chosen": own, "rejected": rejected[(place + shift) % TRACES]}
                for shift in shifts
                for place, own in enumerate(chosen)
            ]
        )
    return found


def _tokens(texts: Sequence[Sequence[int]], start: int, length: int) -> list[int]:
    """The first `length` tokens of the texts from number `start` on, joined, and from the first again."""
    places = itertools.count(start)
    stream = itertools.chain.from_iterable(texts[place % len(texts)] for place in places)
    return list(itertools.islice(stream, length))


def draw(shared: Path) -> dict[str, Any]:
    """Lengths and text from the shared data. The same every time."""
    from orpo_distill.models import load_tokenizer

    tokenizer = load_tokenizer(str(CHECKPOINT))
    coin = random.Random("orpo_step")
    lines = list(_lines(shared / "data" / "gsm8k" / "train.jsonl.gz"))
    for line in lines:
        line["rationale"] = re.sub(r"<<.*?>>", "", line["rationale"])
    lengths = {
        "gsm8k": [_gsm8k(lines, coin, tokenizer) for _ in range(PROBLEMS)],
        "medqa": _medqa(shared / "data", coin, tokenizer),
        "few_shot": [_few_shot(lines, coin, tokenizer) for _ in range(PROBLEMS)],
    }
    return {"lengths": lengths, "text": [[line["question"], line["rationale"]] for line in coin.sample(lines, TEXTS)]}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _gsm8k(lines: Sequence[dict[str, Any]], coin: random.Random, tokenizer: Any, shots: int = 0) -> dict[str, Any]:
    """Lengths of a problem whose prompt shows `shots` worked questions."""
    from orpo_distill.tasks.gsm8k import Gsm8k
    from orpo_distill.tasks.question import Example

    asked, *shown = coin.sample(lines, 1 + shots)
    traces = _trace_lengths([line["rationale"] for line in coin.sample(lines, 2 * TRACES)], tokenizer)
    examples = tuple(Example(question=line["question"], response=line["rationale"]) for line in shown)
    return {
        "prompt": _prompt_length(Gsm8k(examples=examples), asked, tokenizer),
        "chosen": traces[:TRACES],
        "rejected": traces[TRACES:],
    }


def _few_shot(lines: Sequence[dict[str, Any]], coin: random.Random, tokenizer: Any) -> dict[str, Any]:
    while True:
        lengths = _gsm8k(lines, coin, tokenizer, shots=coin.choice((2, 3, 4)))
        if lengths["prompt"] in FEW_SHOT_TOKENS:
            return lengths


def _medqa(data: Path, coin: random.Random, tokenizer: Any) -> list[dict[str, Any]]:
    from orpo_distill.tasks.medqa import MedQA

    questions = {line["id"]: line for line in _lines(data / "medqa_usmle" / "train.jsonl.gz")}
    (path,) = (data / "teacher_traces" / "medqa_usmle").glob("*.jsonl.gz")
    recorded = [line for line in _lines(path) if len(line["traces"]) >= TRACES]
    drawn = []
    for _ in range(PROBLEMS):
        asked, other = coin.sample(recorded, 2)
        chosen, rejected = (
            _trace_lengths([trace["text"] for trace in coin.sample(line["traces"], TRACES)], tokenizer)
            for line in (asked, other)
        )
        prompt = _prompt_length(MedQA(), questions[asked["id"]], tokenizer)
        drawn.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return drawn


def _prompt_length(task: Any, line: dict[str, Any], tokenizer: Any) -> int:
    from orpo_distill.records import Problem
    from orpo_distill.samplers.prompts import encode_prompt

    problem = Problem(line["id"], line["question"], line["answer"], tuple(line["choices"] or ()))
    return len(encode_prompt(tokenizer, task.messages(problem)))


def _trace_lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Tokens of each text and the one that ends it."""
    return [len(ids) + 1 for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def main() -> None:
    """Draw and write the lengths."""
    parser = argparse.ArgumentParser(description="Draw the lengths of orpo_step.py's workloads again.")
    parser.add_argument("shared", type=Path, help="folder that holds data/gsm8k, data/medqa_usmle, data/teacher_traces")
    drawn = draw(parser.parse_args().shared)
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(drawn, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name, each in drawn["lengths"].items():
        traces = [n for lengths in each for side in ("chosen", "rejected") for n in lengths[side]]
        prompts = ", ".join(str(lengths["prompt"]) for lengths in each)
        print(f"{name}: prompts of {prompts} tokens, traces of {min(traces)} to {max(traces)}, mean {mean(traces):.0f}")


if __name__ == "__main__":
    main()
