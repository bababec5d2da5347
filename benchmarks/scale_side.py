"""One part of `scale.py` in a process of its own: make generated traces, or put a stage through them.

    python scale_side.py '{"part": "pair", "folder": "...", ...}'       prints one JSON object

A text is made of sentences that its problem's traces share, with names, things and numbers filled in, and one of many
ways to end. What decides speed is taken from recorded answers and GSM8K solutions: lengths spread from half to one and
a half times the mean, and the shares of texts that state their answer, only reject the other choices, or state none
(multiple choice 26 / 65 / 9 of 100, yes or no 93 / - / 7). One text in twenty repeats another one of its problem.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from orpo_distill.config import VerifySection
from orpo_distill.records import FinishReason, JsonlAppender, Outcome, Problem, Trace, Verdict, write_jsonl
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.scripted import Scripted
from orpo_distill.stages.pair import PairOptions, pair
from orpo_distill.stages.sample import SampleOptions, sample
from orpo_distill.stages.verify import VerifyOptions, verify
from orpo_distill.tasks import Task
from orpo_distill.tasks.gsm8k import Gsm8k
from orpo_distill.tasks.openbookqa import OpenBookQA
from orpo_distill.tasks.strategyqa import StrategyQA

Kind = Literal["number", "choice", "yes_no"]
TASKS: dict[Kind, Task] = {"number": Gsm8k(), "choice": OpenBookQA(), "yes_no": StrategyQA()}

NAMES = re.findall(
    r"\w+", "Natalia Weng Betty Julie James Albert Mia Omar Chen Ravi Sofia Lukas Amara Yuki Tomás Ingrid"
)
THINGS = re.findall(
    r"\w+",
    "clips pages cards flowers apples marbles tickets bottles stamps cookies pencils shells coins ropes magnets leaves "
    "mirrors lamps boats candles",
)
ACTS = ["sells", "buys", "finds", "loses", "collects", "receives", "packs", "counts", "borrows", "returns"]
PLACES = [
    "in the morning",
    "at the market",
    "on Monday",
    "during the week",
    "in April",
    "after school",
    "near the river",
]
SENTENCES = (
    "{name} {act} {a} {things} {place}, and {b} more the day after.",
    "First, we need to find how many {things} there are {place}.",
    "{a} + {b} = {c} {things}, so {name} has {c} of them now.",
    "Each of the {a} boxes holds {b} {things}, which makes {a} * {b} = {d} in all.",
    "This is because {things} do not change when {name} {act} them {place}.",
    "It is also known that most {things} cost more {place} than {other} do.",
    "A person who {act} {things} would usually need {other} as well, and there is no doubt about that.",
    "The price of one of the {things} is ${a}.50, while {other} are sold for ${b} each.",
    "However, the {things} that {name} {act} are lighter than the {other} {place}.",
    "Half of the {c} {other} were left {place}, that is {a} of them.",
)
STATED: dict[Kind, tuple[str, ...]] = {
    "number": (
        "The answer is {answer}.",
        "#### {answer}",
        "So {name} has {answer} {things} in total.",
        "Therefore, the final answer is **{answer}**.",
        "The answer is \\boxed{{{answer}}}.",
        "Answer: {answer}",
    ),
    "choice": (
        "Therefore, the correct answer is ({answer}) {chosen}.",
        "The answer is ({answer}).",
        "So, option {answer} is the best choice.",
        "**Answer: {answer}**",
    ),
    "yes_no": (
        "Therefore, the answer is ({letter}) {answer}.",
        "The answer is {answer}.",
        "So the answer is {answer}, because {name} {act} {things} {place}.",
    ),
}
REJECTED = (
    "Option ({letter}), {choice}, is incorrect because {things} are not found {place}.",
    "({letter}) {choice} is not the correct answer because it has nothing to do with {things}.",
    "{choice} ({letter}) are unrelated to what {name} {act} {place}.",
)
SHARES: dict[Kind, tuple[int, int, int]] = {"number": (90, 0, 10), "choice": (26, 65, 9), "yes_no": (93, 0, 7)}
REPEATED = 0.05  # of the traces of a problem
OUTCOMES = {"teacher": {Outcome.CORRECT: 8, Outcome.WRONG: 2}, "initial": {Outcome.CORRECT: 4, Outcome.WRONG: 6}}


@dataclass(frozen=True)
class Spec:
    """What one process does."""

    part: Literal["make", "pair", "sample", "verify", "verifier"]
    folder: str
    kind: Kind = "number"
    problems: int = 8
    samples: int = 8
    characters: int = 560  # a text, on average
    tokenizer: str = ""
    max_length: int = 1024
    counted: bool = False  # every text's tokens are counted, not only those of texts that may not fit
    processes: int = 1  # of the verify stage


def texts(spec: Spec, number: int) -> tuple[Problem, Iterator[str]]:
    """A problem and the texts of its traces, without end."""
    coin = Random(f"{spec.kind} {number}")
    words = _words(coin)
    answer = {"number": str(words["c"]), "choice": coin.choice("ABCD"), "yes_no": coin.choice(("yes", "no"))}[spec.kind]
    choices = tuple(coin.sample(THINGS, 4)) if spec.kind == "choice" else ()
    question = " ".join(sentence.format(**words) for sentence in SENTENCES[:2]) + f" How many {words['things']} now?"
    problem = Problem(f"{spec.kind}-{number:07}", question, answer, choices)
    pool = [sentence.format(**_words(coin)) for sentence in coin.choices(SENTENCES, k=3 + spec.characters // 30)]
    return problem, _texts(spec, problem, pool, coin)


def _texts(spec: Spec, problem: Problem, pool: list[str], coin: Random) -> Iterator[str]:
    written: list[str] = []
    while True:
        if written and coin.random() < REPEATED:
            yield coin.choice(written)
            continue
        room = spec.characters * coin.uniform(0.5, 1.5)
        ending = _ending(spec.kind, problem, coin)
        sentences = []
        while room > len(ending):
            sentences.append(coin.choice(pool))
            room -= len(sentences[-1]) + 1
        text = coin.choice((" ", "\n")).join([*sentences, ending])
        written = [*written[-7:], text]
        yield text


def _ending(kind: Kind, problem: Problem, coin: Random) -> str:
    words = _words(coin)
    form = coin.choices(("stated", "rejected", "none"), SHARES[kind])[0]
    if form == "none":
        return SENTENCES[4].format(**words)
    answer = {"number": str(words["c"]), "choice": coin.choice("ABCD"), "yes_no": coin.choice(("yes", "no"))}[kind]
    answer = problem.answer if coin.random() < 0.7 else answer
    if form == "rejected":
        others = [(letter, choice) for letter, choice in zip("ABCD", problem.choices, strict=True) if letter != answer]
        return " ".join(coin.choice(REJECTED).format(letter=a, choice=b, **words) for a, b in others)
    chosen = problem.choices["ABCD".index(answer)] if problem.choices else ""
    letter = "A" if answer == "yes" else "B"
    return coin.choice(STATED[kind]).format(answer=answer, chosen=chosen, letter=letter, **words)


def _words(coin: Random) -> dict[str, Any]:
    a, b = coin.randrange(2, 60), coin.randrange(2, 60)
    words: dict[str, Any] = {"a": a, "b": b, "c": a + b, "d": a * b, "name": coin.choice(NAMES)}
    return words | {
        "act": coin.choice(ACTS),
        "things": coin.choice(THINGS),
        "other": coin.choice(THINGS),
        "place": coin.choice(PLACES),
    }


def make(spec: Spec) -> dict[str, Any]:
    """Write the problems and, for each side, the traces with verdicts that chance decides."""
    folder = Path(spec.folder)
    for name in ("problems", *OUTCOMES, *(f"{side}-verdicts" for side in OUTCOMES)):
        (folder / name).mkdir(parents=True)
    write_jsonl(folder / "problems" / "problems.jsonl", (texts(spec, number)[0] for number in range(spec.problems)))
    characters = 0
    for side, shares in OUTCOMES.items():
        with (
            JsonlAppender(folder / side / "traces.jsonl") as traces,
            JsonlAppender(folder / f"{side}-verdicts" / "verdicts.jsonl") as verdicts,
        ):
            for number in range(spec.problems):
                problem, found = texts(spec, number)
                coin = Random(f"{side} {number}")
                skipped = 0 if side == "teacher" else spec.samples  # the student writes other texts
                for index, text in zip(range(-skipped, spec.samples), found, strict=False):
                    if index >= 0:
                        trace = _trace(problem.id, side, index, text)
                        traces.append(trace)
                        outcome = coin.choices(list(shares), list(shares.values()))[0]
                        verdicts.append(Verdict(trace.id, outcome, problem.answer, "by chance"))
                        characters += len(text)
    return {"mean_characters": round(characters / max(1, 2 * spec.problems * spec.samples))}


def _trace(problem_id: str, policy: str, index: int, text: str) -> Trace:
    trace_id = Trace.make_id(policy, problem_id, index, text, FinishReason.STOP)
    return Trace(trace_id, problem_id, policy, index, text, FinishReason.STOP, 90, len(text) // 4, "", "0" * 16)


def run_pair(spec: Spec) -> dict[str, Any]:
    """Round 1's pairs: deduplicated, filtered by length and diversity, paired."""
    names = ("problems", *OUTCOMES, *(f"{side}-verdicts" for side in OUTCOMES))
    options = PairOptions(
        phi=0.0,
        task=TASKS[spec.kind],
        round=1,
        seed=0,
        samples=spec.samples,
        tokenizer=spec.tokenizer,
        max_length=spec.max_length,
        min_response_tokens=2 if spec.counted else 1,
    )
    metrics = pair(options, {name: Path(spec.folder) / name for name in names}, _out(spec))
    return {"traces": 2 * spec.problems * spec.samples, "pairs": metrics["pairs"]}


