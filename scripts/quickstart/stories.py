"""Word problems about counting things, and step-by-step solutions in several wordings, right or wrong.

Every number that occurs lies between 1 and `LARGEST`, so that a model of a million parameters can learn the task.
A *careful* solver writes the teacher's traces. A *hasty* one writes the students': it knows how to solve each kind
of event, but usually takes some of them the wrong way (`HASTY_VERBS`, bags, doubling), and sometimes slips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

LARGEST = 40
PRONOUNS = {
    "Ada": "She", "Ben": "He", "Clara": "She", "David": "He", "Emma": "She", "Felix": "He",
    "Grace": "She", "Hugo": "He", "Iris": "She", "Jonas": "He", "Mia": "She", "Noah": "He",
}  # fmt: skip
THINGS = (
    "marbles", "stickers", "shells", "coins", "pencils", "apples",
    "buttons", "cards", "stones", "books", "cookies", "beads",
)  # fmt: skip
GAINS = ("finds", "buys", "gets", "collects", "wins")
LOSSES = ("loses", "gives away", "uses up", "lends", "drops", "sells")
FACTORS = {"doubles": 2, "triples": 3}
HALVES = ("gives away half of", "keeps only half of")
HASTY_VERBS = frozenset({"wins", "lends", "drops", "sells"})
HASTE = {"gain": 0.85, "loss": 0.85, "bags": 0.7, "times": 0.85}
KINDS = ("gain", "loss", "bags", "times", "half")
KIND_WEIGHTS = (30, 30, 15, 11, 14)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happens: `count` is the number of bags, else 1; `number` is the amount, bag size or factor."""

    kind: str
    verb: str
    number: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Story:
    """A problem: somebody starts with some things, then two or three events happen to them."""

    name: str
    thing: str
    start: int
    events: tuple[Event, ...]
    question: str

    @property
    def answer(self) -> int:
        """The number of things at the end, computed, not read from a trace."""
        value = self.start
        for event in self.events:
            value = Step.of(event).result(value)
        return value


@dataclass(frozen=True, slots=True)
class Step:
    """How a solver takes an event: an operation, its operand, and `slip`, the error made when computing it."""

    event: Event
    operation: str
    operand: int
    bags: bool = False
    slip: int = 0

    @staticmethod
    def of(event: Event) -> Step:
        """The right reading."""
        if event.kind == "bags":
            return Step(event, "+", event.count * event.number, bags=True)
        operation = {"gain": "+", "loss": "-", "times": "*", "half": "/"}[event.kind]
        return Step(event, operation, event.number)

    @staticmethod
    def hasty(event: Event) -> Step | None:
        """The wrong reading of an event that the hasty solver does not know well; None for all others."""
        if event.kind in ("bags", "times"):
            return Step(event, "+", event.number)
        if event.verb in HASTY_VERBS:
            return Step(event, "-" if event.kind == "gain" else "+", event.number)
        return None

    def result(self, value: int) -> int:
        """The number of things after this step; 0 when it would not be a whole number in range."""
        if self.operation == "/" and value % 2:
            return 0
        result = {
            "+": value + self.operand,
            "-": value - self.operand,
            "*": value * self.operand,
            "/": value // 2,
        }[self.operation]
        result += self.slip
        return result if 1 <= result <= LARGEST else 0


# --- problems ---


def _event(rng: Random) -> Event:
    """Draw an event without looking at the number of things it happens to."""
    kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
    if kind == "bags":
        return Event(kind, "buys", rng.randint(2, 6), rng.randint(2, 4))
    if kind == "times":
        verb = rng.choice(tuple(FACTORS))
        return Event(kind, verb, FACTORS[verb])
    if kind == "half":
        return Event(kind, rng.choice(HALVES), 2)
    return Event(kind, rng.choice(GAINS if kind == "gain" else LOSSES), rng.randint(2, 15))


def _sentence(event: Event, who: str, thing: str) -> str:
    """The event as the problem tells it."""
    if event.kind == "bags":
        return f"{who} buys {event.count} bags with {event.number} {thing} each."
    if event.kind in ("times", "half"):
        return f"{who} {event.verb} the {thing}."
    return f"{who} {event.verb} {event.number} {'more ' if event.kind == 'gain' else ''}{thing}."


def draw_story(rng: Random, events: int) -> Story:
    """Draw a story with this many events in which every number stays in range."""
    name, thing = rng.choice(tuple(PRONOUNS)), rng.choice(THINGS)
    start = value = rng.randint(2, 20)
    happened: list[Event] = []
    while len(happened) < events:
        event = _event(rng)
        # The range is a wall: redrawing near it favours losses, as it must.
        if after := Step.of(event).result(value):
            happened.append(event)
            value = after
    told = [f"{name} {rng.choice(('has', 'starts with'))} {start} {thing}."]
    told += [_sentence(event, PRONOUNS[name], thing) for event in happened]
    told.append(f"How many {thing} does {name} have {rng.choice(('now', 'in the end'))}?")
    return Story(name, thing, start, tuple(happened), " ".join(told))


def held_out_stories(seed: int, sizes: dict[str, int]) -> dict[str, list[Story]]:
    """The problem sets: two or three events each, no question twice, whichever set it is in."""
    rng, seen = Random(f"{seed}-problems"), set[str]()
    sets: dict[str, list[Story]] = {}
    for split, size in sizes.items():
        sets[split] = []
        while len(sets[split]) < size:
            story = draw_story(rng, rng.choice((2, 3)))
            if story.question not in seen:
                seen.add(story.question)
                sets[split].append(story)
    return sets


