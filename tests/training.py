"""What tests of training share: small pairs, a train stage in a folder, a trainer that is ready for one step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orpo_distill.component import component_class
from orpo_distill.config import TrainSection
from orpo_distill.groups import Row, tokenize
from orpo_distill.interrupt import Stop
from orpo_distill.models import load_tokenizer
from orpo_distill.objectives import Objective
from orpo_distill.records import Message, Pair, write_jsonl
from orpo_distill.stages.train import TrainOptions, train
from orpo_distill.teaching import Teacher, TeacherOptions


def ragged_pairs(problems: int = 7, seed: int = 0) -> list[Pair]:
    """1 to 4 pairs a problem, made of 2 chosen and 2 rejected texts of 1 to 30 letters; one rejected in four is cut."""
    coin = random.Random(seed)

    def text() -> str:
        return "".join(coin.choice("abcdef ") for _ in range(coin.randint(1, 30))) + "."

    pairs = []
    for problem in range(problems):
        chosen, rejected = [text(), text()], [text(), text()]
        cut = [coin.random() < 0.25 for _ in rejected]
        prompt = (Message("user", "question " + "x" * coin.randint(0, 20) + str(problem)),)
        for number in range(coin.randint(1, 4)):
            c, r = number % 2, number // 2
            ids = f"c{problem}-{c}", f"r{problem}-{r}"
            pairs.append(Pair(f"p{problem}", prompt, chosen[c], rejected[r], *ids, "teacher", "student-0", cut[r]))
    return pairs


def write_pairs(folder: Path, pairs: Sequence[Pair]) -> Path:
    """The folder of a pair stage that made these pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def objective(name: str = "orpo", **options: Any) -> Objective:
    """An objective by its short name."""
    return component_class(Objective, name).model_validate(options)  # type: ignore[type-abstract]


def options(
    model: Path, rounds: tuple[int, int, int] = (1, 1, 1), loss: Objective | None = None, **section: Any
) -> TrainOptions:
    """Options of a train stage: the first round, the last, and how many the run has."""
    first, last, total = rounds
    defaults = {"pairs_per_step": 4, "learning_rate": 1e-2, "checkpoint_minutes": 1e6}
    return TrainOptions(
        model=str(model),
        train=TrainSection.model_validate(defaults | section),
        objective=loss or objective(),
        rounds=total,
        first_round=first,
        last_round=last,
        seed=3,
    )


def run_train(what: TrainOptions, pairs: Path, out: Path, previous: Path | None = None) -> dict[str, Any]:
    """Run a train stage in the folder `out`."""
    out.mkdir(exist_ok=True)
    return train(what, {"pairs": pairs} | ({"previous": previous} if previous else {}), out)


def weights(out: Path) -> bytes:
    """The trained weights, byte for byte."""
    return (out / "model" / "model.safetensors").read_bytes()


def rows_of(model: Path, pairs: Sequence[Pair], with_rejected: bool = True) -> list[Row]:
    """The pairs in the model's tokens."""
    return tokenize(pairs, load_tokenizer(str(model)), 256, with_rejected)


def ready_trainer(
    model: Path,
    pairs: Sequence[Pair],
    loss: Objective,
    out: Path,
    tokens_per_batch: int = 64,
    teacher: Path | None = None,
    **section: Any,
) -> Any:
    """A trainer whose first `training_step(trainer.model, {})` is one step on all the pairs."""
    from orpo_distill.stages.train import _arguments, student_to_train
    from orpo_distill.trainer import Course, GroupTrainer, Watch

    tokenizer = load_tokenizer(str(model))
    rows = rows_of(model, pairs, teacher is None)
    course = Course([rows], 0, 1, loss, tokens_per_batch, out / "log.jsonl")
    if teacher is not None:
        course = replace(course, teacher=Teacher(TeacherOptions(model=str(teacher)), loss, tokenizer, rows))
    what = options(model, loss=loss, **section)
    args = _arguments(what, course, out)
    watch = Watch(Stop(), 1e6, lambda n: None)
    trainer = GroupTrainer(student_to_train(what.model, what.train, args.seed), tokenizer, args, course, watch)
    trainer.create_optimizer_and_scheduler(10)
    return trainer
