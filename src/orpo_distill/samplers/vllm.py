"""Sample through vLLM's offline engine, in a process and an environment of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt

from orpo_distill import progress
from orpo_distill.component import SPEED_ONLY
from orpo_distill.errors import ConfigError, ModelError, missing_extra
from orpo_distill.models import Dtype, adapter_base, checkpoint_folder, load_tokenizer
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from orpo_distill.samplers.tokens import Asked, completion, encode_requests, end_tokens, failed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORKER = Path(__file__).with_name("vllm_worker.py")
SECONDS_TO_STOP = 10.0
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM knows
LAST_LINES = 5
RAISED = re.compile(r"(?:^|\] )\s*((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
NO_CAUSE = ("Engine core initialization failed", "WorkerProc initialization failed", "EngineCore encountered an issue")


class VLLM(Sampler):
    """Checkpoints' folders, hub ids and LoRA adapters, through vLLM.

    `python` is an interpreter that has vLLM; this package need not be installed there. The engine leaves with its
    process, at the latest when this process dies. Prompts are encoded, and texts decoded, here.

    Each trace is a request with its own seed, as vLLM itself makes of n = K. Those of one prompt find its keys and
    values in the prefix cache, so it is computed once, but for its last, unfilled block (of 16 tokens on a GPU, 32 on a
    CPU). A text follows from its prompt, its seed and the decoding settings, but for rounding, as with `hf`; the same
    seed gives another text than there. vLLM raises temperatures between 0 and 0.01 to 0.01. The checkpoint's own
    sampling defaults are not used.

    A LoRA adapter is applied beside its base, as in training, not merged into it.
    """

    python: Annotated[Path, SPEED_ONLY] = Path(sys.executable)
    tensor_parallel_size: Annotated[PositiveInt, SPEED_ONLY] = 1  # GPUs of each process
    gpu_memory_utilization: Annotated[float | None, Field(gt=0, le=1), SPEED_ONLY] = None  # vLLM's own; 0.4 on a CPU
    dtype: Dtype = "bfloat16"
    max_model_len: PositiveInt | None = None  # tokens of prompt and text together; None: what the checkpoint allows
    trust_remote_code: bool = False
    extra: dict[str, Any] = {}  # more arguments of vllm.LLM

    @property
    def devices(self) -> int:
        """The GPUs that each process takes."""
        return self.tensor_parallel_size

    def check(self) -> None:
        """Raise ConfigError where `python` is no interpreter or has no vLLM."""
        script = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        advice = "install vLLM in an environment of its own and give sampler.python its interpreter"
        python = self.python.expanduser()
        try:
            done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(
                f"expected a Python interpreter at {python}, found: {error.strerror}; {advice}"
            ) from error
        if done.returncode:
            found = (done.stderr.strip().splitlines() or ["it is not installed there"])[-1]
            raise ConfigError(f"expected vLLM in the environment of {python}, found: {found}; {advice}")

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        """Start the engine's process. Raises ConfigError where something is not installed; ModelError."""
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise missing_extra("transformers", "hf") from error
        self.check()
        folder = checkpoint_folder(model)
        base = adapter_base(folder)
        tokenizer = load_tokenizer(model, self.trust_remote_code)
        ends = end_tokens(_generation_config(base or str(folder or model), self.trust_remote_code), tokenizer)
        order = {
            "engine": self._arguments(base or str(folder or model), folder if base else None),
            "adapter": str(folder.resolve()) if folder and base else None,
        }
        progress.say(f"  starting vLLM for {model}")
        with tempfile.TemporaryFile() as log, _process(self.python.expanduser(), log) as process:
            yield Engine(process, log, model, order, tokenizer, ends)

    def _arguments(self, model: str, adapter: Path | None) -> dict[str, Any]:
        """The arguments of vllm.LLM."""
        asked = {"gpu_memory_utilization": self.gpu_memory_utilization, "max_model_len": self.max_model_len}
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(adapter)} if adapter else {}
        return {
            "model": model,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "trust_remote_code": self.trust_remote_code,
            "generation_config": "vllm",  # not the checkpoint's
            **{name: value for name, value in asked.items() if value is not None},
            **lora,
            **self.extra,
        }


class Engine:
    """The engine's process as a `Generate` function. `context`: the most tokens of prompt and text together."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        log: IO[bytes],
        model: str,
        order: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        ends: tuple[int, ...],
    ) -> None:
        self.process, self.log, self.model, self.tokenizer, self.ends = process, log, model, tokenizer, ends
        self.numbers = count()
        self._send(order)
        self.context: int = self._receive()["context"]

    def __call__(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Every request's completion, each as soon as it is finished. Raises ModelError if the process dies."""
        prompts: dict[tuple[int, ...], dict[int, Asked]] = {}
        for one in encode_requests(self.tokenizer, requests, decoding.max_new_tokens, self.context):
            if one.error:
                yield failed(one, one.error)
            else:
                prompts.setdefault(one.prompt, {})[next(self.numbers)] = one
        waiting: dict[int, Asked] = {}
        settings = {"decoding": decoding.model_dump(), "ends": self.ends}
        for prompt, asked in prompts.items():
            samples = [(number, one.request.seed % 2**63) for number, one in asked.items()]
            room = next(iter(asked.values())).room
            self._send({"prompt": prompt, "samples": samples, "room": room, **settings})
            waiting.update(asked)
        while waiting:
            answer = self._receive()
            answered = waiting.pop(answer["number"], None)  # None: of a call that was not heard to its end
            if answered and "error" in answer:
                yield failed(answered, answer["error"])
            elif answered:
                yield completion(self.tokenizer, answered, answer["tokens"], answer["stopped"], decoding)

    def _send(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death("") from error

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death("")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise self._death(answer["failed"])
        return answer

    def _death(self, said: str) -> ModelError:
        """Why the process is gone: what it said, or the first error in its log, or how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_STOP)
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        code = self.process.returncode
        ended = f"its process was killed by signal {-code}" if code and code < 0 else f"its process ended with {code}"
        found = said if said and not any(text in said for text in NO_CAUSE) else root_cause(lines) or said or ended
        found = " ".join(found.split())
        last = "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
        return ModelError(
            f"expected vLLM to sample from {self.model}, found: {found}; what was finished is kept: mend it (see the "
            f"sampler's options, and `extra` for vLLM's own) and run the same command. It said last:\n{last}"
        )


def root_cause(lines: Iterable[str]) -> str:
    """The first error that a log names, apart from those that only say that another process has failed; or nothing."""
    for line in lines:
        if " WARNING " not in line and (found := RAISED.search(line)) and not any(t in found[1] for t in NO_CAUSE):
            return found[1]
    return ""


@contextmanager
def _process(python: Path, log: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The worker's process. It and all that it started are gone when the block ends."""
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    process = subprocess.Popen(
        [python, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_STOP)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _generation_config(model: str, trust_remote_code: bool) -> Any:
    """The checkpoint's generation config, as `from_pretrained` finds it: its own file, else the model's config."""
    from transformers import AutoConfig, GenerationConfig

    from_pretrained: Any = GenerationConfig.from_pretrained
    try:
        return from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        )


def _lora_rank(adapter: Path) -> int:
    """The least rank that vLLM knows and that an adapter fits in."""
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    most: int = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return min((rank for rank in LORA_RANKS if rank >= most), default=most)
