"""What a mode does to a prediction, measured in one attention at a time.

Let o be the output of one head of one site [N, D] in the dense model, e the error that a mode makes
of it, f the model's prediction and J the derivative of f by o. To first order f changes by J e, and
with random r of independent unit entries

    |J e|^2 = E (r . J e)^2 = E (g . e)^2        g = J^T r, the gradient of r . f by o        [1]

One backward pass gives g at every site at once. It holds all that follows o: the site's own
projection, by head, the block, and the model's sensitivity behind it. The estimate from one r is
noisy, so e is cut into runs of `RUN` tokens of a tile, whose changes are taken as uncorrelated:

    damage = sum over runs of (g_run . e_run)^2                                               [2]

which has hundreds of samples in place of one. Damages of different heads and layers are added up,
as if these were uncorrelated too; `fpsc.tune.validate` tests what that makes of a policy.

Streaming: a site keeps q, k and v for backward, as every attention does. When the gradient of its
output arrives there, its modes are computed one after the other, and nothing of it is left but
numbers. With gradient checkpointing only one block's q, k and v exist at a time.

Sources
[1] Hutchinson's estimator (1990); J^T J is the Gauss-Newton matrix of the squared error.
[2] Our choice. Exact where J acts token by token, which the residual stream and the feed-forwards
    do; attention in later layers does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpsc.policy.resolve import transposed

RUN = 16
"""Tokens whose error counts as one; it divides the block of a tile."""

(
    ROWS,
    CELLS,
    MODES,
    PTR,
    IDX,
    BACK_PTR,
    BACK_IDX,
    ORDER,
    GROUPS,
    GATHER,
    VALID,
    MASK,
    SCALE,
    SITE,
) = range(14)
"""Places of the arguments of `fpsc::attention` behind q, k and v."""

Tables = tuple[Any, ...]
"""The arguments of `fpsc::attention` behind q, k and v."""


def attend(q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
    """[B, H, N, D]: the op's output."""
    out: Tensor = torch.ops.fpsc.attention(q, k, v, *tables)[0]
    return out


OnSite = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor, Tables], None]
"""Called with (layer, q, k, v, out, gradient of out, tables)."""


