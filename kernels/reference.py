"""The specification of `fpsc::attention`, in plain torch and in the order of the formulas.

One head at a time, one query tile at a time. q, k, v are [N, D] in raster order, i indexes queries,
j keys, d channels; u is the tile of i and w the tile of j. V(i) is the set of keys that i sees: the
real rows of the key tiles in the list of u, less those that the key mask leaves out.

A norm and a rotation in front of q and k, where they are a part of the call, come before all of
this: `fpsc.kernels.before`.

Every cell, first:  a NaN or an infinity in q, k or v becomes NaN. It then reaches exactly what
visits it: a query row its own output, a key row the outputs of all queries that visit its tile, a
value of V those outputs in its own channel. Only finite values take part in means and maxima.

Input-dtype cell (dtype 0)
    s_ij = scale * q_i . k_j                                              in float32, j in V(i)
    lse_i = log sum_j exp(s_ij)
    o_i = sum_j exp(s_ij - lse_i) v_j                                     rounded to q's dtype

fp8 cell (dtype 1)
    mu   = mean over j of k_j           rows that are finite and not masked, whole sequence [1]
    a_u  = max |q_i| / 448              over the rows of all tiles in the group of u        [2]
    b_w  = max |k_j - mu| / 448         over the unmasked rows of all tiles in that of w    [2]
    c_d  = max |v_jd| / 448             over the unmasked rows of the sequence, per channel [2]
    q8 = e4m3(q_i / a_u),  k8 = e4m3((k_j - mu) / b_w),  v8 = e4m3(v_jd / c_d)
    t_ij = scale * a_u b_w (q8_i . k8_j)                                  in float32
    m_i  = ceil(max_j t_ij log2(e)) - 8    a whole number                                    [3]
    p_ij = exp2(t_ij log2(e) - m_i)        at most 256, so that e4m3 (max 448) never saturates
    l_i  = sum_j p_ij                      of the unrounded p                                  [4]
    o_id = c_d (sum_j e4m3(p_ij) v8_jd) / l_i                             rounded to q's dtype
    lse_i = log(2) (m_i + log2(l_i)) + scale q_i . mu              of the true scores          [5]

A query that sees no key gives o = 0 and lse = -inf.

Backward, both kinds of cell, straight-through (every rounding has gradient one, mu and the scales
are constants) [6]. With Q, K, V the dequantised operands above (K less its mean), O the output:
    P_ij  = exp(s_ij - lse_i)           from the same Q and K as forward, not rounded
    dV_j  = sum_i P_ij dO_i
    dP_ij = dO_i . V_j
    dS_ij = P_ij (dP_ij - dO_i . O_i)
    dQ_i  = scale sum_j dS_ij K_j
    dK_j  = scale sum_i dS_ij Q_i

Backward of fp8 cells with fp8_backward: operands of all five products are e4m3 [7]. m, p and l are
those of forward, c that of V
    y_i   = dO_i c / l_i
    y8    = e4m3(y_id / r_u)            r_u = max |y| / 448 over the rows of the tile of i
    x_ij  = y8_i . v8_j                 v8 = V_jd / c_d
    D_i   = y8_i . (O_i / c)
    dV_j  = sum_u r_u (sum_{i in u} e4m3(p_ij) y8_i) / c
    e_ij  = p_ij (x_ij - D_i)           dS_ij = r_u e_ij
    B_i   = 256 (|y8_i| max_j |v8_j| + |D_i|)           not less than |e_ij|; j over all keys
    dQ_i  = scale r_u sum_j 2^t e4m3(e_ij / 2^t) K_j    2^t >= B_i / 448, least whole t >= 0
    dK_j  = scale sum_u r_u 2^t sum_{i in u} e4m3(e_ij / 2^t) Q_i       B the largest in u

Sources
[1] Smoothing K: SageAttention (arXiv 2410.02367), section 4.2. q_i . mu is the same for all keys of
    a row, and softmax does not see it.
[2] FPSAttention (arXiv 2506.04648): one scale per 3D tile, or per group of them, for Q and K, one
    per channel for V. e4m3 here is e4m3fn, round to nearest even; 448 is its largest value.
[3] The 8 spends the range above 1 that P alone would leave empty, and costs nothing. Whole, because
    e4m3 rounds a number and its multiples by powers of two alike: a kernel that sees one key tile
    after the other, with the largest score so far, then rounds P as one that sees all at once, and
    in whatever order the tiles come. The price: P of the largest score is rounded too, which shows
    where one key has almost all the weight.
[4] As FlashAttention-3 (arXiv 2407.08608) does: the sum comes from the registers before they are
    packed to e4m3, so it costs no conversion back, l is the denominator of the scores themselves,
    and the P that backward recomputes from the lse adds up to one. The rounding of P is unbiased,
    and averages out over keys.
[5] The shift uses q before rounding: lse is then off only by the rounding of the differences
    between keys.
[6] FlashAttention-2 (arXiv 2307.08691), section 3.1, for the formulas. P from the quantised Q and
    K, because P from others would not add up to one under this lse. K less its mean, because the
    rows of dS add up to zero but for the rounding of P and O, and a mean would amplify the rest.
[7] S and P are then bit for bit those of forward. dO is rounded once for all that it is used in, D
    too, so that the rows of dS still add up to zero: what is differentiated is the same function,
    in a direction that is a little off. Scales are of rows or tiles of queries and known before
    the products, so that a kernel has no maxima to find; those of dS are powers of two, which
    change no rounding but below the smallest normal number. FP8 in all products, and which of them
    it costs most: `docs/kernels.md`.

Groups: the grouping of a mode names for each tile the group of tiles that share its scales. Where
query heads of different groupings read one key head, K has that of the lowest number among their
fp8 cells.

Shapes: q_BHND, k_BGND, v_BGND with G dividing H (query head h reads key head h // (H / G)).
modes_BH3 int32: (pattern, dtype, grouping) of each batch element and head. list_ptr int32
[PATTERNS, TILES + 1], list_idx int32 [NNZ], groups int32 [GROUPINGS, TILES], gather int32 [TILES,
BLOCK] (-1 is padding), valid int32 [TILES]: see `fpsc.kernels.ops`. key_mask_BN bool: True takes
part. The transposed lists, `order` and `kinds` speed up kernels and change no number: unused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fpsc.kernels.before import NOTHING_BEFORE, Before
from fpsc.kernels.kinds import ALL_CELLS

E4M3_MAX = 448.0
P_OFFSET = 8.0  # log2 of the factor that P carries when it is rounded to e4m3
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: below it a tile is all zero


class Cell(NamedTuple):
    """One head of one batch element, and what it reads."""

    b: int
    h: int
    g: int
    pattern: int
    fp8: bool
    q_groups: Tensor  # [TILES]
    k_groups: Tensor  # [TILES]
    taking_part: Tensor  # bool [N]


class Operands(NamedTuple):
    """What the products of one head see, float32, dequantised, raster order."""

    q_ND: Tensor
    k_ND: Tensor
    v_ND: Tensor
    shift_N: Tensor  # scale * q . mu: what the mean of K took from every score of a row
    c_D: Tensor  # the scale of v; 1 where it is not rounded


def forward(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
    scale: float,
    kinds: int = ALL_CELLS,
    before: Before = NOTHING_BEFORE,
    fp8_backward: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """out [B, H, N, D] in v's dtype, [B, N, H, D]-contiguous, lse [B, H, N] float32, and nothing
    for backward, which computes its operands again. See the module's text."""
    q_BHND, k_BGND = before.apply(q_BHND, k_BGND)
    B, H, N, D = q_BHND.shape
    out_BHND = torch.zeros(B, N, H, D, device=q_BHND.device).transpose(1, 2)
    lse_BHN = torch.full((B, H, N), -math.inf, device=q_BHND.device)
    tiles = tile_rows(gather, valid)
    for cell in cells(q_BHND, k_BGND, modes_BH3, groups, key_mask_BN):
        b, h, g = cell[:3]
        head = operands(q_BHND[b, h], k_BGND[b, g], v_BGND[b, g], tiles, cell, scale)
        for u, rows in enumerate(tiles):
            keys = visible_keys(u, tiles, list_ptr[cell.pattern], list_idx, cell.taking_part)
            if len(keys) == 0:
                continue
            s = scale * head.q_ND[rows] @ head.k_ND[keys].T
            s2 = s * math.log2(math.e)
            m = s2.amax(dim=1, keepdim=True)
            if cell.fp8:
                m = m.ceil() - P_OFFSET
            p = torch.exp2(s2 - m)
            total = p.sum(dim=1, keepdim=True)
            if cell.fp8:
                p = to_e4m3(p)
            out_BHND[b, h, rows] = (p @ head.v_ND[keys]) / total
            lse = ((m + total.log2()) * math.log(2)).squeeze(1)
            lse_BHN[b, h, rows] = lse + head.shift_N[rows]
    return out_BHND.to(v_BGND.dtype), lse_BHN, None


