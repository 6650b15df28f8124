"""Inputs for the bare op on a device, and the call itself, by the names that the op has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpsc.grid import Layout, layout
from fpsc.kernels import ops
from fpsc.kernels.kinds import ALL_CELLS
from fpsc.kernels.saved import padded_head_dim
from fpsc.kernels.triton import tune
from fpsc.kernels.triton.configs import Config, candidates
from fpsc.passes.rewrite import PLAN
from fpsc.policy import Policy
from fpsc.policy.resolve import plan, resolve
from tests.kernels.cases import FP8, Tables, resolved
from tests.thresholds import relative_rms

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """One layer: a grid of video tokens, with text behind it."""

    grid: Grid
    heads: int
    dim: int = 128
    text: int = 0

    @property
    def tokens(self) -> int:
        t, y, x = self.grid
        return t * y * x + self.text

    def __str__(self) -> str:
        text = f" + {self.text} text" if self.text else ""
        return f"{'x'.join(map(str, self.grid))}{text}, {self.heads} heads of {self.dim}"


class Op:
    """The op under a policy of one mode, near with this keep, on a device.

    dtype: "fp8", or "bf16": computed in the input's dtype.
    """

    def __init__(
        self,
        shape: Shape,
        keep: float,
        dtype: str,
        device: torch.device,
        tile: Grid | None = None,
    ) -> None:
        self.shape, self.keep, self.dtype = shape, keep, dtype
        policy = one_mode({"pattern": "near", "keep": keep, "dtype": dtype}, tile)
        self.layout: Layout = layout(shape.grid, policy.tile_for(shape.grid), 0, shape.text)
        self.tables = tables_of(policy, self.layout, shape.heads, device)
        self.kinds = 2 if dtype == "fp8" else 1

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        kernel: str,
        heads: slice = slice(None),
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """out and lse. heads: of the model, those that q, k and v hold. others: of the op."""
        tables: dict[str, Any] = dict(self.tables)
        tables["cells"] = tables["cells"][:, :, heads].contiguous()
        return ops.attention(q, k, v, **tables, kinds=self.kinds, kernel=kernel, **others)

    @property
    def visited(self) -> float:
        """Pairs of a real query row and a real key row in the tiles visited, over all heads."""
        ptr, idx = (self.tables[name].cpu().long() for name in ("list_ptr", "list_idx"))
        valid = self.layout.valid.double()
        pattern = int(self.tables["modes"][0, 0])
        ptr = ptr[pattern]
        rows = valid.repeat_interleave(ptr.diff())
        return self.shape.heads * float((rows * valid[idx[ptr[0] : ptr[-1]]]).sum())

    def flops(self, products: int) -> float:
        """Operations of that many matrix products over the visited pairs: forward has two."""
        return 2.0 * products * self.shape.dim * self.visited


def reordered(device: torch.device, dim: int) -> tuple[Config, ...]:
    """Candidates of Triton's kernel that copy K in another order, one tile at a time and two."""
    if device.type != "cuda":
        return ()
    found = candidates("fp8", tune.capability(device), padded_head_dim(dim))
    return tuple(config for config in found if config.reorder)


@contextmanager
def only(config: Config | None) -> Iterator[None]:
    """Kernels of which it is a candidate run with this configuration."""
    before, tune.ONLY = tune.ONLY, config
    try:
        yield
    finally:
        tune.ONLY = before


def one_mode(mode: dict[str, Any], tile: Grid | None = None) -> Policy:
    return Policy.from_dict(
        {
            "fpsc": 1,
            "tile": list(tile) if tile else "auto",
            "modes": {"only": mode},
            "schedule": [{"noise": "1..0", "use": "only"}],
        }
    )


def tables_of(policy: Policy, tiles: Layout, heads: int, device: torch.device) -> dict[str, Tensor]:
    """What the op takes beside q, k and v, for a model of one layer."""
    table = resolve(policy, layers=1, heads=heads, fp8=True)
    lists = plan(policy, tiles)
    found = {name: getattr(table, name) for name in ("cells", "modes")}
    found |= {name: getattr(lists, name) for name in PLAN}
    found["rows"] = torch.zeros(1, dtype=torch.int32)
    return {name: tensor.to(device) for name, tensor in found.items()}


def random_qkv(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """q, k, v [1, H, N, D] as models make them: [B, N, H, D] in memory, keys with a mean.

    Values have none: over many keys their mean would be all of the output, whichever keys it saw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size = (1, shape.tokens, shape.heads, shape.dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    made = []
    for mean in (0.0, 1.0, 0.0):
        x = torch.empty(size, dtype=dtype, device=device)
        for h in range(shape.heads):  # a head at a time: float32 copies of all would take memory
            x[:, :, h] = normal(1, shape.tokens, shape.dim) + mean * normal(shape.dim)
        made.append(x.transpose(1, 2))
    return made


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tables,
    *,
    kernel: str,
    kinds: int = ALL_CELLS,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The op on the tables of the kernel tests."""
    return ops.attention(q, k, v, **t._asdict(), kinds=kinds, kernel=kernel, **others)


def on(t: Tables, device: torch.device) -> Tables:
    return Tables(*(x.to(device) for x in t))


def is_fp8(t: Tables) -> list[list[bool]]:
    """Of each batch element and head: whether its cell is FP8."""
    return (resolved(t)[..., 1] == FP8).tolist()


def distance(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Relative RMS where expected is finite; infinity where the two differ in what is not."""
    found, expected = found.detach().cpu().float(), expected.detach().cpu().float()
    finite = expected.isfinite()
    special = torch.equal(found[~finite].nan_to_num(nan=2.0), expected[~finite].nan_to_num(nan=2.0))
    if not special or not torch.equal(found.isfinite(), finite):
        return float("inf")
    return relative_rms(found[finite], expected[finite], least)


def rounded(value: float) -> float | str:
    """For JSON, which has no infinity."""
    return float(f"{value:.3g}") if value < float("inf") else str(value)


def same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Equal in every bit, NaN included."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )
