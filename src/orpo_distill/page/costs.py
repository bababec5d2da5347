"""What a run cost: seconds, tokens and, where samples are paid for, money."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_distill.page.blocks import Block, Section, Table, Text, count, duration, number
from orpo_distill.page.files import Row, RunFiles, judged
from orpo_distill.page.measures import Measured

MILLION = 1_000_000
Spent = tuple[int | None, int | None, float | None]  # prompt tokens, sampled tokens, money


@dataclass(frozen=True)
class Cost:
    """What one stage cost. None where it does not apply or is not known."""

    stage: str
    seconds: float | None
    prompt: int | None  # tokens
    sampled: int | None  # tokens
    trained: int | None  # tokens
    money: float | None


def costs(files: RunFiles, measured: Sequence[Measured]) -> list[Cost]:
    """The cost of every stage that is there, in the order of the run."""
    by_stage = {each.source.stage: each for each in (*measured, *_judgements(files))}
    names = [*by_stage, *(f"round-{number}/train" for number in files.rounds), "sft/train", *files.times]
    found = []
    for stage in sorted(dict.fromkeys(names), key=_order):
        each = by_stage.get(stage)
        seconds = files.times.get(stage)
        trained = files.metrics(stage).get("tokens") if stage.endswith("/train") else None
        if each is None and seconds is None and trained is None:
            continue
        prompt, sampled, money = _of_samples(files, each) if each else _of_scores(files, stage)
        found.append(Cost(stage, seconds, prompt, sampled, trained, money))
    return found


def _judgements(files: RunFiles) -> Iterator[Measured]:
    """What the judge was asked in each stage, without what an earlier round had asked it."""
    asked: set[str] = set()
    for source in files.judgements:
        found = Measured(source)
        new = [trace for trace, _ in judged(source) if trace.prompt_id not in asked]
        asked.update(trace.prompt_id for trace in new)
        for trace in new:
            found.lengths.add(trace.text, trace.completion_tokens)
            found.prompt_tokens += trace.prompt_tokens or 0
        yield found


def _of_samples(files: RunFiles, measured: Measured) -> Spent:
    prompt, sampled = measured.prompt_tokens, sum(measured.lengths.tokens)
    return prompt, sampled, _money(files.config, measured.source.policy, prompt, sampled)


def _of_scores(files: RunFiles, stage: str) -> Spent:
    """Of a stage whose texts a server scored, drawing a token for each."""
    found = files.metrics(stage)
    prompt, scored = found.get("prompt_tokens"), found.get("scored")
    if prompt is None or scored is None:
        return None, None, None
    return prompt, scored, _money(files.config, "teacher", prompt, scored, batched=False)


def _order(stage: str) -> tuple[int, int, int]:
    """Where a stage stands in a run."""
    head, _, tail = stage.partition("/")
    steps = ["phi", "student", "student-verdicts", "candidates", "pairs", "reference-scores", "teacher-scores", "train"]
    steps += ["evaluate", "judged"]
    step = steps.index(tail) if tail in steps else len(steps)
    sampled = ["teacher", "teacher-verdicts", "student-0", "student-0-verdicts"]
    first = ["problems", "teacher-scorer", *sampled, "baseline", "warmup"]
    if head.startswith("round-") and head[6:].isdecimal():
        return 1, int(head[6:]), step
    if head in first:
        return 0, first.index(head), step
    last = ["extrapolate", "teacher-evaluate", "sft", "mechanisms", "report", "student"]
    return 2, last.index(head) if head in last else len(last), step


def _money(config: Row, policy: str, prompt: int, completion: int, batched: bool = True) -> float | None:
    """Tokens times the prices of the config; None without prices."""
    role = config.get(policy if policy in ("teacher", "judge") else "student")
    sampler: Any = role.get("sampler") if isinstance(role, dict) else None
    price = sampler.get("price") if isinstance(sampler, dict) else None
    if not isinstance(price, dict) or not (price.get("prompt") or price.get("completion")):
        return None
    money = prompt * (price.get("prompt") or 0) + completion * (price.get("completion") or 0)
    share = price.get("batch", 1) if batched and sampler.get("batch") else 1
    return float(money * share / MILLION)


def total(found: Sequence[Cost]) -> Cost:
    """The sum of what is known."""

    def add(name: str) -> Any:
        values = [value for cost in found if (value := getattr(cost, name)) is not None]
        return sum(values) if values else None

    return Cost("all stages", add("seconds"), add("prompt"), add("sampled"), add("trained"), add("money"))


def cost_section(files: RunFiles, measured: Sequence[Measured]) -> Section | None:
    """The table of costs; None where nothing is known."""
    found = costs(files, measured)
    if not found:
        return None
    rows = [_cells(cost) for cost in [*found, total(found)]]
    columns = ["stage", "time", "prompt tokens", "sampled tokens", "trained tokens", "money"]
    blocks: list[Block] = [Table("Cost by stage", columns, rows, _note(files, found))]
    usable = files.metrics("teacher").get("money_a_usable_trace")
    if usable is not None:
        blocks.append(Text(f"A usable teacher trace came to {number(usable)}, by the ledger."))
    return Section("cost", "Cost", blocks)


def _cells(cost: Cost) -> list[str]:
    money = "–" if cost.money is None else f"{cost.money:.4f}"
    return [cost.stage, duration(cost.seconds), count(cost.prompt), count(cost.sampled), count(cost.trained), money]


def _note(files: RunFiles, found: Sequence[Cost]) -> str:
    said = ["Seconds are those that what stands now took to make."]
    if any(cost.sampled == 0 for cost in found):
        said.append("Texts whose sampler counts no tokens (recorded, scripted) count as 0.")
    if any(cost.money is not None for cost in found):
        said.append(
            "Money is tokens times the prices of the config, without discounts for cached or reasoning tokens and "
            "without lost calls; `orpo-distill ledger` says what was billed."
        )
    else:
        said.append("Nothing in this run has a price.")
    return " ".join(said)
