"""Buys under load: python tests/samplers/load_driver.py OPTIONS.json REQUESTS

Prints a line of JSON: how many completions came, and from after all imports to the last of them the seconds, the CPU
seconds of this process (all threads) and by how many MiB the most memory that it ever took has grown.
"""

import json
import resource
import sys
from pathlib import Path
from time import monotonic, process_time

import aiohttp  # noqa: F401
import openai.resources.chat  # noqa: F401
import uvloop  # noqa: F401

from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Decoding, Request, buyer  # noqa: F401
from orpo_distill.samplers.openai import OpenAI


def memory() -> float:
    """The most that this process has taken so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(options: str, count: str) -> int:
    sampler = OpenAI.model_validate_json(Path(options).read_text())
    requests = [Request(f"p{i}", 0, (Message("user", f"What is {i} + 1?"),), i) for i in range(int(count))]
    began, cpu, before = monotonic(), process_time(), memory()
    good = 0
    with sampler.open("faulty") as generate:
        for completion in generate(requests, Decoding(max_new_tokens=100)):
            good += completion.finish_reason is FinishReason.STOP
    seconds, cpu = monotonic() - began, process_time() - cpu
    print(json.dumps({"good": good, "seconds": seconds, "cpu": cpu, "memory": memory() - before}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
