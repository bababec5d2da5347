"""Load a model or its tokenizer from a folder, a LoRA adapter's folder or the hub; say plainly why it cannot be.

Nothing here imports torch or transformers until it is called.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orpo_distill.errors import ModelError, OrpoDistillError, missing_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; of a LoRA adapter its own if it has one, else its base model's.

    Raises ModelError.
    """
    folder = checkpoint_folder(model)
    base = adapter_base(folder)
    if folder is not None and base is not None and not (folder / "tokenizer_config.json").exists():
        return load_tokenizer(base, trust_remote_code)
    from transformers import AutoTokenizer

    with _attributed("tokenizer", model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder or model), trust_remote_code=trust_remote_code
        )
    return tokenizer


def load_model(
    model: str, dtype: Dtype = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model in evaluation mode, on its device.

    `dtype: auto` is float32 on a CPU and the checkpoint's own type elsewhere. A LoRA adapter is merged into its base.
    Raises ModelError, also where the folder lacks some of the model's weights; ConfigError if peft is not installed.
    """
    device = pick_device(device)
    folder = checkpoint_folder(model)
    base = adapter_base(folder)
    if folder is not None and base is not None:
        return _load_adapter(folder, load_model(base, dtype, device, trust_remote_code))
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    with _attributed("model", model):
        loaded, info = load(
            str(folder or model), dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"expected every weight of the model in {model}, found {len(missing)} missing, such as {missing[0]}; "
                "the checkpoint is incomplete or belongs to another architecture"
            )
        on_device: PreTrainedModel = loaded.to(device).eval()
    return on_device


def pick_device(device: str = "auto") -> str:
    """`auto`: CUDA if there is a device, else the CPU. Raises ModelError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"expected the device {device!r}, found: {_first_line(error)}; use `device: auto`") from error
    return device


def checkpoint_folder(model: str) -> Path | None:
    """The folder that `model` names, or None for what can only be a hub id. Raises ModelError if it is neither."""
    path = Path(model).expanduser()
    if not model.strip():
        raise ModelError("expected a checkpoint's folder or a hub id, found an empty name")
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ModelError(
                f"expected a checkpoint in {model}, found no config.json (nor adapter_config.json); "
                "give the folder that `save_pretrained` wrote"
            )
        return path
    if path.exists():
        raise ModelError(f"expected a checkpoint's folder, found the file {model}; give the folder it is in")
    if HUB_ID.fullmatch(model):
        return None
    raise ModelError(f"expected a checkpoint's folder or a hub id, found nothing at {model}; check the path")


def adapter_base(folder: Path | None) -> str | None:
    """The base model that a LoRA adapter's folder names; None for anything else. Raises ModelError."""
    if folder is None or (folder / "config.json").exists():
        return None
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"expected base_model_name_or_path in {folder}/adapter_config.json, found {error!r}"
        ) from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"expected base_model_name_or_path in {folder}/adapter_config.json, found {base!r}")
    return base


def _load_adapter(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise missing_extra("peft", "lora") from error
    with _attributed("adapter", str(folder)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for attributes by their old names
        merged: Any = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        model: PreTrainedModel = merged.eval()
    return model


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Write an ordinary checkpoint folder (or adapter's), with the permissions of any other new file."""
    from safetensors import SafetensorError

    try:
        with _no_progress_bars():
            model.save_pretrained(folder, state_dict=state_dict)
    except SafetensorError as error:  # how a full disk shows
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)
    readable = 0o666 & ~_umask()
    for file in folder.glob("*.safetensors"):  # safetensors makes them private
        file.chmod(readable)


def restore(model: PreTrainedModel, folder: str) -> None:
    """Put a saved checkpoint's weights into a model of the same architecture. Raises ValueError if any is missing."""
    load: Any = type(model).from_pretrained
    with _no_progress_bars():
        saved, info = load(folder, dtype=model.dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights missing, such as {missing[0]}")
    model.load_state_dict(saved.state_dict())


def begin_from(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint, or of an adapter where the model has one, into a model before its training.

    Raises ModelError where they do not fit.
    """
    with _attributed("model", str(folder)):
        if not hasattr(model, "peft_config"):
            restore(model, str(folder))
            return
        from peft import load_peft_weights, set_peft_model_state_dict

        found: Any = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        if found.unexpected_keys:
            raise ValueError(f"{len(found.unexpected_keys)} unknown weights, such as {found.unexpected_keys[0]}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _attributed(what: str, model: str) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read is the checkpoint's fault."""
    try:
        with _no_progress_bars():
            yield
    except OrpoDistillError:
        raise
    except Exception as error:
        found = f"expected a {what} at {model}, found: {_first_line(error)}"
        raise ModelError(f"{found}; {_advice(error, model)}") from error


def _advice(error: Exception, model: str) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "if you trust the code in this checkpoint, set trust_remote_code: true"
    if not Path(model).expanduser().exists():
        return f"check the name and the network, or give the path of a folder (there is none at {model!r})"
    return "give a causal language model's folder as `save_pretrained` writes it, undamaged"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