# --- solvers ---


def _values(start: int, steps: list[Step]) -> list[int] | None:
    """The running number of things, from the start on; None when a step leaves the range."""
    values = [start]
    for step in steps:
        values.append(step.result(values[-1]))
        if not values[-1]:
            return None
    return values


def _hasty_steps(story: Story, rng: Random) -> list[Step]:
    """Take weak events wrongly with probability `HASTE`; 3 % of traces slip, 3 % leave an event out.

    Readings that leave the range are drawn again, so fewer weak events than that end up wrong.
    """
    for _ in range(24):
        steps = []
        for event in story.events:
            wrong = Step.hasty(event)
            steps.append(wrong if wrong and rng.random() < HASTE[event.kind] else Step.of(event))
        mishap = rng.random()
        at = rng.randrange(len(steps))
        if mishap < 0.03:
            steps[at] = replace(steps[at], slip=rng.choice((-10, -2, -1, 1, 2, 10)))
        elif mishap < 0.06 and len(steps) > 1:
            del steps[at]
        if _values(story.start, steps):
            return steps
    return [Step.of(event) for event in story.events]


def write_trace(story: Story, rng: Random, *, hasty: bool = False) -> str:
    """One solution, ending in `The answer is N.`; wording drawn at random, errors too if hasty."""
    steps = _hasty_steps(story, rng) if hasty else [Step.of(event) for event in story.events]
    wording = rng.choice((_narrated, _equations, _reasons, _numbered, _sorted))
    values = _values(story.start, steps)
    assert values is not None
    return f"{wording(story, steps, values, rng)} The answer is {values[-1]}."


def _equation(step: Step, before: int, after: int) -> str:
    """`7 + 4 = 11`."""
    return f"{before} {step.operation} {step.operand} = {after}"


def _product(step: Step) -> str:
    """`3 * 4 = 12` for three bags of four."""
    return f"{step.event.count} * {step.event.number} = {step.operand}"


def _narrated(story: Story, steps: list[Step], values: list[int], rng: Random) -> str:
    said = [rng.choice((f"{story.name} has {story.start} at first.", f"We begin with {story.start} {story.thing}."))]
    words = {
        "+": ("{n} more makes {e}.", "Adding {n} gives {e}."),
        "-": ("Without {n} there are {e}.", "Taking {n} away leaves {e}."),
        "*": ("{n} times as many is {e}.", "Multiplying by {n} gives {e}."),
        "/": ("Half of them is {e}.", "Halving leaves {e}."),
    }
    for step, before, after in zip(steps, values, values[1:], strict=False):
        lead = f"The bags hold {_product(step)}. " if step.bags else ""
        said.append(lead + rng.choice(words[step.operation]).format(n=step.operand, e=_equation(step, before, after)))
    return " ".join(said)


def _equations(story: Story, steps: list[Step], values: list[int], rng: Random) -> str:
    said = []
    for step, before, after in zip(steps, values, values[1:], strict=False):
        said += [_product(step)] if step.bags else []
        said.append(_equation(step, before, after))
    return rng.choice((". ", ", ")).join(said) + "."


def _reasons(story: Story, steps: list[Step], values: list[int], rng: Random) -> str:
    said, link = [], rng.choice(("because", "since"))
    pronoun = PRONOUNS[story.name].lower()
    for step, before, after in zip(steps, values, values[1:], strict=False):
        event = step.event
        number = {"bags": f" {event.count} bags of {event.number}", "times": " them", "half": " them"}.get(
            event.kind, f" {event.number}"
        )
        lead = f"{_product(step)}, so " if step.bags else ""
        said.append(f"{lead}{_equation(step, before, after)} {link} {pronoun} {event.verb}{number}.")
    return " ".join(said)


def _numbered(story: Story, steps: list[Step], values: list[int], rng: Random) -> str:
    said, label = [], rng.choice(("Step {i}:", "({i})"))
    for i, (step, before, after) in enumerate(zip(steps, values, values[1:], strict=False), start=1):
        lead = f"{_product(step)}, then " if step.bags else ""
        said.append(f"{label.format(i=i)} {lead}{_equation(step, before, after)}.")
    return " ".join(said)


def _sorted(story: Story, steps: list[Step], values: list[int], rng: Random) -> str:
    """What comes in, then what goes out; another wording if the order matters or leaves the range."""
    ins = [step for step in steps if step.operation == "+"]
    outs = [step for step in steps if step.operation == "-"]
    reordered = _values(story.start, ins + outs)
    plain = all(not step.bags and not step.slip for step in steps) and len(ins) + len(outs) == len(steps)
    if not (ins and outs and plain and reordered):
        return _narrated(story, steps, values, rng)
    told = [_equation(*item) for item in zip(ins + outs, reordered, reordered[1:], strict=False)]
    return f"In: {', '.join(told[: len(ins)])}. Out: {', '.join(told[len(ins) :])}."


def lessons(seed: int, role: str, held_out: set[str]) -> Iterator[tuple[str, str]]:
    """Endless (question, trace) to pre-train on, never a held-out question."""
    rng = Random(f"{seed}-{role}")
    hasty = role != "teacher"
    events, weights = (1, 2, 3), (30, 30, 40) if hasty else (15, 35, 50)
    while True:
        story = draw_story(rng, rng.choices(events, weights)[0])
        if story.question not in held_out:
            yield story.question, write_trace(story, rng, hasty=hasty)
