"""Load a finished checkpoint as anybody would, sample from it, and print what the demonstration relies on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quickstart.pretrain import prompt_text

MAX_NEW_TOKENS, TEMPERATURE, SAMPLES, TRAIN_PROBLEMS = 96, 0.8, 8, 300
ANSWER = re.compile(r"The answer is (\d+)\.$")
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on one checkpoint; `sampled` holds `SAMPLES` texts per train problem."""

    name: str
    greedy: list[str]
    sampled: list[list[str]]
    lengths: list[int]


def sample(
    folder: Path, rows: Sequence[Row], samples: int, temperature: float, batch: int = 128
) -> tuple[list[list[str]], list[int]]:
    """`samples` texts per problem (greedy if `temperature` is 0), and the tokens of each, the end included."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mode = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    texts: list[list[str]] = [[] for _ in rows]
    lengths: list[int] = []
    # Prompts of like length stand together; each is repeated for its samples.
    order = sorted((i for i in range(len(rows)) for _ in range(samples)), key=lambda i: len(rows[i]["question"]))
    for at in range(0, len(order), batch):
        chunk = order[at : at + batch]
        prompts = [prompt_text(tokenizer, rows[i]["question"]) for i in chunk]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **(mode or {"do_sample": False}))
        new = output[:, inputs["input_ids"].shape[1] :]
        lengths += (new != tokenizer.pad_token_id).sum(1).tolist()
        for i, text in zip(chunk, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i].append(text)
    return texts, lengths


def answer(text: str) -> str | None:
    """The number a trace ends in, or None if it does not parse."""
    found = ANSWER.search(text)
    return found[1] if found else None


def measure(folder: Path, train: Sequence[Row], test: Sequence[Row]) -> Measured:
    """Greedy on the test problems, `SAMPLES` at temperature 0.8 on the first train problems."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    greedy, greedy_lengths = sample(folder, test, 1, 0.0)
    sampled, lengths = sample(folder, train[:TRAIN_PROBLEMS], SAMPLES, TEMPERATURE)
    return Measured(folder.name, [texts[0] for texts in greedy], sampled, greedy_lengths + lengths)


def _percent(hits: Sequence[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.1f} %"


def report(measured: Measured, train: Sequence[Row], test: Sequence[Row]) -> str:
    """Accuracy, parseable share and lengths, in words."""
    drawn = [(row, text) for row, texts in zip(train, measured.sampled, strict=False) for text in texts]
    right = [answer(text) == row["answer"] for row, text in drawn]
    longest = sorted(measured.lengths)
    distinct = {(row["id"], text) for (row, text), ok in zip(drawn, right, strict=True) if ok}
    greedy_right = [answer(text) == row["answer"] for text, row in zip(measured.greedy, test, strict=True)]
    return "\n".join(
        [
            f"{measured.name}:",
            f"  greedy, {len(test)} test problems: {_percent(greedy_right)} right, "
            f"{_percent([answer(text) is not None for text in measured.greedy])} parse",
            f"  temperature {TEMPERATURE}, {len(drawn)} traces: {_percent(right)} right, "
            f"{_percent([answer(text) is not None for _, text in drawn])} parse, "
            f"{100 * len(distinct) / sum(right):.1f} % of the right ones distinct",
            f"  tokens: mean {sum(longest) / len(longest):.1f}, 99.9 % within {longest[int(0.999 * len(longest))]}, "
            f"longest {longest[-1]}",
        ]
    )


def usable(teacher: Measured, student: Measured, train: Sequence[Row]) -> float:
    """Share of train problems with a right teacher trace and a parsed, wrong student trace."""
    both = 0
    for row, good, bad in zip(train, teacher.sampled, student.sampled, strict=False):
        right = any(answer(text) == row["answer"] for text in good)
        wrong = any(answer(text) not in (None, row["answer"]) for text in bad)
        both += right and wrong
    return both / len(teacher.sampled)
