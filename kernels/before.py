"""What may stand in front of a site and be a part of its op: a norm of q and of k, then a rotation.

    x       q or k as its projection gave it, [B, H, N, D]; everything below is float32
    r       1 / sqrt(mean(x^2) + epsilon)       RMS: over a head's own D channels
                                                ACROSS: over all H * D channels of a token
            1 / sqrt(var(x) + epsilon)          LAYER: over D, with x less its mean from here on
    y       x r weight + bias
    z_a     y_a cos_a - y_b sin_a               for tokens start .. start + L of a table of L tokens
    z_b     y_b cos_b + y_a sin_b               y for all others

Pairs (a, b) of channels are (2 i, 2 i + 1) where interleaved, else (i, i + D / 2). Tables of D / 2
channels hold one value a pair, those of D one for each channel.

z takes the place of q or k in `fpsc.kernels.reference`. Nothing is rounded on the way: models round
to their dtype after the norm and after the rotation, which is up to two roundings of 2^-9 relative
in bfloat16, and what is computed here differs from a model by these. A kernel whose products take
the input's dtype rounds z to that, once.

`gradients` is the derivative of all this, with no other rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_NORM, RMS, ACROSS, LAYER = "none", "rms", "rms-across", "layer"
NORMS = (NO_NORM, RMS, ACROSS, LAYER)
NO_ROTATION, INTERLEAVED, HALF_SPLIT = "none", "interleaved", "half-split"
ROTATIONS = (NO_ROTATION, INTERLEAVED, HALF_SPLIT)


@dataclass(frozen=True)
class Norm:
    """A norm in front of q or k.

    Attributes:
        kind: RMS, ACROSS or LAYER.
        weight, bias: [C] or [2, C] with C = D, shared by the heads, or H * D; None for ones and
            zeros. Of two rows the first is for tokens below `split`, the second for the others.
        rstd: with ACROSS the statistic r, float32 [B, N], where it is known already; else None.
    """

    kind: str = RMS
    weight: Tensor | None = None
    bias: Tensor | None = None
    rstd: Tensor | None = None
    epsilon: float = 1e-6
    split: int = 0


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding in front of q and k.

    Attributes:
        cos, sin: [1 or B, 1 or H, L, D or D / 2].
        start: the first token that is rotated.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True
    start: int = 0


@dataclass(frozen=True)
class Before:
    """What is done to q and k before anything else."""

    norm_q: Norm | None = None
    norm_k: Norm | None = None
    rotation: Rotation | None = None

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.norm_q, self.norm_k, self.rotation))

    def apply(self, q_BHND: Tensor, k_BGND: Tensor) -> tuple[Tensor, Tensor]:
        """q and k themselves where there is nothing to do, else what takes their place, float32."""
        if not self:
            return q_BHND, k_BGND
        return (
            prepared(q_BHND, self.norm_q, self.rotation),
            prepared(k_BGND, self.norm_k, self.rotation),
        )


NOTHING_BEFORE = Before()


class Gradients(NamedTuple):
    """Of one side; None for what is not there."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rstd: Tensor | None


def before_of(
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    q_rstd: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    k_rstd: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str = NO_NORM,
    epsilon: float = 1e-6,
    split: int = 0,
    rotation: str = NO_ROTATION,
    start: int = 0,
) -> Before:
    """From the arguments of `fpsc::attention` (`fpsc.kernels.ops`)."""
    norms: list[Norm | None] = [None, None]
    if norm != NO_NORM:
        norms = [
            Norm(norm, q_weight, q_bias, q_rstd, epsilon, split),
            Norm(norm, k_weight, k_bias, k_rstd, epsilon, split),
        ]
    turn = None
    if rotation != NO_ROTATION:
        assert cos is not None and sin is not None
        turn = Rotation(cos, sin, rotation == INTERLEAVED, start)
    return Before(norms[0], norms[1], turn)


def prepared(x_BHND: Tensor, norm: Norm | None, rotation: Rotation | None) -> Tensor:
    """z, float32, of q or of k."""
    x = x_BHND.float()
    if norm is not None:
        x, _ = _standardised(x, norm)
        if norm.weight is not None:
            x = x * _for_tokens(norm.weight, x, norm.split)
        if norm.bias is not None:
            x = x + _for_tokens(norm.bias, x, norm.split)
    return x if rotation is None else _rotated(x, rotation)