class Observed(torch.autograd.Function):
    """The op, which shows its inputs, output and gradient when backward comes by."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layer: int, tables: Tables, on_site: OnSite
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.others = layer, tables, on_site
        return attend(q, k, v, tables)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layer, tables, on_site = ctx.others
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            out = attend(q, k, v, tables)
            gradients = torch.autograd.grad(out, (q, k, v), gradient)
        with torch.no_grad():
            on_site(layer, q.detach(), k.detach(), v.detach(), out.detach(), gradient, tables)
        return *gradients, None, None, None


@dataclass
class Measurement:
    """Adds up what every mode does in every head of every layer.

    Args:
        layers, heads: of the model.
        modes: how many candidates, which are the first rows of the op's table of modes.
        video: the tiles of the video among all.
        queries: the part of the query tiles that is measured.
    """

    layers: int
    heads: int
    modes: int
    video: range
    queries: float = 1.0
    leaves: list[Tensor] = field(default_factory=list)
    damage: np.ndarray = field(init=False)
    error: np.ndarray = field(init=False)
    size: np.ndarray = field(init=False)
    maps: np.ndarray = field(init=False)
    seen: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        cells = (self.layers, self.heads, self.modes)
        self.damage, self.error = np.zeros(cells), np.zeros(cells)
        self.size = np.zeros(cells[:2])
        self.maps = np.zeros((*cells[:2], len(self.video)))
        self.seen = np.zeros(self.layers, int)

    @property
    def attention(self) -> np.ndarray:
        """[layers, heads, modes]: squared error of the output over its square."""
        size = self.size[..., None]
        return np.divide(self.error, size, out=np.zeros_like(self.error), where=size > 0)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        gradient: Tensor,
        tables: Tables,
    ) -> None:
        """Measure one site."""
        gather, valid = tables[GATHER].long(), tables[VALID]
        chosen = spread(len(valid), self.queries, valid.device)
        real = torch.arange(gather.shape[1], device=valid.device) < valid[:, None]
        counted = real & chosen[:, None]
        scale_up = float(real.sum() / counted.sum())
        rows = gather.clamp_min(0)
        g, out = gradient.float(), out.float()

        def in_tiles(x_BHN: Tensor) -> Tensor:
            return x_BHN[..., rows] * counted

        self.size[layer] += scale_up * _per_head(in_tiles(out.square().sum(-1)))
        for mode, chosen_tables in enumerate(each_mode(tables, self.modes, q.shape[1], chosen)):
            e = attend(q, k, v, chosen_tables).float().sub_(out)
            self.error[layer, :, mode] += scale_up * _per_head(in_tiles(e.square().sum(-1)))
            runs = in_tiles(e.mul_(g).sum(-1)).unflatten(-1, (-1, RUN)).sum(-1)
            self.damage[layer, :, mode] += scale_up * _per_head(runs.square())
        self.maps[layer] += attention_map(q, k, tables, self.video).cpu().numpy()
        self.seen[layer] += 1


def _per_head(x: Tensor) -> np.ndarray:
    """float64 [H]: sums of [B, H, ...]."""
    total: np.ndarray = x.sum(dim=(0, *range(2, x.ndim)), dtype=torch.float64).cpu().numpy()
    return total


def spread(tiles: int, part: float, device: torch.device) -> Tensor:
    """bool [tiles]: a part of them, evenly spaced, at least one."""
    n = max(1, round(part * tiles))
    chosen = torch.zeros(tiles, dtype=torch.bool, device=device)
    chosen[(torch.arange(n, device=device) * tiles) // n] = True
    return chosen


def each_mode(tables: Tables, modes: int, heads: int, chosen: Tensor) -> Sequence[Tables]:
    """For every mode the op's arguments with which all heads run in it, and all query tiles that
    are not chosen see nothing."""
    zero = torch.zeros(1, dtype=torch.int32, device=chosen.device)
    found = []
    every = bool(chosen.all())
    for mode in range(modes):
        given = list(tables)
        given[ROWS], given[SITE] = zero, 0
        given[CELLS] = zero.expand(1, 1, heads) + mode
        if not every:
            pattern, dtype, grouping = tables[MODES][mode].tolist()
            given[MODES] = torch.tensor(
                [[0, dtype, grouping]], dtype=torch.int32, device=chosen.device
            )
            given[CELLS] = zero.expand(1, 1, heads).clone()
            given[PTR : BACK_IDX + 1] = _only(tables[PTR][pattern], tables[IDX], chosen)
            given[ORDER] = tables[ORDER][pattern : pattern + 1]
        found.append(tuple(given))
    return found


def _only(ptr: Tensor, idx: Tensor, chosen: Tensor) -> list[Tensor]:
    """Lists of one pattern and their transpose, with those of the other query tiles left empty."""
    bounds, entries = ptr.cpu().numpy(), idx.cpu().numpy()
    kept = chosen.cpu().numpy()
    lengths = np.diff(bounds)
    entries = entries[bounds[0] : bounds[-1]][np.repeat(kept, lengths)]
    new = np.concatenate([[0], np.cumsum(lengths * kept)]).astype(np.int32)
    back_ptr, back_idx = transposed(new, entries)
    lists = (new[None], entries, back_ptr[None], back_idx)
    return [torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(ptr.device) for x in lists]


def attention_map(q: Tensor, k: Tensor, tables: Tables, video: range) -> Tensor:
    """float32 [H, video tiles]: where the attention of the tile in the middle of the video goes.

    The mean over its queries and the batch; text takes the rest of it.
    """
    gather = tables[GATHER].long()
    middle = video.start + len(video) // 2
    rows = gather[middle, : int(tables[VALID][middle])]
    real = torch.arange(gather.shape[1], device=q.device) < tables[VALID][:, None]
    heads_per_key = q.shape[1] // k.shape[1]
    found = []
    for h in range(q.shape[1]):
        scores = q[:, h, rows].float() @ k[:, h // heads_per_key].float().transpose(1, 2)
        scores *= tables[SCALE]
        if tables[MASK] is not None:
            scores.masked_fill_(~tables[MASK][:, None], -torch.inf)
        weight = scores.softmax(-1).mean(dim=(0, 1))
        found.append((weight[gather.clamp_min(0)] * real).sum(-1)[video.start : video.stop])
    return torch.stack(found)