def run_sample(spec: Spec) -> dict[str, Any]:
    """The sample stage around a sampler that costs nothing: the same four texts for every problem."""
    default = tuple(text for text, _ in zip(texts(spec, 0)[1], range(4), strict=False))
    options = SampleOptions(
        task=TASKS[spec.kind],
        sampler=Scripted(default=default),
        model="none",
        decoding=Decoding(),
        samples=spec.samples,
        policy="teacher",
        seed=0,
    )
    return {"traces": sample(options, {"problems": Path(spec.folder) / "problems"}, _out(spec))["traces"]}


def run_verify(spec: Spec) -> dict[str, Any]:
    """The verify stage, from file to file."""
    folder = Path(spec.folder)
    inputs = {"problems": folder / "problems", "traces": folder / "teacher"}
    options = VerifyOptions(task=TASKS[spec.kind], verify=VerifySection(processes=spec.processes))
    return verify(options, inputs, _out(spec))


def run_verifier(spec: Spec) -> dict[str, Any]:
    """The verifier alone, on traces in memory."""
    verifier = TASKS[spec.kind].judge()
    items = []
    for number in range(spec.problems):
        problem, found = texts(spec, number)
        items += [
            (problem, _trace(problem.id, "", k, text)) for k, text in zip(range(spec.samples), found, strict=False)
        ]
    started = time.perf_counter()
    for problem, trace in items:
        verifier(problem, trace)
    return {"traces": len(items), "seconds": time.perf_counter() - started}


def _out(spec: Spec) -> Path:
    out = Path(spec.folder) / f"out-{spec.part}"
    out.mkdir()
    return out


WORK = {"make": make, "pair": run_pair, "sample": run_sample, "verify": run_verify, "verifier": run_verifier}


def main() -> None:
    """Do what the argument says; print what it took."""
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.part == "pair":  # imports are not part of it
        from orpo_distill.models import load_tokenizer

        load_tokenizer(spec.tokenizer)("warm", verbose=False)
    started = time.perf_counter()
    found = {"seconds": 0.0} | WORK[spec.part](spec)
    found["seconds"] = found["seconds"] or time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps(found))


if __name__ == "__main__":
    main()
