"""The attentions that are timed side by side, each built for the same q, k, v [1, H, N, D].

What is timed is `run`, differentiable where `backward` says so. FlexAttention is timed at its best,
on inputs that are in tile order already; fpsc's times include the way there and back. The dense
ones in bfloat16 are the baselines; what quantises or skips is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.gpu.problem import Op, Shape, only
from fpsc.grid import BLOCK
from fpsc.kernels.triton.configs import Config

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Contender:
    """One attention.

    run: what is timed, on what `prepare` made of q, k and v; result: its output in raster order.
    op: whose lists it walks, None where it is dense; fp8_backward: its argument of this name.
    baseline: whether the marks compare with it.
    dtype: of its products, "bf16", "fp8" or "int8".
    """

    name: str
    run: Run
    op: Op | None = None
    baseline: bool = False
    dtype: str = "bf16"
    backward: bool = True
    fp8_backward: bool = False
    prepare: Callable[[Tensor], Tensor] = _as_it_is
    result: Callable[[Tensor], Tensor] = _as_it_is


# ---- ours


def fpsc_(
    op: Op,
    kernel: str,
    *,
    named: bool = False,
    fp8_backward: bool = False,
    config: Config | None = None,
) -> Contender:
    """named: the name says which implementation it is; config: the one it runs with."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with only(config):
            return op(q, k, v, kernel=kernel, fp8_backward=fp8_backward)[0]

    suffix = "" if op.dtype == "fp8" else f", {op.dtype} cells"
    suffix += f", {kernel}" if named else ""
    suffix += f" {config.name}" if config else ""
    suffix += ", backward in fp8" if fp8_backward else ""
    name = f"fpsc keep {op.keep:g}{suffix}"
    return Contender(name, run, op, dtype=op.dtype, fp8_backward=fp8_backward)


# ---- dense


SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(name: str) -> Contender:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v)

    return Contender(name, run, baseline=True)


def _first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def flash_attention(name: str, module: str) -> Contender:
    """flash_attn's own packages: tokens before heads."""
    function = import_module(module).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _first(function(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(1, 2)

    return Contender(name, run, baseline=True)


def sage() -> Contender:
    function = import_module("sageattention").sageattn
    run = partial(function, tensor_layout="HND", is_causal=False)
    return Contender("SageAttention", lambda q, k, v: run(q, k, v), dtype="int8", backward=False)


PACKAGES: dict[str, Callable[[], Contender]] = {
    "FA3": lambda: flash_attention("FA3", "flash_attn_interface"),
    "FA4": lambda: flash_attention("FA4", "flash_attn.cute"),
    "SageAttention": sage,
}


# ---- FlexAttention on our lists


def flex(ops: list[Op]) -> list[Contender]:
    """A block of 128 for each tile, padded and masked where the tile holds fewer tokens.

    The ops of one shape share a compiled kernel and the inputs in tile order.
    """
    compiled = torch.compile(flex_attention, dynamic=False)
    tiles, device = ops[0].layout, ops[0].tables["gather"].device
    size, valid = tiles.gather.shape[1], tiles.valid.to(device)
    into = tiles.gather.flatten().clamp(min=0).to(device).long()
    out_of = tiles.slot.to(device).long()

    def real_rows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k % size < valid[k // size]

    def prepare(x: Tensor) -> Tensor:
        return x[:, :, into].contiguous()

    def one(op: Op) -> Contender:
        counts, blocks = dense_lists(op)
        if int(valid.min()) == size:
            none = nothing(counts, blocks)
            mask = BlockMask.from_kv_blocks(*none, counts, blocks, BLOCK_SIZE=size)
        else:
            mask = BlockMask.from_kv_blocks(counts, blocks, BLOCK_SIZE=size, mask_mod=real_rows)
        return Contender(
            f"flex keep {op.keep:g}",
            lambda q, k, v: compiled(q, k, v, block_mask=mask),
            op=op,
            prepare=prepare,
            result=lambda out: out[:, :, out_of],
        )

    return [one(op) for op in ops]


def dense_lists(op: Op) -> tuple[Tensor, Tensor]:
    """The lists of an op as FlexAttention takes them: counts [1, 1, n] and tiles [1, 1, n, n]."""
    n = op.layout.n_tiles
    ptr = op.tables["list_ptr"][int(op.tables["modes"][0, 0])].cpu()
    idx = op.tables["list_idx"].cpu()
    counts, blocks = ptr.diff(), torch.zeros(n, n, dtype=torch.int32)
    for u in range(n):
        blocks[u, : counts[u]] = idx[ptr[u] : ptr[u + 1]]
    device = op.tables["list_idx"].device
    return counts[None, None].to(device), blocks[None, None].to(device)


def nothing(counts: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """No partial blocks."""
    return torch.zeros_like(counts), torch.zeros_like(blocks)


def dividing_tile(shape: Shape) -> tuple[int, int, int] | None:
    """A tile that divides the grid without a rest, in blocks that FlexAttention's kernels take.

    Its tokens must be a multiple of 16; of these the largest, then the most compact.
    """
    sizes = [[d for d in range(1, n + 1) if n % d == 0] for n in shape.grid]
    shapes = [
        (t, y, x)
        for t in sizes[0]
        for y in sizes[1]
        for x in sizes[2]
        if t * y * x % 16 == 0 and 64 <= t * y * x <= BLOCK
    ]
    if shape.text or not shapes:
        return None
    return max(shapes, key=lambda tile: (tile[0] * tile[1] * tile[2], -sum(tile)))


def flex_dividing(shape: Shape, keep: float, device: torch.device) -> Contender | None:
    """FlexAttention on a tile that divides the grid: no padding and no mask, but small products,
    because its kernels' blocks must divide the tile."""
    tile = dividing_tile(shape)
    if tile is None:
        return None
    op = Op(shape, keep, "bf16", device, tile=tile)
    tokens = tile[0] * tile[1] * tile[2]
    part = next(n for n in (128, 64, 32, 16) if tokens % n == 0)
    counts, blocks = dense_lists(op)
    mask = BlockMask.from_kv_blocks(*nothing(counts, blocks), counts, blocks, tokens)
    into = op.layout.gather[op.layout.gather >= 0].to(device).long()
    out_of = into.argsort()
    compiled = torch.compile(flex_attention, dynamic=False)
    options: Any = {"BLOCK_M": part, "BLOCK_N": part}

    return Contender(
        f"flex keep {keep:g}, tile {'x'.join(map(str, tile))}",
        lambda q, k, v: compiled(q, k, v, block_mask=mask, kernel_options=options),
        op=op,
        backward=False,
        prepare=lambda x: x[:, :, into].contiguous(),
        result=lambda out: out[:, :, out_of],
    )


# ---- all of them


def built(
    makers: dict[str, Callable[[], Contender]],
) -> tuple[list[Contender], dict[str, str]]:
    """Those that are here, and why the others are not."""
    found, absent = [], {}
    for name, make in makers.items():
        try:
            found.append(make())
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found, absent
