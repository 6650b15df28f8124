"""Part 1: the kernels against the reference, on the grids, dtypes and masks of the kernel tests.

Every case runs forward and backward many times with memory that is NaN where nothing wrote it. All
repeats must agree in every bit: a number that moves is a race. Cases that share a compiled kernel
stand together, and what video models use comes first. Where the Gluon kernel serves the device, it
comes after Triton's, with every case that it takes; then Triton's with K in another order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.problem import (
    attend,
    distance,
    is_fp8,
    on,
    only,
    reordered,
    rounded,
    same_bits,
)
from bench.gpu.run import Case, Record, Setup
from fpsc.kernels.before import ACROSS, HALF_SPLIT, INTERLEAVED, LAYER, RMS
from fpsc.kernels.triton.configs import Config
from tests.kernels.cases import (
    DENSE,
    DENSE_FP8,
    NEAR,
    NEAR_FP8,
    NEAR_FP8_BOX,
    WINDOW,
    WINDOW_FP8,
    WINDOW_FP8_HEAD,
    Tables,
    qkv,
    tables,
)
from tests.thresholds import GPU_LSE, gpu_threshold

REPEATS = 100
ALL = ((DENSE, NEAR_FP8, NEAR, WINDOW_FP8), (WINDOW, DENSE_FP8, NEAR_FP8, DENSE))
ALL_FP8 = ((DENSE_FP8, NEAR_FP8, NEAR_FP8, WINDOW_FP8),) * 2
ALL_INPUT = ((DENSE, NEAR, NEAR, WINDOW),) * 2
SHARED = ((NEAR_FP8, NEAR_FP8_BOX, WINDOW_FP8_HEAD, NEAR_FP8_BOX),) * 2
KINDS: dict[tuple[tuple[int, ...], ...], int] = {ALL_INPUT: 1, ALL_FP8: 2, SHARED: 2}
SCALE = 0.2

Front = Callable[[Tables, int], dict[str, Any]]
"""The op's arguments for what it does in front of q and k, for four heads of some channels."""

Spoil = Callable[[list[Tensor], Tables], None]


@dataclass(frozen=True)
class Given:
    """One case: see `tests.kernels.cases.tables` and `qkv`."""

    name: str
    grid: tuple[int, int, int] = (5, 7, 9)
    tile: tuple[int, int, int] = (2, 4, 5)
    heads: tuple[tuple[int, ...], ...] = ALL
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    key_heads: int = 4
    prefix: int = 0
    suffix: int = 0
    masked: float = 0.0
    front: Front | None = None
    spoil: Spoil | None = None
    fp8_backward: bool = False


def outliers(x: list[Tensor], t: Tables) -> None:
    """A tile of zeros, and values so large that e4m3 must saturate."""
    q, k, v = x
    q[:, :, t.gather[0, :3].long()] = 0.0
    k[:, :, t.gather[1, : int(t.valid[1])].long()] = 0.0
    v[:, :, :, 7] = 0.0
    for one in x:
        one[0, :, 17, 3] *= 30.0


def not_finite(x: list[Tensor], t: Tables) -> None:
    """NaN in a query, infinity in a key, NaN in a value: each reaches what visits it."""
    nan, inf = float("nan"), float("inf")
    for one, tile, value in zip(x, (0, 2, 3), (nan, inf, nan), strict=True):
        one[0, 0, int(t.gather[tile, 1]), 5] = value