def backward(
    dout_BHND: Tensor,
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    out_BHND: Tensor,
    lse_BHN: Tensor,
    saved: None,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
    scale: float,
    kinds: int = ALL_CELLS,
    fp8_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv in the shapes and dtypes of q, k, v. See the module's text.

    fp8_backward: in fp8 cells, as above.
    """
    dq_BHND = torch.zeros(q_BHND.shape, device=q_BHND.device)
    dk_BGND = torch.zeros(k_BGND.shape, device=q_BHND.device)
    dv_BGND = torch.zeros(v_BGND.shape, device=q_BHND.device)
    tiles = tile_rows(gather, valid)
    for cell in cells(q_BHND, k_BGND, modes_BH3, groups, key_mask_BN):
        b, h, g = cell[:3]
        head = operands(q_BHND[b, h], k_BGND[b, g], v_BGND[b, g], tiles, cell, scale)
        do_ND = dout_BHND[b, h].float()
        delta_N = (do_ND * out_BHND[b, h].float()).sum(dim=1)
        lse_N = lse_BHN[b, h] - head.shift_N
        v8_max = _finite_max((head.v_ND[cell.taking_part] / head.c_D).norm(dim=1))
        for u, rows in enumerate(tiles):
            keys = visible_keys(u, tiles, list_ptr[cell.pattern], list_idx, cell.taking_part)
            if len(keys) == 0:
                continue
            q, k, v, do = head.q_ND[rows], head.k_ND[keys], head.v_ND[keys], do_ND[rows]
            if cell.fp8 and fp8_backward:
                given = do, out_BHND[b, h, rows].float(), lse_N[rows], v8_max
                dq, dk, dv = _fp8_gradients(q, k, v, *given, head.c_D, scale)
                dq_BHND[b, h, rows] = dq
                dk_BGND[b, g, keys] += dk
                dv_BGND[b, g, keys] += dv
                continue
            p = torch.exp(scale * q @ k.T - lse_N[rows, None])
            dp = do @ v.T
            ds = p * (dp - delta_N[rows, None])
            dq_BHND[b, h, rows] = scale * ds @ k
            dk_BGND[b, g, keys] += scale * ds.T @ q
            dv_BGND[b, g, keys] += p.T @ do
    return dq_BHND.to(q_BHND.dtype), dk_BGND.to(k_BGND.dtype), dv_BGND.to(v_BGND.dtype)


def _fp8_gradients(
    q_MD: Tensor,
    k_KD: Tensor,
    v_KD: Tensor,
    do_MD: Tensor,
    o_MD: Tensor,
    lse_M: Tensor,
    v8_max: Tensor,
    c_D: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq of a query tile and its share of dk and dv, with the products in FP8."""
    s2 = scale * q_MD @ k_KD.T * math.log2(math.e)
    m = s2.amax(dim=1, keepdim=True).ceil() - P_OFFSET
    p = torch.exp2(s2 - m)
    total = torch.exp2(lse_M[:, None] * math.log2(math.e) - m)
    y = infinite_to_nan(do_MD) * c_D / total
    r = quantisation_scale(_finite_max(y.flatten()))
    y8 = to_e4m3(y / r)
    delta = (y8 * (o_MD / c_D)).sum(dim=1, keepdim=True)
    e = p * (y8 @ (v_KD / c_D).T - delta)
    bound = 2**P_OFFSET * (y8.norm(dim=1, keepdim=True) * v8_max + delta.abs())
    of_rows, of_tile = power_for(bound), power_for(_finite_max(bound.flatten()))
    dq = scale * r * of_rows * to_e4m3(e / of_rows) @ k_KD
    dk = scale * r * of_tile * to_e4m3(e / of_tile).T @ q_MD
    dv = r * to_e4m3(p).T @ y8 / c_D
    return dq, dk, dv


def power_for(bound: Tensor) -> Tensor:
    """The least power of two, 1 or more, that bound divides by to be within e4m3."""
    bits = (bound / E4M3_MAX).nan_to_num(nan=1.0).clamp(min=1.0).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def operands(
    q_ND: Tensor, k_ND: Tensor, v_ND: Tensor, tiles: list[Tensor], cell: Cell, scale: float
) -> Operands:
    """The operands of one head as its products see them: as they are, or rounded to e4m3."""
    q, k, v = (infinite_to_nan(x.float()) for x in (q_ND, k_ND, v_ND))
    if not cell.fp8:
        return Operands(q, k, v, torch.zeros(len(q), device=q.device), torch.ones_like(v[0]))
    taking_part = cell.taking_part
    mu = k_mean(k, taking_part)
    c = _scale_per_channel(v[taking_part])
    return Operands(
        q_ND=_round_per_group(q, tiles, cell.q_groups, torch.ones_like(taking_part)),
        k_ND=_round_per_group(k - mu, tiles, cell.k_groups, taking_part),
        v_ND=to_e4m3(v / c) * c,
        shift_N=scale * q @ mu,
        c_D=c,
    )


def k_mean(k_ND: Tensor, taking_part_N: Tensor) -> Tensor:
    """mu [D]: mean of the finite rows of k that take part; zero where there is none.

    Summed in float64, so that the specification does not depend on the order of the rows.
    """
    rows = k_ND[taking_part_N & k_ND.isfinite().all(dim=1)]
    return (rows.sum(dim=0, dtype=torch.float64) / max(len(rows), 1)).float()


def quantisation_scale(amax: Tensor) -> Tensor:
    """amax / 448, or 1 where that is zero (or so small that float32 holds it badly)."""
    s = amax / E4M3_MAX
    return torch.where(s >= SMALLEST_SCALE, s, 1.0)


def to_e4m3(x: Tensor) -> Tensor:
    """Rounds float32 to e4m3 and back: to nearest even; finite values saturate, NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def infinite_to_nan(x: Tensor) -> Tensor:
    """x, with NaN in place of infinities."""
    return torch.where(x.isfinite(), x, math.nan)


def tile_rows(gather: Tensor, valid: Tensor) -> list[Tensor]:
    """Sequence positions (int64) of the real rows of each tile."""
    return [rows[:n].long() for rows, n in zip(gather, valid.tolist(), strict=True)]


def visible_keys(
    u: int, tiles: list[Tensor], ptr: Tensor, list_idx: Tensor, taking_part_N: Tensor
) -> Tensor:
    """V(i) of the rows i of query tile u: sequence positions, int64. ptr [TILES + 1]."""
    visited = list_idx[int(ptr[u]) : int(ptr[u + 1])].tolist()
    keys = torch.cat([tiles[w] for w in visited] or [tiles[0][:0]])
    return keys[taking_part_N[keys]]


def key_groupings(modes_BH3: Tensor, key_heads: int) -> Tensor:
    """Grouping of each key head, int32 [B, G]: the lowest among the fp8 cells that read it.

    0 where there is no such cell.
    """
    dtype, grouping = modes_BH3[..., 1], modes_BH3[..., 2]
    none = torch.iinfo(torch.int32).max
    candidates = torch.where(dtype == 1, grouping, none).unflatten(1, (key_heads, -1))
    lowest = candidates.amin(dim=2)
    return torch.where(lowest == none, 0, lowest)


def _round_per_group(
    x_ND: Tensor, tiles: list[Tensor], groups: Tensor, taking_part_N: Tensor
) -> Tensor:
    """groups [TILES]: tiles of one number share a scale."""
    rounded = torch.empty_like(x_ND)
    for group in groups.unique():
        rows = torch.cat([tile for tile, of in zip(tiles, groups, strict=True) if of == group])
        s = quantisation_scale(_finite_max(x_ND[rows[taking_part_N[rows]]].flatten()))
        rounded[rows] = to_e4m3(x_ND[rows] / s) * s
    return rounded


def _scale_per_channel(x_ND: Tensor) -> Tensor:
    return quantisation_scale(_finite_max(x_ND))


def _finite_max(x: Tensor) -> Tensor:
    """max |x| over dim 0, finite values only; zero where there is none."""
    zero = x.new_zeros(1, *x.shape[1:])
    return torch.cat([zero, torch.where(x.isfinite(), x.abs(), 0.0)]).amax(dim=0)


def cells(
    q_BHND: Tensor,
    k_BGND: Tensor,
    modes_BH3: Tensor,
    groups: Tensor,
    key_mask_BN: Tensor | None,
) -> Iterator[Cell]:
    """Every head of every batch element."""
    B, H, N, _ = q_BHND.shape
    G = k_BGND.shape[1]
    everything = torch.ones(N, dtype=torch.bool, device=q_BHND.device)
    groupings_BG = key_groupings(modes_BH3, G).tolist()
    for b in range(B):
        for h in range(H):
            pattern, dtype, grouping = modes_BH3[b, h].tolist()
            g = h // (H // G)
            yield Cell(
                b=b,
                h=h,
                g=g,
                pattern=pattern,
                fp8=dtype == 1,
                q_groups=groups[grouping],
                k_groups=groups[groupings_BG[b][g]],
                taking_part=everything if key_mask_BN is None else key_mask_BN[b],
            )
