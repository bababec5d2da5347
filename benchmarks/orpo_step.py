"""Training: pairs a second and peak memory of an ORPO step, by this trainer and by TRL's.

    python benchmarks/orpo_step.py                      at most 45 minutes on 2 CPU cores
    python benchmarks/orpo_step.py --quick              a rough figure in 5: one problem, speed only
    python benchmarks/orpo_step.py --workload gsm8k     one of gsm8k, medqa, few_shot, all_pairs

SmolLM2-135M-Instruct; real lengths and real text (`workloads.py`). An optimizer step is one problem: 8 pairs of 16
traces, on all_pairs 64 pairs of them, of which TRL gets the first 8: the pairs of gsm8k, whose runs then count for
both. Both sides get the same token ids, weights of the same type without autocast, the same AdamW and clipping, and the
same objective: lambda 1 and TRL's likelihood, of prompt and chosen response, over the tokens of the batch. Nothing is
logged and activations are kept. The type is bfloat16; float32 where the machine multiplies faster in it
(`environments.fast_dtype`) or `--dtype` says so.

Each run is a process of its own: one short step to warm up, then one a problem. TRL's batch is the fastest of 1, 2 and
4 on the first problem (4 is tried where 2 is at least 2% faster than 1); then the sides take turns.
Speeds are all pairs over the sum of every problem's median time.

Prints two JSON lines a workload. In the first, `memory_ratio` compares one pass over the 16 traces of the first problem
(TRL: a batch of 8 pairs, or half as many until it fits into this machine's memory, which is then `trl_memory_batch`;
`step_side.Meter` says what a peak is). `max_loss_difference` is the absolute difference of the mean losses of its pairs
at the loaded weights. `floor_ratio` is this trainer's time over (6 x parameters x tokens / matrix rate): tokens count
each prompt and each trace once, parameters the tied output layer once; the rate is the best seen, in the same runs, of
products in the model's own shapes and type on all cores.

In the second, `"setting": "low_memory"`, on the first problem (on all_pairs 16 pairs of it), this trainer spreads the
traces over passes of at most `tokens_per_batch` tokens and recomputes activations; TRL has a batch of 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

from environments import Dtype, checkpoint, fast_dtype, python_of
from step_side import OUT_OF_MEMORY, Result, Row, Spec
from workloads import PROBLEMS, TRACES, WORKLOADS, problems

from orpo_distill.models import load_tokenizer
from orpo_distill.progress import say

SIDE = Path(__file__).with_name("step_side.py")
ONE_PASS = 8192  # tokens: more than any problem has
LOW_MEMORY = 512  # tokens
SHORT = 16  # tokens of a prompt and of a trace, in a warm-up that need not be whole


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    problems: int = PROBLEMS
    turns: int = 2
    batches: tuple[int, ...] = (1, 2, 4)  # among which TRL's is chosen
    trl_pairs: int = TRACES  # of a problem, that TRL is timed on
    everything: bool = True  # memory and losses too


QUICK = Size(problems=1, turns=1, batches=(2,), trl_pairs=4, everything=False)


@dataclass
class Runner:
    """Starts the sides' processes. What was measured in the same turn is not measured again."""

    model: Path
    trl_python: Path
    dtype: Dtype
    _done: dict[tuple[str, int], Result] = field(default_factory=dict)

    def ours(self, steps: list[list[Row]], batch: int, turn: int = 0, **options: Any) -> Result:
        """This trainer's steps; `batch` is in tokens."""
        return self._measure(Spec("ours", str(self.model), steps, batch, self.dtype, **options), turn)

    def trl(self, steps: list[list[Row]], batch: int, turn: int = 0) -> Result:
        """TRL's steps; `batch` is in pairs."""
        return self._measure(Spec("trl", str(self.model), steps, batch, self.dtype), turn)

    def _measure(self, spec: Spec, turn: int) -> Result:
        """Run one side. Raises MemoryError; SystemExit with its last words where it fails otherwise."""
        key = json.dumps(asdict(spec)), turn
        if key in self._done:
            return self._done[key]
        with tempfile.TemporaryDirectory() as folder:
            asked, answer = Path(folder) / "spec.json", Path(folder) / "result.json"
            asked.write_text(key[0])
            python = self.trl_python if spec.side == "trl" else sys.executable
            done = subprocess.run(
                [python, str(SIDE), str(asked), str(answer)],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode == OUT_OF_MEMORY:
                raise MemoryError
            if done.returncode or not answer.exists():
                raise SystemExit(f"{spec.side} ended with {done.returncode}:\n{done.stdout[-2000:]}")
            result = self._done[key] = Result(**json.loads(answer.read_text()))
        seconds = ", ".join(f"{each:.1f}" for each in result.seconds) or "loss only"
        highest = max(result.peak_bytes, default=0) / 1e9
        say(f"  {spec.side}, {spec.dtype}, batch {spec.batch}: {seconds} s, peak {highest:.2f} GB")
        return result


def compare(workload: str, runner: Runner, size: Size) -> Iterator[dict[str, Any]]:
    """The JSON lines of one workload."""
    steps = problems(workload, load_tokenizer(str(runner.model)))[: size.problems]
    some = steps[0][: 2 * TRACES]
    part = [step[: size.trl_pairs] for step in steps]
    warm, warm_part = shortened(steps[0]), shortened(part[0])
    best, trials = size.batches[0], dict[int, Result]()
    for batch in size.batches:
        trials[batch] = runner.trl([warm_part, part[0]], batch)
        if trials[batch].seconds[0] < 0.98 * trials[best].seconds[0]:
            best = batch
        elif batch != best:
            break
    ours, theirs = [], []
    for turn in range(size.turns):
        ours.append(runner.ours([warm, *steps], ONE_PASS, turn, rate=True))
        theirs.append(runner.trl([warm_part, *part], best, turn))
    first = {
        "workload": workload,
        "setting": "default",
        "dtype": runner.dtype,
        **speeds(steps, ours, part, theirs),
        **floor(ours),
        "trl_batch": best,
    }
    if not size.everything:
        yield first
        return
    memory_batch, memory = one_pass(steps[0][:TRACES], runner)
    yield {
        **first,
        **peaks(round(median(run.peak_bytes[0] for run in ours)), memory.peak_bytes[0]),
        "max_loss_difference": loss_difference(some, runner),
        "trl_pairs_per_second_batch_1": round(pairs_per_second(part[:1], [trials[1]]), 3),
        "trl_memory_batch": memory_batch,
    }
    spread = runner.ours([warm, some], LOW_MEMORY, checkpointing=True)
    yield {
        "workload": workload,
        "setting": "low_memory",
        "dtype": runner.dtype,
        **speeds([some], [spread], part[:1], [trials[1]]),
        **peaks(spread.peak_bytes[0], trials[1].peak_bytes[0]),
        "tokens_per_batch": LOW_MEMORY,
    }


def one_pass(step: list[Row], runner: Runner, batch: int = TRACES) -> tuple[int, Result]:
    """TRL's step in the largest batch that fits, up to all pairs, and that batch."""
    try:
        return batch, runner.trl([shortened(step), step], batch)
    except MemoryError:
        say(f"  trl, batch {batch}: out of memory")
        return one_pass(step, runner, batch // 2)


def shortened(step: Sequence[Row]) -> list[Row]:
    """The same number of pairs in next to no tokens."""
    return [{part: ids[:SHORT] for part, ids in row.items()} for row in step]


def pairs_per_second(steps: Sequence[Sequence[Row]], runs: Sequence[Result]) -> float:
    """Pairs of all steps over the sum of each step's median time."""
    return sum(map(len, steps)) / step_seconds(runs)


def step_seconds(runs: Sequence[Result]) -> float:
    """The sum over steps of the median over runs."""
    return sum(median(times) for times in zip(*(run.seconds for run in runs), strict=True))


def speeds(
    steps: Sequence[Sequence[Row]],
    ours: Sequence[Result],
    trl_steps: Sequence[Sequence[Row]],
    theirs: Sequence[Result],
) -> dict[str, float]:
    """Pairs a second of both sides and their ratio."""
    own, other = pairs_per_second(steps, ours), pairs_per_second(trl_steps, theirs)
    return {
        "ours_pairs_per_second": round(own, 3),
        "trl_pairs_per_second": round(other, 3),
        "speed_ratio": round(own / other, 2),
    }


def peaks(ours: int, theirs: int) -> dict[str, float]:
    """Peaks in bytes of both sides and their ratio."""
    return {"ours_peak_bytes": ours, "trl_peak_bytes": theirs, "memory_ratio": round(ours / theirs, 3)}


def loss_difference(step: list[Row], runner: Runner) -> float:
    """Between the mean losses of a step's pairs, at the loaded weights.

    TRL takes 8 pairs at a time, which on all_pairs (of which 16 are taken) are every chosen trace once: as many tokens
    in each batch, so that the mean over batches is the mean over the step.
    """
    ours, theirs = runner.ours([step], ONE_PASS).loss, runner.trl([step], TRACES).loss
    return float(f"{abs(ours - theirs):.2g}")


def floor(runs: Sequence[Result]) -> dict[str, float]:
    """The time over what the matrix products alone would take."""
    rate = max(run.matrix_rate for run in runs)
    least = 6 * runs[0].parameters * sum(runs[0].tokens) / rate
    return {
        "floor_ratio": round(step_seconds(runs) / least, 2),
        "ours_tokens_per_second": round(sum(runs[0].tokens) / step_seconds(runs), 1),
        "matrix_operations_per_second": float(f"{rate:.3g}"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one problem, speed only")
    parser.add_argument("--workload", choices=WORKLOADS, help="one of them only")
    parser.add_argument("--model", type=Path, help="another checkpoint's folder")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="of the weights (default: the faster one)")
    parser.add_argument("--trl-python", type=Path, help="an interpreter with TRL 1.16 (default: one is made)")
    options = parser.parse_args(argv)
    model, trl_python = options.model or checkpoint(), options.trl_python or python_of("trl")
    runner = Runner(model, trl_python, options.dtype or fast_dtype())
    for workload in [options.workload] if options.workload else WORKLOADS:
        say(workload)
        for line in compare(workload, runner, QUICK if options.quick else Size()):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
