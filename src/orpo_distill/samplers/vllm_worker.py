"""The process that vLLM runs in. It imports the standard library and vLLM only: nothing else need be installed there.

    PYTHON vllm_worker.py        PYTHON has vLLM; `samplers/vllm.py` starts it in a process group of its own

Lines of JSON go in on stdin and come out on stdout; what vLLM says goes to stderr. The first line in is
{"engine": arguments of vllm.LLM, "adapter": folder or null}; out comes {"context": most tokens}, or {"failed": why}.
Every line in after that is {"prompt": token ids, "samples": [[number, seed], ...], "room": most tokens to draw,
"decoding": {...}, "ends": token ids}; for each sample, as it is finished, out comes {"number", "tokens", "stopped"} or
{"number", "error"}. The end of stdin, which is also how the death of the other side shows, ends the whole group.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from typing import Any

ADDED_A_STEP = 256  # most prompts given to the engine between two looks at what is finished
SECONDS_TO_STOP = 5.0
CPU_DEFAULTS = {"gpu_memory_utilization": 0.4, "block_size": 32}  # vLLM's own: 0.92 of the machine's memory; 128

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Load the engine, then serve until stdin ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    here = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path != here]  # its vllm.py is not the engine
    # A function, not SIG_IGN, which the engine's processes would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    lines: Queue[str] = Queue()
    ending = threading.Event()
    threading.Thread(target=_read, args=(lines, ending), daemon=True).start()

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer, separators=(",", ":")) + "\n")

    try:
        Worker(json.loads(lines.get()), say).serve(lines)
    except BaseException:
        if ending.is_set():
            threading.Event().wait()  # the reading thread is ending this process
        raise


def _read(lines: Queue[str], ending: threading.Event) -> None:
    """Pass the lines of stdin on. At its end, end the engine's processes, politely, then all that is left of the group.

    Killed at once, they would leave shared memory behind.
    """
    for line in sys.stdin:
        lines.put(line)
    ending.set()
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


class Worker:
    """A loaded engine."""

    def __init__(self, order: dict[str, Any], say: Say) -> None:
        self.say = say
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform

            defaults = CPU_DEFAULTS if current_platform.is_cpu() else {}
            self.engine = LLM(**{**defaults, **order["engine"]}).llm_engine
        except Exception as error:
            say({"failed": f"{type(error).__name__}: {error}"})
            raise
        self.adapter = LoRARequest("adapter", 1, order["adapter"]) if order["adapter"] else None
        self.vocabulary = self.engine.model_config.get_vocab_size()
        say({"context": self.engine.model_config.max_model_len})

    def serve(self, lines: Queue[str]) -> None:
        """Serve for ever: what comes in joins what is being decoded; what is finished goes out."""
        while True:
            try:
                for _ in range(ADDED_A_STEP):
                    self.add(json.loads(lines.get(block=not self.engine.has_unfinished_requests())))
            except Empty:
                pass
            for done in self.engine.step():
                if done.finished:
                    self.finish(done)

    def add(self, asked: dict[str, Any]) -> None:
        """Give the engine one request a sample; all find the prompt's blocks that the first has made."""
        for number, seed in asked["samples"]:
            try:
                self.engine.add_request(
                    str(number),
                    {"prompt_token_ids": asked["prompt"]},
                    self.parameters(asked, seed),
                    lora_request=self.adapter,
                )
            except ValueError as error:  # such as a token that the model does not have
                self.say({"number": number, "error": str(error)})

    def parameters(self, asked: dict[str, Any], seed: int) -> Any:
        """vLLM's settings of one sample. Nothing is left to the checkpoint's own defaults."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        decoding = asked["decoding"]
        return SamplingParams(
            temperature=decoding["temperature"],
            top_p=decoding["top_p"],
            top_k=decoding["top_k"] or -1,
            seed=seed,
            max_tokens=asked["room"],
            stop=decoding["stop"],
            stop_token_ids=[token for token in asked["ends"] if token < self.vocabulary],
            ignore_eos=True,  # stop_token_ids has all that end a text
            detokenize=bool(decoding["stop"]),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def finish(self, done: Any) -> None:
        """Say what came of a sample: its tokens without the end token."""
        number, found = int(done.request_id), done.outputs[0]
        if found.finish_reason not in ("stop", "length"):
            self.say({"number": number, "error": f"vLLM ended it as {found.finish_reason!r}"})
            return
        tokens = list(found.token_ids)
        if isinstance(found.stop_reason, int):
            del tokens[-1]
        self.say({"number": number, "tokens": tokens, "stopped": found.finish_reason == "stop"})


if __name__ == "__main__":
    main()