def across_heads(t: Tables, dim: int) -> dict[str, Any]:
    """As Wan has it; the statistic is computed by the op."""
    angle = torch.rand(1, 1, t.tokens, dim // 2) * 6.3
    weights = {f"{side}_weight": torch.rand(4 * dim) + 0.5 for side in "qk"}
    tables = {"cos": angle.cos(), "sin": angle.sin(), "rotation": INTERLEAVED}
    return {"norm": ACROSS, **weights, **tables}


def two_parts(t: Tables, dim: int) -> dict[str, Any]:
    """As HunyuanVideo has it: text behind the video, with norms of its own and not rotated."""
    video = t.tokens - 5
    angle = torch.rand(1, 1, video, dim // 2) * 6.3
    weights = {f"{side}_weight": torch.rand(2, dim) + 0.5 for side in "qk"}
    tables = {"cos": angle.cos(), "sin": angle.sin(), "rotation": HALF_SPLIT}
    return {"norm": RMS, "split": video, **weights, **tables}


def layer_norms(t: Tables, dim: int) -> dict[str, Any]:
    """As CogVideoX has it: text before the video; tables of each head and channel."""
    angle = torch.rand(2, 4, t.tokens - 3, dim) * 6.3
    weights = {f"{side}_weight": torch.rand(dim) + 0.5 for side in "qk"}
    biases = {f"{side}_bias": torch.randn(dim) for side in "qk"}
    tables = {"cos": angle.cos(), "sin": angle.sin(), "rotation": INTERLEAVED, "start": 3}
    return {"norm": LAYER, **weights, **biases, **tables}


HALF = torch.float16
CASES = (
    # bfloat16, heads of 128: grids, text, masks, heads, one kind alone, groups of scales.
    Given("both kinds of cell, text before", prefix=3),
    Given("fp8 cells alone", heads=ALL_FP8, prefix=3),
    Given("cells in the input's dtype alone", heads=ALL_INPUT, prefix=3),
    Given("even grid, full tiles", (8, 8, 16), (4, 4, 8)),
    Given("tiles of 126", (21, 9, 16), (7, 9, 2)),
    Given("grid of primes", (1, 13, 17), (1, 5, 5)),
    Given("grid of one row", (3, 1, 64), (2, 1, 24)),
    Given("tiles of one token", (2, 3, 3), (1, 1, 1), prefix=1, suffix=1),
    Given("text on both sides, more than a tile", prefix=7, suffix=130),
    Given("masked keys", prefix=3, masked=0.3),
    Given("masked keys, fp8 alone", heads=ALL_FP8, suffix=3, masked=0.3),
    Given("every key masked", masked=1.0),
    Given("one key head", key_heads=1),
    Given("two key heads, masked", key_heads=2, masked=0.3),
    Given("groups of tiles share scales", heads=SHARED, prefix=3),
    Given("outliers and tiles of zeros", spoil=outliers),
    Given("values that are not finite", spoil=not_finite),
    Given("values that are not finite, fp8 alone", heads=ALL_FP8, spoil=not_finite),
    Given("more tiles than a device takes at once", (13, 18, 28), (4, 4, 8), prefix=3),
    # What the op does in front of q and k.
    Given("norm across heads, rotated pairs", front=across_heads),
    Given("norm across heads, fp8 alone", heads=ALL_FP8, front=across_heads),
    Given("norms of two parts, rotated halves", suffix=5, masked=0.3, front=two_parts),
    Given("layer norms, rotated pairs", prefix=3, heads=SHARED, front=layer_norms),
    Given("layer norms, heads of 72", dim=72, prefix=3, front=layer_norms),
    Given(
        "norms of two parts, float16, heads of 64", dtype=HALF, dim=64, suffix=5, front=two_parts
    ),
    # Other head dims of video models, other dtypes, then what is padded.
    Given("heads of 64", dim=64, prefix=3, masked=0.3),
    Given("heads of 64, fp8 alone", heads=ALL_FP8, dim=64),
    Given("float16", dtype=HALF, prefix=3),
    Given("heads of 96", dim=96),
    Given("heads of 72", dim=72),
    Given("heads of 40", dim=40),
    Given("heads of 16", dim=16),
    Given("heads of 80", dim=80),
    Given("heads of 256", dim=256),
    Given("float16, heads of 64, two key heads", dtype=HALF, dim=64, key_heads=2),
    Given("float16, heads of 256", dtype=HALF, dim=256),
)
BACKWARD = tuple(
    replace(given, name=f"{given.name}, backward in fp8", fp8_backward=True)
    for given in (
        Given("both kinds of cell, text before", prefix=3),
        Given("fp8 cells alone", heads=ALL_FP8, prefix=3),
        Given("masked keys, two key heads", heads=ALL_FP8, key_heads=2, suffix=3, masked=0.3),
        Given("every key masked", masked=1.0),
        Given("groups of tiles share scales", heads=SHARED, prefix=3),
        Given("outliers and tiles of zeros", spoil=outliers),
        Given("more tiles than a device takes at once", (13, 18, 28), (4, 4, 8), prefix=3),
        Given("norm across heads, fp8 alone", heads=ALL_FP8, front=across_heads),
        Given("heads of 64", dim=64, prefix=3, masked=0.3),
        Given("heads of 72", dim=72),
        Given("heads of 256", dim=256),
        Given("float16", dtype=HALF, prefix=3),
    )
)
SMOKE = (
    Given("both kinds of cell, text before", dim=16, prefix=3),
    Given("groups of tiles share scales", heads=SHARED, dim=16),
    Given("values that are not finite", dim=16, spoil=not_finite),
    Given("layer norms, rotated pairs", dim=16, prefix=3, front=layer_norms),
    Given("backward in fp8", dim=16, prefix=3, fp8_backward=True),
)


def cases(setup: Setup) -> Iterator[Case]:
    yield "uninitialised memory is NaN", lambda: poison_works(setup)
    if setup.smoke:
        for given in SMOKE:
            yield given.name, partial(check, given, setup, setup.kernel)
        return
    for kernel in ("triton", "gluon"):
        for given in (*CASES, *BACKWARD):
            if kernel == "triton":
                yield given.name, partial(check, given, setup, kernel)
            elif given.heads != ALL_INPUT and setup.serves(kernel, given.dtype, given.dim):
                yield f"{given.name}, {kernel}", partial(check, given, setup, kernel)
    for given in CASES:
        if given.heads in (ALL_FP8, SHARED):
            for config in reordered(setup.device, given.dim):
                yield f"{given.name}, {config.name}", partial(check, given, setup, "triton", config)


def poison_works(setup: Setup) -> Record:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    with poisoned():
        left = [
            f"torch.empty of {dtype} on {setup.device.type} is not filled with NaN"
            for dtype in dtypes
            if not torch.empty(1000, dtype=dtype, device=setup.device).float().isnan().all()
        ]
    return {"problems": left}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing wrote is NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def check(given: Given, setup: Setup, kernel: str, config: Config | None = None) -> Record:
    torch.manual_seed(0)
    t = tables(
        given.grid,
        given.tile,
        [list(modes) for modes in given.heads],
        prefix=given.prefix,
        suffix=given.suffix,
    )
    x = qkv(t, dim=given.dim, key_heads=given.key_heads, dtype=given.dtype)
    if given.spoil:
        given.spoil(x, t)
    B, N = len(given.heads), t.tokens
    mask = torch.rand(B, N) >= given.masked if given.masked else None
    dout = torch.randn(x[0].shape).to(given.dtype)
    options: dict[str, Any] = {"kinds": KINDS.get(given.heads, 3), "scale": SCALE}
    options["fp8_backward"] = given.fp8_backward
    front = given.front(t, given.dim) if given.front else {}
    expected = forward_backward(
        x,
        dout,
        lambda q, k, v: attend(q, k, v, t, key_mask=mask, kernel="reference", **options, **front),
    )

    there, device = on(t, setup.device), setup.device
    mask_there = None if mask is None else mask.to(device)
    front_there = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in front.items()}
    x_there, dout_there = [strided_copy(one, device) for one in x], dout.to(device)

    def run() -> list[Tensor]:
        return forward_backward(
            x_there,
            dout_there,
            lambda q, k, v: attend(
                q, k, v, there, key_mask=mask_there, kernel=kernel, **options, **front_there
            ),
        )

    repeats = 3 if setup.smoke else REPEATS
    with poisoned(), only(config):
        first = run()
        moved = [n for n in range(1, repeats) if not same_bits(run(), first)]
    errors, problems = compare(first, expected, t, given)
    if moved:
        problems.append(f"{len(moved)} of {repeats} repeats differ from the first: a race")
    return {"problems": problems, "errors": errors, "repeats": repeats}


def forward_backward(
    x: list[Tensor], dout: Tensor, run: Callable[..., tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    leaves = [one.detach().requires_grad_() for one in x]
    out, lse = run(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def compare(
    found: list[Tensor], expected: list[Tensor], t: Tables, given: Given
) -> tuple[dict[str, float | str], list[str]]:
    """The largest errors by name, and what is above its threshold."""
    errors: dict[str, float] = {}
    problems: list[str] = []
    gradients = given.spoil is not not_finite  # theirs are specified where values are finite

    def judge(name: str, error: float, allowed: float, where: str) -> None:
        errors[name] = max(errors.get(name, 0.0), error)
        if error > allowed:
            problems.append(f"{name}{where}: error {rounded(error)}, allowed is {allowed}")

    # Where a query sees few keys, its gradient cancels to almost nothing.
    least = 1e-2 * given.dim**0.5
    fp8 = is_fp8(t)
    for b, heads in enumerate(fp8):
        for h, quantised in enumerate(heads):
            kind, where = "fp8" if quantised else "input", f" at batch {b}, head {h}"
            out, gradient = gpu_threshold(given.dtype, fp8=quantised)
            judge(f"out, {kind}", distance(found[0][b, h], expected[0][b, h]), out, where)
            judge(f"lse, {kind}", distance(found[1][b, h], expected[1][b, h]), GPU_LSE, where)
            if gradients:
                error = distance(found[2][b, h], expected[2][b, h], least)
                judge(f"dq, {kind}", error, gradient, where)
    _, gradient = gpu_threshold(given.dtype, fp8=any(map(any, fp8)))
    for name, one, other in zip(("dk", "dv"), found[3:], expected[3:], strict=True):
        if gradients:
            judge(name, distance(one, other, least), gradient, "")
    return {name: rounded(error) for name, error in errors.items()}, problems


def strided_copy(x: Tensor, device: torch.device) -> Tensor:
    """x on a device with the strides and the misaligned start that it has here."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())
