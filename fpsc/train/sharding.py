"""Tensors that FSDP2 has spread over processes, and whole ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Spread the parameters of a model over a mesh, in place; each block is gathered by itself.

    torch's own FSDP2: the plugin of accelerate shards on GPUs only, where no test without one
    could show that two processes train as one.
    """
    # Nobody writes into what a model returns here, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it; writing there changes it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on the CPU. Every process must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True)


def spread_like(full: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device and with the sharding of another."""
    full = full.to(other.device)
    if not isinstance(other, DTensor):
        return full
    return distribute_tensor(full, other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Give a parameter the values of a whole tensor."""
    local(parameter).copy_(local(spread_like(full.to(parameter.dtype), parameter)))
