"""Drop the layers of a checkpoint that change its hidden state least, and save what is left as a checkpoint.

    python scripts/prune_layers.py CHECKPOINT OUT --texts FILE [--share 0.2]

Of all blocks of n consecutive layers the one goes whose input and output point most nearly the same way (Gromov et al.,
"The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 3.2), by the angular distance

    d(l) = mean over tokens of  arccos( x_l . x_(l+n) / (|x_l| |x_(l+n)|) ) / pi

where x_l is what enters layer l at a token: 0 the same direction, 1 the opposite one. The paper takes the last token of
many long texts; here it is every token but a text's first, whose state is of another size and hardly turns. n is the
share of all layers, rounded. What is left answers worse until it is trained: `configs/pruned-dadpo.yaml` does that.
FILE has rows with a field `text` or `question`, as JSON Lines (also gzipped) or Parquet: problems, or a run's traces.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import ConfigError, DataError, ModelError, OrpoDistillError
from orpo_distill.models import adapter_base, checkpoint_folder, load_model, load_tokenizer, save_checkpoint
from orpo_distill.progress import say
from orpo_distill.runs import disk_errors_explained
from orpo_distill.tasks.rows import read_rows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
"""Settings of a model that have one value a layer."""

TOLERANCE = 0.01  # of the largest logit: what low precision may do, and less than another architecture does


def read_texts(path: Path, most: int) -> list[str]:
    """The first texts of a file. Raises DataError if it has none."""
    rows = (row.fields.get("text") or row.fields.get("question") for row in read_rows(path))
    texts = [text for text in rows if isinstance(text, str) and text.strip()][:most]
    if not texts:
        raise DataError(f"expected rows with a field text or question in {path}, found none")
    return texts


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers that every token passes, one after the other. Raises ModelError."""
    from torch import nn

    count = getattr(model.config, "num_hidden_layers", None)
    stacks = [part for part in model.base_model.children() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(stacks) != 1:
        raise ModelError(
            f"expected one stack of {count} layers in {type(model).__name__}, found {len(stacks)}; "
            "give a plain decoder's checkpoint"
        )
    return stacks[0]


@contextmanager
def hooked(layers: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    """While it lasts, each layer's call ends with `hook(layer, inputs, output)`, which may return another output."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: PreTrainedModel, ids: Tensor, skipped: Iterable[nn.Module] = ()) -> Tensor:
    """Logits (1, T, V) of a text, passing by some of the model's layers."""
    import torch

    def skip(_: nn.Module, given: tuple[Tensor, ...], made: Any) -> Any:
        return (given[0], *made[1:]) if isinstance(made, tuple) else given[0]

    with torch.inference_mode(), hooked(skipped, skip):
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What enters each of L layers, and what leaves the last one: ids (1, T) -> (L + 1, T, H)."""
    import torch

    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], made: Any) -> None:
        entering.append(given[0][0])
        leaving.append((made[0] if isinstance(made, tuple) else made)[0])

    with torch.inference_mode(), hooked(decoder_layers(model), keep):
        model(input_ids=ids, use_cache=False)
    return torch.stack([*entering, leaving[-1]])


def block_distances(states: Tensor, size: int) -> Tensor:
    """Angular distance between what enters and what leaves each block of `size` layers.

    states (L + 1, T, H) -> (L + 1 - size, T), in half turns.
    """
    import torch

    exact = states.double()
    return torch.cosine_similarity(exact[:-size], exact[size:], dim=-1).clamp(-1, 1).arccos() / torch.pi


def least_block(model: PreTrainedModel, texts: Sequence[Tensor], share: float) -> range:
    """The layers that change what they are given least. Raises ConfigError where the share leaves nothing to do."""
    import torch

    count = len(decoder_layers(model))
    size = round(share * count) if 0 < share < 1 else 0
    if not 0 < size < count:
        raise ConfigError(
            f"expected a --share that drops at least 1 of {count} layers and leaves at least 1, found {share:g}; "
            f"try {1 / count:.2f}"
        )
    distances = torch.cat([block_distances(hidden_states(model, ids)[:, 1:], size) for ids in texts], dim=1).mean(1)
    if not distances.isfinite().all():
        raise ModelError("expected finite hidden states, found NaN or infinity; give an undamaged checkpoint")
    first = int(distances.argmin())
    say(
        f"dropping layers {first} to {first + size - 1} of {count}, counted from 0: angular distance "
        f"{distances[first]:.3f}; the {len(distances)} blocks of {size}: {distances.min():.3f} to {distances.max():.3f}"
    )
    return range(first, first + size)


def drop(model: PreTrainedModel, block: range) -> None:
    """Take a block of layers out of a model and its config."""
    layers, config = decoder_layers(model), model.config
    del layers[block.start : block.stop]
    for name in PER_LAYER:
        if values := vars(config).get(name):
            setattr(config, name, [value for number, value in enumerate(values) if number not in block])
    config.num_hidden_layers = len(layers)


def prune(checkpoint: str, texts: Sequence[str], share: float, length: int, out: Path) -> None:
    """Save `checkpoint` without its least block, in its own number type: `out` appears complete or not at all."""
    from transformers import AutoConfig

    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    cut: Any = {"truncation": True, "max_length": length, "return_tensors": "pt"}
    encoded = [tokenizer(text, **cut)["input_ids"].to(model.device) for text in texts]
    if all(ids.shape[1] < 2 for ids in encoded):
        raise DataError(
            f"expected a text of two tokens or more, found none; give longer texts or --length above {length}"
        )
    block = least_block(model, encoded, share)
    longest = max(encoded, key=lambda ids: ids.shape[1])
    expected = logits(model, longest, decoder_layers(model)[block.start : block.stop])
    drop(model, block)
    folder = checkpoint_folder(checkpoint)
    if dtype := AutoConfig.from_pretrained(adapter_base(folder) or folder or checkpoint).dtype:
        model.to(dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as near:
        made = Path(near) / "made"
        save_checkpoint(model, tokenizer, made)
        # Settings may depend on a layer's number in ways that are not known here.
        if (logits(load_model(str(made)), longest) - expected).abs().max() > TOLERANCE * expected.abs().max():
            raise ModelError(
                f"expected {type(model).__name__} to work without these layers as if they were passed by, found other "
                "logits; its layers depend on their numbers, so it cannot be pruned"
            )
        made.rename(out)
    say(f"saved {out}: {len(decoder_layers(model))} layers, {model.num_parameters():,} parameters")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a model's folder, a LoRA adapter's (it is merged) or a hub id")
    parser.add_argument("out", type=Path, help="the folder to write; nothing may be there")
    parser.add_argument("--texts", type=Path, required=True, help="rows with a field text or question")
    parser.add_argument("--share", type=float, default=0.2, help="of the layers (%(default)s)")
    parser.add_argument("--limit", type=int, default=256, help="texts that are read (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text that are read (%(default)s)")
    options = parser.parse_args(argv)
    try:
        if min(options.limit, options.length) < 1:
            raise ConfigError(f"expected --limit and --length above 0, found {options.limit} and {options.length}")
        if options.out.exists():
            raise ModelError(f"expected nothing at {options.out}, found something; remove it or give another folder")
        texts = read_texts(options.texts, options.limit)
        with disk_errors_explained(options.out):
            prune(options.checkpoint, texts, options.share, options.length, options.out)
    except OrpoDistillError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