def gradients(
    dz_BHND: Tensor, x_BHND: Tensor | None, norm: Norm | None, rotation: Rotation | None
) -> Gradients:
    """From the gradient of z; of x in dz's dtype, of the others in their own.

    x: None where there is no norm: a rotation alone needs it not.
    """
    dtype, dy = dz_BHND.dtype, dz_BHND.float()
    if rotation is not None:
        dy = _rotated(dy, rotation, back=True)
    if norm is None:
        return Gradients(dy.to(dtype), None, None, None)
    assert x_BHND is not None
    x = x_BHND.float()
    unit, r = _standardised(x, norm)
    dweight = dbias = drstd = None
    du = dy
    if norm.bias is not None:
        dbias = _summed(dy, norm.bias, norm.split)
    if norm.weight is not None:
        dweight = _summed(dy * unit, norm.weight, norm.split)
        du = dy * _for_tokens(norm.weight, x, norm.split)
    if norm.rstd is not None:
        drstd = (du * x).sum((1, 3)).to(norm.rstd.dtype)
        return Gradients((du * r).to(dtype), dweight, dbias, drstd)
    over = (1, 3) if norm.kind == ACROSS else (3,)
    dx = du - unit * (du * unit).mean(over, keepdim=True)
    if norm.kind == LAYER:
        dx = dx - du.mean(3, keepdim=True)
    return Gradients((r * dx).to(dtype), dweight, dbias, None)


def _standardised(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x r and r; x less its mean for LAYER."""
    if norm.rstd is not None:
        r = norm.rstd[:, None, :, None]
        return x * r, r
    if norm.kind == LAYER:
        x = x - x.mean(3, keepdim=True)
    over = (1, 3) if norm.kind == ACROSS else (3,)
    r = torch.rsqrt(x.square().mean(over, keepdim=True) + norm.epsilon)
    return x * r, r


def _rows(parameter: Tensor) -> Tensor:
    """[1 or 2, C]"""
    return parameter if parameter.ndim == 2 else parameter[None]


def _second(split: int, x: Tensor) -> Tensor:
    """bool [N, 1]: tokens for which the second row of weights is."""
    return (torch.arange(x.shape[2], device=x.device) >= split)[:, None]


def _for_tokens(parameter: Tensor, x: Tensor, split: int) -> Tensor:
    """float32, as it meets x [B, H, N, D]."""
    rows = _rows(parameter).float().unflatten(1, (-1, 1, x.shape[3]))  # [S, H or 1, 1, D]
    return rows[0] if len(rows) == 1 else torch.where(_second(split, x), rows[1], rows[0])


def _summed(d: Tensor, parameter: Tensor, split: int) -> Tensor:
    """The gradient of a parameter, from that of what `_for_tokens` made of it."""
    rows = _rows(parameter)
    parts = [d]
    if len(rows) == 2:
        second = _second(split, d)
        parts = [torch.where(second, 0.0, d), torch.where(second, d, 0.0)]
    own = rows.shape[1] != d.shape[3]  # a weight for each head
    sums = [p.sum((0, 2)).flatten() if own else p.sum((0, 1, 2)) for p in parts]
    return torch.stack(sums).view(parameter.shape).to(parameter.dtype)


def _rotated(y: Tensor, rotation: Rotation, *, back: bool = False) -> Tensor:
    """back: the transpose, for gradients."""
    first, L = rotation.start, rotation.cos.shape[2]
    part = y.narrow(2, first, L)
    a, b = _pairs(part, rotation)
    (cos_a, cos_b), (sin_a, sin_b) = (
        _pairs(t.float(), rotation) if t.shape[3] == y.shape[3] else (t.float(), t.float())
        for t in (rotation.cos, rotation.sin)
    )
    if back:
        turned = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        turned = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    if rotation.interleaved:
        z = torch.stack(turned, -1).flatten(-2)
    else:
        z = torch.cat(turned, -1)
    rest = y.shape[2] - first - L
    if _is_zero(first) and _is_zero(rest):
        return z
    return torch.cat([y.narrow(2, 0, first), z, y.narrow(2, first + L, rest)], 2)


def _pairs(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    if rotation.interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = x.chunk(2, -1)
    return a, b


def _is_zero(n: Any) -> bool:
    """Whether a number is known to be zero, where graphs are made too."""
    if isinstance(n, int):
        return n == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(n == 0)
