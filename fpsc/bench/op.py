"""The attention op alone: one layer's problem, and every attention that can compute it.

FlexAttention is timed at its best, on inputs that are in tile order already; fpsattn's times
include the way there and back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fpsc.bench.admission import Absent, first_line
from fpsc.bench.policies import constant
from fpsc.bench.record import Role
from fpsc.grid import BLOCK, Layout, layout
from fpsc.kernels import ops, reference
from fpsc.passes.rewrite import PLAN
from fpsc.policy import Policy
from fpsc.policy.resolve import kinds_of, plan, resolve

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """One layer of self-attention: a grid of video tokens, with text before or after it."""

    grid: Grid
    heads: int
    head_dim: int
    batch: int = 1
    prefix: int = 0
    suffix: int = 0

    @property
    def tokens(self) -> int:
        t, y, x = self.grid
        return self.prefix + t * y * x + self.suffix

    @property
    def pairs(self) -> int:
        """Of query and key, over batch and heads, where every token sees every token."""
        return self.batch * self.heads * self.tokens**2


class SparseOp:
    """`fpsc::attention` under a policy of one mode on a device.

    fp8: whether FP8 cells run as such; else they are computed in the input's dtype.
    """

    def __init__(self, shape: Shape, policy: Policy, device: torch.device, *, fp8: bool) -> None:
        self.shape = shape
        tile = policy.tile_for(shape.grid)
        self.layout: Layout = layout(shape.grid, tile, shape.prefix, shape.suffix)
        table = resolve(policy, layers=1, heads=shape.heads, fp8=fp8)
        lists = plan(policy, self.layout)
        found = {"cells": table.cells, "modes": table.modes}
        found |= {name: getattr(lists, name) for name in PLAN}
        self.here = found | {"rows": torch.zeros(1, dtype=torch.int32)}
        self.tables = {name: tensor.to(device) for name, tensor in self.here.items()}
        self.kinds = kinds_of(policy, fp8)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, kernel: str = "auto") -> Tensor:
        """out, of all heads or of the first ones that q, k and v hold."""
        tables: dict[str, Any] = dict(self.tables)
        tables["cells"] = tables["cells"][:, :, : q.shape[1]].contiguous()
        return ops.attention(q, k, v, **tables, kinds=self.kinds, kernel=kernel)[0]

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor]:
        """(ptr, idx) of its one pattern, on the CPU: query tile u sees idx[ptr[u]:ptr[u + 1]]."""
        ptr = self.here["list_ptr"][int(self.here["modes"][0, 0])]
        return ptr - ptr[0], self.here["list_idx"][int(ptr[0]) : int(ptr[-1])]

    @property
    def visited(self) -> float:
        """Fraction of the pairs of real query and key that it computes."""
        ptr, idx = (x.long() for x in self.lists)
        valid = self.layout.valid.double()
        rows = valid.repeat_interleave(ptr.diff())
        return float((rows * valid[idx]).sum()) / self.shape.tokens**2


@dataclass(frozen=True)
class Contender:
    """One attention on q, k, v [B, H, N, D].

    make: builds what is timed, given q, k and v. result: its output in raster order.
    op: whose lists it walks; None where it is dense.
    allowed: largest error against the reference: 0 stands for what its dtype's rounding costs.
    """

    name: str
    role: Role
    make: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]
    result: Callable[[Tensor], Tensor] = lambda out: out
    op: SparseOp | None = None
    keep: float | None = None
    allowed: float = 0.0


def random_qkv(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """q, k, v [B, H, N, D] as models make them: [B, N, H, D] in memory."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    drawn = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(3))
    return [x.transpose(1, 2) for x in drawn]


