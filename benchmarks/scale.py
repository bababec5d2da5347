"""Scale: pairs from 125,000 problems, verdicts a second, memory, and what cost depends on.

    python benchmarks/scale.py                          about 30 minutes on 2 CPU cores, 6 GB of disk
    python benchmarks/scale.py --quick                  a tenth of it
    python benchmarks/scale.py --plot docs/images/scale.svg

Texts are generated (`scale_side.py` says how), so that any size can be made. Every part is a process of its own and its
peak is that process's: Python, all imports and the tokenizer included.

One JSON line each:
- `pair`: the pair stage, K = 8 traces of the teacher and 8 of the student a problem, so 2,000,000 in all: duplicates
  and near duplicates (ROUGE-L) are dropped, lengths checked in tokens, pairs made;
- `sample`: the sample stage around a sampler that costs nothing, K = 8;
- `verify`: for `number`, `choice` and `yes_no` the verifier alone on one core, and the stage from file to file with as
  many processes as there are cores;
- `pair_series`: the pair stage with one of problems, K and characters a text varied, for the plot; characters
  twice: with texts that surely fit, and with every text's tokens counted, as those of texts that may not fit are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from environments import checkpoint, python_of
from scale_side import Kind, Spec

from orpo_distill.progress import say

HERE = Path(__file__).parent
CHARACTERS: dict[Kind, int] = {"number": 350, "choice": 560, "yes_no": 780}  # of recorded answers, on average
Line = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    problems: int = 125_000
    verified: int = 25_000  # problems a verifier, 8 traces each
    series: int = 4_000  # problems of a point


def measure(spec: Spec) -> Line:
    """What one process found. Raises SystemExit with its last words where it fails."""
    command = [sys.executable, str(HERE / "scale_side.py"), json.dumps(asdict(spec))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{spec} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: Line = json.loads(done.stdout)
    say(f"{spec.part} {spec.kind} {spec.problems} x {spec.samples}, {spec.characters} characters: {found}")
    return found


def with_texts(spec: Spec, *parts: str) -> list[Line]:
    """Each part's findings on the same generated texts, which are removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        spec = replace(spec, folder=folder)
        measure(replace(spec, part="make"))
        return [measure(replace(spec, part=part)) for part in parts]


def large(spec: Spec) -> Iterator[Line]:
    """The pair and sample stages at full size."""
    for part, found in zip(("pair", "sample"), with_texts(spec, "pair", "sample"), strict=True):
        yield _line(part, spec, found)


def verification(size: Size) -> Iterator[Line]:
    """Each verifier alone and in its stage."""
    for kind, characters in CHARACTERS.items():
        spec = Spec("verify", "", kind, size.verified, characters=characters, processes=os.cpu_count() or 1)
        alone, stage = with_texts(spec, "verifier", "verify")
        line = {"part": "verify", "verifier": kind, "traces": stage["traces"], "characters": characters}
        line["stage_processes"] = spec.processes
        line["verifier_traces_per_second"] = _rate(alone)
        line["stage_traces_per_second"] = _rate(stage)
        yield line | {"stage_peak_bytes": stage["peak_bytes"]}


def series(spec: Spec) -> Iterator[Line]:
    """Cost of the pair stage against each of the three axes; the others stand at `spec`."""
    lengths = [replace(spec, characters=characters) for characters in (250, 500, 1000, 2000, 4000)]
    axes = {
        "problems": [replace(spec, problems=spec.problems * times) for times in (1, 2, 4, 8)],
        "samples": [replace(spec, samples=samples) for samples in (2, 4, 8, 16, 32)],
        "characters": lengths,
        "characters, tokens counted": [replace(point, counted=True) for point in lengths],
    }
    for axis, points in axes.items():
        for point in points:
            (found,) = with_texts(point, "pair")
            yield {**_line("pair_series", point, found), "axis": axis}


def _line(part: str, spec: Spec, found: Line) -> Line:
    line = {"part": part, "problems": spec.problems, "samples": spec.samples, "characters": spec.characters, **found}
    line["seconds"] = round(found["seconds"], 2)
    return line | {"traces_per_second": _rate(found)}


def _rate(found: Line) -> int:
    return round(found["traces"] / found["seconds"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the problems")
    parser.add_argument("--problems", type=int, help="another number of problems; the rest shrinks with it")
    parser.add_argument("--tokenizer", type=Path, help="another checkpoint's folder than SmolLM2-135M-Instruct")
    parser.add_argument("--part", choices=("large", "verify", "series"), help="one part only")
    parser.add_argument("--plot", type=Path, help="draw the series into this SVG file")
    options = parser.parse_args(argv)
    problems = options.problems or Size.problems // (10 if options.quick else 1)
    size = Size(problems, max(1, problems // 5), max(1, problems // 31))
    tokenizer = options.tokenizer or checkpoint()
    spec = Spec("pair", "", problems=problems, tokenizer=str(tokenizer))
    parts = {
        "large": large(spec),
        "verify": verification(size),
        "series": series(replace(spec, problems=size.series, max_length=1 << 16)),
    }
    points = []
    for name, lines in parts.items():
        if options.part in (None, name):
            for line in lines:
                print(json.dumps(line), flush=True)
                points += [line] if name == "series" else []
    if options.plot and points:
        command = [str(python_of("plots")), str(HERE / "scale_plot.py"), str(options.plot)]
        subprocess.run(command, input=json.dumps(points), text=True, check=True)


if __name__ == "__main__":
    main()
