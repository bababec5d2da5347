"""Runs one train stage: python tests/stages/train_driver.py PAIRS OUT OPTIONS.json [disk=BYTES | memory=BYTES]

The body of processes that tests kill, signal, or start under accelerate. `disk` lets no file grow beyond that; `memory`
is what the process may take beyond what it has once everything is imported.
"""

import resource
import signal
import sys
from pathlib import Path

import torch

from orpo_distill.errors import Interrupted, OrpoDistillError
from orpo_distill.interrupt import signals_raise
from orpo_distill.stages.train import TrainOptions, train


def main(pairs: str, out: str, options: str, *limit: str) -> int:
    torch.set_num_threads(1)
    for kind, _, size in (one.partition("=") for one in limit):
        if kind == "disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
        else:
            import transformers.trainer  # noqa: F401

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            total = pages * resource.getpagesize() + int(size)
            resource.setrlimit(resource.RLIMIT_AS, (total, total))
    what = TrainOptions.model_validate_json(Path(options).read_text())
    try:
        with signals_raise():
            train(what, {"pairs": Path(pairs)}, Path(out))
    except Interrupted as error:
        return error.exit_code
    except OrpoDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
