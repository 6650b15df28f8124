"""Video models in the styles of vendors' own repositories: plain modules, one pattern each.

Names of modules say nothing on purpose. Every model takes (latent [B, 4, T, Y, X], t [B], text).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, DIM, TEXT = 64, 2, 32, 7
GRID = (3, 4, 5)
sdpa = F.scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def split(x: Tensor) -> Tensor:
    """b n (h d) -> b h n d"""
    return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def angles(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    steps = torch.arange(tokens, dtype=dtype)
    return torch.outer(steps, 100.0 ** -torch.linspace(0, 1, DIM // 2, dtype=dtype))


class Layer(nn.Module):
    """Separate projections; `turn` is the position embedding, `call` the attention."""

    def __init__(self, turn: Callable[[Tensor], Tensor] | None = None, call: Any = sdpa) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.turn, self.call = turn or (lambda x: x), call

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = split(self.a(y)), split(self.b(y)), split(self.c(y))
        return x + self.d(join(self.call(self.turn(q), self.turn(k), v)))


class Fused(nn.Module):
    """One projection for queries, keys and values, taken apart by `apart`."""

    def __init__(self, apart: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.p, self.d = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.apart(self.p(x))
        return x + self.d(join(sdpa(q, k, v)))


class Model(nn.Module):
    """Patches, layers, un-patchify. `run(layer, x, text, grid)` says how a layer is called."""

    def __init__(self, layer: nn.Module, run: Any = None, patch: str = "conv3d") -> None:
        super().__init__()
        self.kind = patch
        self.stem: nn.Module
        if patch == "conv3d":
            self.stem = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        elif patch == "conv2d":
            self.stem = nn.Conv2d(4, WIDTH, 2, 2)
        else:
            self.stem = nn.Linear(16, WIDTH)
        self.layers, self.head = nn.ModuleList([layer]), nn.Linear(WIDTH, 16)
        self.time, self.words = nn.Linear(1, WIDTH), nn.Linear(16, WIDTH)
        self.run = run or (lambda layer, x, text, grid: layer(x))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        b, c, t, h, w = latent.shape
        y, x = h // 2, w // 2
        if self.kind == "conv3d":
            z = self.stem(latent).flatten(2).transpose(1, 2)
        elif self.kind == "conv2d":
            z = self.stem(latent.transpose(1, 2).reshape(b * t, c, h, w))
            z = z.view(b, t, WIDTH, y, x).permute(0, 1, 3, 4, 2).reshape(b, t * y * x, WIDTH)
        else:
            z = latent.view(b, c, t, y, 2, x, 2).permute(0, 2, 3, 5, 1, 4, 6)
            z = self.stem(z.reshape(b, t * y * x, 16))
        z = z + self.time(timestep.view(-1, 1, 1) / 1000)
        for layer in self.layers:
            z = self.run(layer, z, self.words(text), (b, t, y, x))
        out = self.head(z).view(b, t, y, x, 2, 2, 4).permute(0, 6, 1, 2, 4, 3, 5)
        return out.reshape(b, 4, t, h, w)


# ---- position embeddings


def complex_rope(x: Tensor) -> Tensor:
    table = torch.polar(torch.ones(x.shape[2], DIM // 2), angles(x.shape[2]))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


def double_rope(x: Tensor) -> Tensor:
    angle = angles(x.shape[2], torch.float64)
    one, two = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    turned = [one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()]
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


_STEPS = np.outer(np.arange(60), 100.0 ** -np.linspace(0, 1, DIM // 2))
_TABLE = torch.from_numpy(np.stack([np.cos(_STEPS), np.sin(_STEPS)])).float()


def numpy_rope(x: Tensor) -> Tensor:
    cos, sin = _TABLE
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, one * sin + two * cos], dim=-1)


# ---- one projection for all three


def by_chunk(p: Tensor) -> Any:
    return map(split, p.chunk(3, dim=-1))


def by_split(p: Tensor) -> Any:
    return map(split, p.split(WIDTH, dim=-1))


def by_unbind(p: Tensor) -> Any:
    return p.reshape(p.shape[0], p.shape[1], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)


def by_index(p: Tensor) -> Any:
    p = p.view(p.shape[0], -1, HEADS, 3, DIM)
    return tuple(p[:, :, :, i].transpose(1, 2) for i in range(3))


# ---- how a layer is called


def text_before(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    return layer(torch.cat([text, x], dim=1))[:, text.shape[1] :]


def text_after(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    return layer(torch.cat([x, text], dim=1))[:, : x.shape[1]]


def checkpointed(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def autocast(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return layer(x.float())


def factorised(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    b, t, y, w = grid
    x = layer(x.reshape(b * t, y * w, WIDTH))
    x = x.view(b, t, y * w, WIDTH).transpose(1, 2).reshape(b * y * w, t, WIDTH)
    return layer(x).view(b, y * w, t, WIDTH).transpose(1, 2).reshape(b, t * y * w, WIDTH)


def windows(layer: Any, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    b, t, y, w = grid
    x = x.view(b, t, 2, y // 2, w, WIDTH).transpose(1, 2).reshape(b * 2, -1, WIDTH)
    return layer(x).view(b, 2, t, y // 2, w, WIDTH).transpose(1, 2).reshape(b, -1, WIDTH)


# ---- attention


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / DIM**0.5
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


def rearranged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """b h n d -> (b h) n d, as einops has it."""
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    weights = torch.einsum("bid,bjd->bij", q * d**-0.5, k).softmax(dim=-1)
    return torch.einsum("bij,bjd->bid", weights, v).reshape(b, h, n, d)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, x, x, need_weights=False)[0]


REPLACED: dict[str, Callable[[], Model]] = {
    "complex rope": lambda: Model(Layer(complex_rope)),
    "float64 rope": lambda: Model(Layer(double_rope)),
    "rope from numpy": lambda: Model(Layer(numpy_rope)),
    "fused, chunk": lambda: Model(Fused(by_chunk)),
    "fused, split": lambda: Model(Fused(by_split)),
    "fused, unbind": lambda: Model(Fused(by_unbind)),
    "fused, index": lambda: Model(Fused(by_index)),
    "softmax written out": lambda: Model(Layer(call=written)),
    "rearranged": lambda: Model(Layer(complex_rope, rearranged)),
    "multihead": lambda: Model(Multihead()),
    "text before": lambda: Model(Layer(), text_before),
    "text after": lambda: Model(Layer(), text_after),
    "text after, written out": lambda: Model(Layer(call=written), text_after),
    "autocast": lambda: Model(Layer(), autocast),
    "checkpoint": lambda: Model(Layer(call=written), checkpointed),
    "checkpoint, multihead": lambda: Model(Multihead(), checkpointed),
    "conv2d per frame": lambda: Model(Layer(), patch="conv2d"),
    "linear patches": lambda: Model(Layer(), patch="linear"),
}

LEFT: dict[str, tuple[Callable[[], Model], str]] = {
    "factorised": (lambda: Model(Layer(), factorised), "inside frames or along time"),
    "windows": (lambda: Model(Layer(), windows), "inside frames or along time"),
    "causal": (lambda: Model(Layer(call=causal)), "causal attention"),
}


def arguments(batch: int = 1, grid: tuple[int, int, int] = GRID) -> tuple[Tensor, Tensor, Tensor]:
    t, y, x = grid
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, t, 2 * y, 2 * x, generator=generator)
    return latent, torch.full((batch,), 500.0), torch.randn(batch, TEXT, 16, generator=generator)
