"""One process of two that share a model's parameters: python tests/scoring_driver.py RANK STORE MODEL OUT WAY

The model is sharded as accelerate does it, takes one packed batch, and rank 0 saves what it gave: the
log-probabilities and every parameter's whole gradient.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from orpo_distill.groups import Row
from orpo_distill.models import load_model
from orpo_distill.packing import collate
from orpo_distill.records import Message, Pair
from orpo_distill.scoring import prepare

PAIR = Pair("p", (Message("user", "q"),), "a", "b", "c", "r", "teacher", "student-0")
SHAPES = (((5, 6, 7), 20, 3), ((8,), 31, 1))  # a prompt, and how long its traces are
ROWS = [Row(1, PAIR, prompt, tuple(range(9, 9 + c)), tuple(range(50, 50 + r))) for prompt, c, r in SHAPES]


def score(model: nn.Module) -> Tensor:
    """Log-probabilities after a backward pass of their weighted sum."""
    logps: Tensor = model(packed=collate(ROWS, True))
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return logps.detach()


def sharded(model: Any, way: str) -> nn.Module:
    """FSDP2 (`fully_shard`) layer by layer with the ends apart, or FSDP1."""
    layers = model.base_model.layers
    if way == "fsdp1":
        policy = ModuleWrapPolicy({type(layers[0])})
        strategy = ShardingStrategy.FULL_SHARD
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, sharding_strategy=strategy, use_orig_params=True, device_id=None
        )
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2,)), "mp_policy": MixedPrecisionPolicy()}
    for layer in layers:
        fully_shard(layer, **options, reshard_after_forward=True)
    ends = [model.base_model.norm, model.get_output_embeddings()]
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        ends.insert(1, model.get_input_embeddings())
    else:
        fully_shard(model.get_input_embeddings(), **options)
    fully_shard(ends, **options, reshard_after_forward=False)
    return fully_shard(model, **options)


def whole_gradients(model: nn.Module, way: str) -> dict[str, Tensor]:
    if way == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {name.replace("_fsdp_wrapped_module.", ""): one.grad for name, one in model.named_parameters()}
    return {name: one.grad.full_tensor() for name, one in model.named_parameters()}


def main(rank: int, store: str, folder: str, out: str, way: str) -> None:
    torch.set_num_threads(1)
    model: Any = load_model(folder, "float32", "cpu")
    route = prepare(model, ROWS[:1], recompute="recompute" in way)
    assert not route.reasons, route
    model.train()
    if way == "alone":
        found = {"logps": score(model), **{name: one.grad for name, one in model.named_parameters()}}
    else:
        distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
        parts = sharded(model, way)
        if "checkpoint" in way:
            model.activation_checkpointing_enable()
        found = {"logps": score(parts), **whole_gradients(parts, way)}
    if rank == 0:
        torch.save(found, Path(out))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
