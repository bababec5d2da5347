"""ExPO: weights moved on in the direction that training moved them (arXiv 2404.16792).

    theta = theta_0 + (1 + alpha) * (theta_1 - theta_0)

theta_0 is the student before its training (or after the warm-up), theta_1 the trained one. It costs a pass over the
weights and no training; how far to go is chosen on validation. Adapters are merged first: their delta scales alike.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat

from orpo_distill.checkpoints import MODEL
from orpo_distill.component import Options
from orpo_distill.errors import DataError, ModelError
from orpo_distill.models import adapter_base, load_model, load_tokenizer, save_checkpoint
from orpo_distill.progress import say
from orpo_distill.records import sync_folder, write_text

if TYPE_CHECKING:
    from torch import nn

CHOICE = "choice.json"


class ExtrapolateOptions(Options):
    """How far to go. `initial` is the student before all training; inputs["origin"], if given, stands in for it."""

    alpha: NonNegativeFloat
    initial: str
    dtype: Literal["float32", "bfloat16"]  # of the weights that are written
    trust_remote_code: bool = False


class ChooseOptions(Options):
    """The values of alpha, and the policy that each was evaluated as."""

    alpha: tuple[NonNegativeFloat, ...]
    policies: tuple[str, ...]


def extrapolate(options: ExtrapolateOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the `model` of inputs["model"], moved on by alpha, as an ordinary folder. Arithmetic is in float32.

    Returns alpha and the root mean square of the weights' distance. Raises ModelError where the two models differ in
    more than their values.
    """
    trained, origin = inputs["model"] / MODEL, inputs["origin"] / MODEL if "origin" in inputs else None
    final = load_model(str(trained), "float32", "cpu", options.trust_remote_code)
    first = _origin(options, trained, origin)
    moved = move_on(first, final, options.alpha)
    partial = out / f"{MODEL}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    save_checkpoint(_in_dtype(final, options.dtype), load_tokenizer(str(trained), options.trust_remote_code), partial)
    sync_folder(partial)
    shutil.rmtree(out / MODEL, ignore_errors=True)
    partial.rename(out / MODEL)
    return {"alpha": options.alpha, "rms_trained": moved}


def _origin(options: ExtrapolateOptions, trained: Path, origin: Path | None) -> Any:
    """Where training started, in the number type that it started in, as float32."""
    name = str(origin) if origin else options.initial
    is_adapter = adapter_base(trained) is not None  # its base was never rounded to the weights' type on disk
    dtype = "float32" if is_adapter else options.dtype
    return load_model(name, dtype, "cpu", options.trust_remote_code).float()  # type: ignore[no-untyped-call]


def _in_dtype(model: Any, dtype: str) -> Any:
    import torch

    return model.to(getattr(torch, dtype))


def move_on(first: nn.Module, final: nn.Module, alpha: float) -> float:
    """Change `final` in place to first + (1 + alpha) * (final - first), every weight once (tied ones are one).

    Returns the root mean square of final - first. Raises ModelError where names or shapes differ.
    """
    import torch

    before = dict(first.named_parameters())
    after = dict(final.named_parameters())
    different = {*before} ^ {*after} or {name for name in before if before[name].shape != after[name].shape}
    if different:
        raise ModelError(
            f"expected the same weights before and after training, found that {sorted(different)[0]} differs; "
            "extrapolation needs the model that training started from"
        )
    squares, count = 0.0, 0
    with torch.no_grad():
        for name, weight in after.items():
            delta = weight - before[name]
            squares += float(delta.double().square().sum())
            count += delta.numel()
            weight.copy_(before[name] + (1 + alpha) * delta)
    return float((squares / count) ** 0.5)


def choose(options: ChooseOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Take the alpha with most right answers on validation, the smallest of equal ones; put its model into `model`.

    Inputs `model:ALPHA` and `evaluate:ALPHA`. Writes `choice.json`, and returns it: all alphas with their results.
    Raises DataError where no validation problem was answered.
    """
    rows = []
    for alpha, policy in zip(options.alpha, options.policies, strict=True):
        results = json.loads((inputs[f"evaluate:{alpha:g}"] / "results.json").read_bytes())
        for result in (row for row in results if row["split"] == "validation"):
            rows.append(
                {"alpha": alpha, "policy": policy, **{key: result[key] for key in ("n", "correct", "accuracy")}}
            )
    if len(rows) < len(options.alpha):
        raise DataError(
            "expected validation problems to choose extrapolate.alpha on, found none; give the task a validation split "
            "or leave extrapolate out"
        )
    best = max(rows, key=lambda row: (row["correct"], -row["alpha"]))
    say(f"  alpha {best['alpha']:g}: {best['accuracy']:.1%} of {best['n']} on validation, the most")
    if not (out / MODEL).is_dir():
        partial = out / f"{MODEL}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(inputs[f"model:{best['alpha']:g}"] / MODEL, partial)
        partial.rename(out / MODEL)
    content = {"alpha": best["alpha"], "policy": best["policy"], "tried": rows}
    write_text(out / CHOICE, json.dumps(content, indent=1) + "\n")
    return content
