"""Build what the quickstart ships, from nothing: the problem sets, the teacher, the student and its sibling.

    python scripts/build_quickstart.py                      15 min on 2 idle CPU cores
    python scripts/build_quickstart.py --problems-only      seconds
    python scripts/build_quickstart.py --only sibling       7 min on 1 idle CPU core; leaves all else as it is

Same seed and same library versions give the same problems anywhere, and the same weights on the same kind of machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from quickstart.check import Measured, Row, measure, report, usable
from quickstart.pretrain import ROLES, build_checkpoint
from quickstart.stories import held_out_stories, lessons

SIZES = {"train": 1000, "validation": 200, "test": 1000}
OUT = Path(__file__).resolve().parent.parent / "src" / "orpo_distill" / "quickstart"


def build_problems(seed: int) -> dict[str, list[Row]]:
    """The problem sets as rows of `id`, `question` and `answer`."""
    return {
        split: [
            {"id": f"quickstart-{split}-{i:05d}", "question": story.question, "answer": str(story.answer)}
            for i, story in enumerate(stories)
        ]
        for split, stories in held_out_stories(seed, SIZES).items()
    }


def write_problems(problems: dict[str, list[Row]], folder: Path) -> None:
    """One JSON line per problem, one file per split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in problems.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def build_and_measure(name: str, seed: int, out: Path, problems: dict[str, list[Row]]) -> tuple[Measured, str]:
    """Train, save and measure one model; runs in a process of its own, on one thread."""
    role, held_out = ROLES[name], {row["question"] for rows in problems.values() for row in rows}
    own = lessons(seed, name, held_out)
    words = own if role.words_of == name else lessons(seed, role.words_of, held_out)
    trained = build_checkpoint(role, words, own, seed, out / name)
    started = time.monotonic()
    measured = measure(out / name, problems["train"], problems["test"])
    seconds = f"  seconds: training {trained:.0f}, measuring {time.monotonic() - started:.0f}"
    return measured, f"{report(measured, problems['train'], problems['test'])}\n{seconds}"


def main(argv: Sequence[str] | None = None) -> int:
    """Build everything under `--out` and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for problems/ and the models'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems-only", action="store_true", help="write the problems and stop")
    parser.add_argument("--only", choices=ROLES, help="build this model and nothing else")
    options = parser.parse_args(argv)
    problems = build_problems(options.seed)
    if not options.only:
        write_problems(problems, options.out / "problems")
    if options.problems_only:
        return 0
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            name: pool.submit(build_and_measure, name, options.seed, options.out, problems)
            for name in ([options.only] if options.only else ROLES)
        }
        built = {name: job.result() for name, job in jobs.items()}
    for name, (measured, said) in built.items():
        print(said)
        if name != "teacher" and "teacher" in built:
            share = usable(built["teacher"][0], measured, problems["train"])
            print(f"  train problems with a right trace of the teacher and a wrong one of it: {100 * share:.1f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
