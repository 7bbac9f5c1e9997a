"""Data parallel training of converted models: two processes on the CPU, with gloo."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import mxkernels as mx
from mxkernels.recipes import RECIPES, Recipe

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

WORLD = 2
# e2m1 throughout, and nothing drawn, so that what the ranks do apart can be done again in one process.
NEAREST = Recipe(*[RECIPES["mxfp4"].forward] * 3)


def model() -> nn.Module:
    torch.manual_seed(1)
    return mx.convert(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.LayerNorm(64)), NEAREST)


def batch(rank: int) -> torch.Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(rank))


def gradients(each: nn.Module, rank: int) -> list[torch.Tensor]:
    each.zero_grad()
    each(batch(rank)).square().sum().backward()
    return [parameter.grad for parameter in each.parameters()]


def averaged(one: nn.Module) -> list[torch.Tensor]:
    """What every rank should end up with, computed by one process."""
    ranks = [gradients(copy.deepcopy(one), rank) for rank in range(WORLD)]
    return [sum(parts) / WORLD for parts in zip(*ranks, strict=True)]


def check_ddp(rank: int) -> None:
    """DDP's gradients are the mean of the ranks', to the bit; with activation checkpoints too."""
    wrapped = nn.parallel.DistributedDataParallel(model())
    assert all(map(torch.equal, gradients(wrapped, rank), averaged(model())))
    checkpointed = model()
    forward = checkpointed.forward
    checkpointed.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    wrapped = nn.parallel.DistributedDataParallel(checkpointed)
    assert all(map(torch.equal, gradients(wrapped, rank), averaged(model())))


def check_fsdp(rank: int, recipe: Recipe, **options: object) -> None:
    """FSDP2's shards of the gradients are those of the mean, and its state dict is the model's own."""
    from torch.distributed.fsdp import fully_shard

    sharded, whole = (mx.convert(model(), recipe) for _ in range(2))
    for layer in sharded:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, **options)
    fully_shard(sharded, **options)
    assert list(sharded.state_dict()) == list(whole.state_dict())
    found = [gradient.full_tensor() for gradient in gradients(sharded, rank)]
    assert all(map(torch.equal, found, averaged(whole)))


def check_fsdp_in_bf16(rank: int) -> None:
    """Mixed precision: parameters and gradients travel in bf16, and a whole step of training works."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    sharded = mx.convert(model(), "mxfp4")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded, mp_policy=policy)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2)
    target = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    losses = []
    for _ in range(6):
        loss = (sharded(batch(rank)).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in sharded.parameters())


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        check_ddp(rank)
        check_fsdp(rank, NEAREST)
        check_fsdp(rank, replace(NEAREST, keep_weights=True), reshard_after_forward=True)
        check_fsdp_in_bf16(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """DDP and FSDP2; a failure in a process is one here, with its traceback."""
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), WORLD)