def expected(op: SparseOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last head of the last batch element by the specification, [N, D] float32."""
    one = slice(-1, None)
    q, k, v = (x[one, one].float() for x in (q, k, v))
    return op(q, k, v, kernel="reference")[0, 0]


# ---- dense


def eager(shape: Shape) -> Contender:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return lambda: F.scaled_dot_product_attention(q, k, v)

    return Contender("SDPA (default)", Role.eager, make)


BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def sdpa(name: str) -> Contender:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(BACKENDS[name]):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    return Contender(name, Role.baseline, make)


def flash_attention(name: str, module: str) -> Contender:
    """flash_attn's own packages: tokens before heads."""
    function = import_module(module).flash_attn_func

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        x = [each.transpose(1, 2) for each in (q, k, v)]

        def run() -> Tensor:
            found = function(*x)
            out: Tensor = found[0] if isinstance(found, tuple) else found
            return out.transpose(1, 2)

        return run

    return Contender(name, Role.baseline, make)


def sage() -> Contender:
    function = import_module("sageattention").sageattn

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return partial(function, q, k, v, tensor_layout="HND", is_causal=False)

    return Contender("SageAttention", Role.approximate, make, allowed=0.1)


# ---- what skips the same tiles


def flex(op: SparseOp, keep: float) -> Contender:
    """FlexAttention, a block for each tile: of its size where no tile is ragged, else padded."""
    size, valid = op.layout.gather.shape[1], op.layout.valid
    even = valid.min() == valid.max()
    padded = not even or (op.tables["gather"].is_cuda and int(valid[0]) % 16 != 0)
    counts, blocks = (x.to(op.tables["gather"].device) for x in _block_lists(op))
    slots = op.layout.gather.flatten().long()
    if not padded:
        size, slots = int(valid[0]), slots[slots >= 0]
    length = valid.to(counts.device)

    def real_rows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k % size < length[k // size]

    if padded:
        mask = BlockMask.from_kv_blocks(counts, blocks, BLOCK_SIZE=size, mask_mod=real_rows)
    else:  # full blocks: no mask
        none = torch.zeros_like(counts), torch.zeros_like(blocks)
        mask = BlockMask.from_kv_blocks(*none, counts, blocks, BLOCK_SIZE=size)
    compiled = torch.compile(flex_attention, dynamic=False)
    slots = slots.to(counts.device)
    kernel: Any = None
    if not padded and op.tables["gather"].is_cuda:  # its blocks must divide the tile
        part = next(n for n in (128, 64, 32, 16) if size % n == 0)
        kernel = {"BLOCK_M": part, "BLOCK_N": part}

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        q, k, v = (x[:, :, slots.clamp(min=0)].contiguous() for x in (q, k, v))
        return lambda: compiled(q, k, v, block_mask=mask, kernel_options=kernel)

    def result(out: Tensor) -> Tensor:
        raster = out.new_empty(*out.shape[:2], op.shape.tokens, out.shape[3])
        raster[:, :, slots[slots >= 0]] = out[:, :, slots >= 0]
        return raster

    how = "padded tiles" if padded else f"tile {'x'.join(map(str, op.layout.tile))}"
    return Contender(f"FlexAttention keep {keep:g}, {how}", Role.baseline, make, result, op, keep)


def _block_lists(op: SparseOp) -> tuple[Tensor, Tensor]:
    """As FlexAttention takes them: counts [1, 1, n] and tiles [1, 1, n, n]."""
    n, (ptr, idx) = op.layout.n_tiles, op.lists
    counts, blocks = ptr.diff(), torch.zeros(n, n, dtype=torch.int32)
    for u in range(n):
        blocks[u, : counts[u]] = idx[ptr[u] : ptr[u + 1]]
    return counts[None, None].int(), blocks[None, None]


def dividing_tile(grid: Grid, *, multiple: int = 1) -> Grid | None:
    """A tile that divides the grid without a rest, as FlexAttention likes it best.

    Its tokens are a multiple of `multiple`; of these the largest of up to 128, then the most
    compact. None where the largest has fewer than 64.
    """
    sizes = [[d for d in range(1, n + 1) if n % d == 0] for n in grid]
    shapes = [
        (t, y, x)
        for t in sizes[0]
        for y in sizes[1]
        for x in sizes[2]
        if t * y * x % multiple == 0 and 64 <= t * y * x <= BLOCK
    ]
    return max(shapes, key=lambda s: (s[0] * s[1] * s[2], -sum(s)), default=None)


def gather_sdpa(op: SparseOp, keep: float) -> Contender:
    """One call of SDPA a query tile, on a gathered copy of the keys that it visits."""
    tiles = reference.tile_rows(op.layout.gather, op.layout.valid)
    ptr, idx = op.lists
    keys = [
        torch.cat([tiles[w] for w in idx[a:b].tolist()])
        for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)
    ]

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = torch.empty_like(q)
            for rows, visited in zip(tiles, keys, strict=True):
                out[:, :, rows] = F.scaled_dot_product_attention(
                    q[:, :, rows], k[:, :, visited], v[:, :, visited]
                )
            return out

        return run

    return Contender(f"gather + SDPA keep {keep:g}", Role.baseline, make, op=op, keep=keep)


# ---- ours


def fpsattn(op: SparseOp, keep: float, suffix: str = "") -> Contender:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return partial(op, q, k, v)

    return Contender(f"fpsattn keep {keep:g}{suffix}", Role.fpsattn, make, op=op, keep=keep)


# ---- all of them


Maker = tuple[str, Role, Callable[[], Contender]]


def contenders(
    shape: Shape, keeps: tuple[float, ...], device: torch.device, *, fp8: bool
) -> Iterator[Contender | Absent]:
    """Everything that can be tried on a device, built one by one.

    fp8: whether the cells of fpsattn round to FP8; emulated on the CPU.
    """
    cell = "fp8" if fp8 else "bf16"
    makers: list[Maker] = [("SDPA (default)", Role.eager, lambda: eager(shape))]
    makers += [(name, Role.baseline, partial(_backend, name, shape, device)) for name in BACKENDS]
    makers += [
        ("FA3", Role.baseline, partial(flash_attention, "FA3", "flash_attn_interface")),
        ("FA4", Role.baseline, partial(flash_attention, "FA4", "flash_attn.cute")),
        ("SageAttention", Role.approximate, sage),
    ]
    multiple = 16 if device.type == "cuda" else 1
    dividing = (
        None if shape.prefix or shape.suffix else dividing_tile(shape.grid, multiple=multiple)
    )
    for keep in keeps:
        op = SparseOp(shape, constant(keep, cell), device, fp8=fp8)
        makers.append((f"fpsattn keep {keep:g}", Role.fpsattn, partial(fpsattn, op, keep)))
        dense = SparseOp(shape, constant(keep, "bf16"), device, fp8=False)
        makers.append((f"FlexAttention keep {keep:g}", Role.baseline, partial(flex, dense, keep)))
        if dividing is not None and dividing != dense.layout.tile:
            even = SparseOp(shape, constant(keep, "bf16", dividing), device, fp8=False)
            makers.append(
                (f"FlexAttention keep {keep:g}, even", Role.baseline, partial(flex, even, keep))
            )
        if device.type == "cpu" and keep < 1:
            makers.append(
                (f"gather + SDPA keep {keep:g}", Role.baseline, partial(gather_sdpa, dense, keep))
            )
    for name, role, make in makers:
        try:
            yield make()
        except (ImportError, AttributeError, OSError, RuntimeError, ValueError) as error:
            yield Absent(name, role, first_line(error))


def _backend(name: str, shape: Shape, device: torch.device) -> Contender:
    """Raises where a device does not have it, with torch's own reasons."""
    if device.type == "cpu" and name in ("SDPA cuDNN", "SDPA efficient"):
        raise ValueError("needs a GPU")
    if BACKENDS[name] is SDPBackend.MATH:
        needed = shape.pairs * 4 * 2
        from fpsc.bench.environment import memory

        if needed > memory(device)[0] / 2:
            raise ValueError(f"its scores alone take {needed / 2**30:.1f} GiB")
    contender = sdpa(name)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = [torch.zeros(1, 1, 128, shape.head_dim, dtype=dtype, device=device) for _ in range(3)]
    with warnings.catch_warnings(record=True) as caught:  # torch says there what it lacks
        warnings.simplefilter("always")
        try:
            contender.make(*x)()
        except RuntimeError as error:
            said = [first_line(warning.message) for warning in caught]
            why = [text for text in said if "not used because" not in text]
            raise ValueError(why[-1] if why else first_line(error)) from error
    return contender
