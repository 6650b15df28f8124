"""What roundings cost the gradients of an FP8 attention: those of its forward, those of backward.

    python bench/gradients.py             # bench/results/gradients.json, about a minute
    python bench/gradients.py --fresh     # anew; without it, only the data that are missing
    python bench/gradients.py --json      # prints it too
    python bench/readme.py                # the tables of docs/kernels.md

Each number is the relative root mean square error of dq, dk or dv against float32 gradients of what
nothing has rounded, over all heads of a data set. Data are the self-attentions of the demo's dense
model, a head of each layer, with the gradients of its own training loss on a clip that it never
saw, and random numbers. Attention is dense here, so that every gradient has as many terms as it can
have; rows are in tile order, so that scales are those of real tiles. Roundings are written out, one
by one, for what may be chosen; `fpsc.kernels.reference` has what was chosen, and is what "fp8"
is tested against.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.progress import track  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from fpsc.bench.markdown import markdown  # noqa: E402
from fpsc.files import replacing  # noqa: E402
from fpsc.grid import TokenGrid, layout  # noqa: E402
from fpsc.kernels.reference import (  # noqa: E402
    E4M3_MAX,
    P_OFFSET,
    k_mean,
    quantisation_scale,
    to_e4m3,
)

RESULTS = ROOT / "bench" / "results" / "gradients.json"
BLOCK = 128
TILE = (2, 8, 8)
NOISE = (0.9, 0.5)
E5M2_MAX = 57344.0

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """The roundings of a backward, whose forward is FP8.

    Attributes:
        do, p, ds: format of dO, P and dS as operands of products; one of `ROUND`.
        ds_scales: of dS in FP8, powers of two: a bound of what a row (for dK: a tile of them) can
            hold, known before; or the largest value of each block, which a kernel has to look for.
        delta: whether dO . O is of dO as rounded, or as given.
        dp: whether dO V^T is of dO as rounded, or has bf16.
    """

    do: Literal["bf16", "e4m3", "e5m2"] = "bf16"
    p: Literal["bf16", "e4m3", "e5m2"] = "bf16"
    ds: Literal["bf16", "e4m3", "e5m2"] = "bf16"
    ds_scales: Literal["bound", "block"] = "bound"
    delta: Literal["rounded", "given"] = "rounded"
    dp: Literal["rounded", "bf16"] = "rounded"


FP8 = Way(do="e4m3", p="e4m3", ds="e4m3")
WAYS = {
    "bf16": Way(),
    "fp8": FP8,
    "fp8, dO alone": Way(do="e4m3"),
    "fp8, P alone": Way(p="e4m3"),
    "fp8, dS alone": Way(ds="e4m3"),
    "fp8, but dP in bf16": replace(FP8, dp="bf16"),
    "fp8, delta of dO as given": replace(FP8, delta="given"),
    "fp8, dS with the scale of its block": replace(FP8, ds_scales="block"),
    "fp8, dS in e5m2": replace(FP8, ds="e5m2"),
    "fp8, dO and dS in e5m2": replace(FP8, do="e5m2", ds="e5m2"),
}


@dataclass(frozen=True)
class Head:
    """q, k, v and the gradient of the output, float32 [N, D], in tile order, tiles full."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[1] ** -0.5)


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def to_e5m2(x: Tensor) -> Tensor:
    return x.clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2).float()


ROUND: dict[str, tuple[Rounding, float]] = {
    "bf16": (to_bf16, math.inf),
    "e4m3": (to_e4m3, E4M3_MAX),
    "e5m2": (to_e5m2, E5M2_MAX),
}


def exact(head: Head) -> tuple[Tensor, ...]:
    """dq, dk, dv of what nothing has rounded."""
    leaves = [x.detach().requires_grad_() for x in (head.q, head.k, head.v)]
    p = (head.scale * leaves[0] @ leaves[1].T).softmax(dim=1)
    return torch.autograd.grad(p @ leaves[2], leaves, head.dout)


class Forward:
    """What an FP8 forward leaves to backward; see `fpsc.kernels.reference`."""

    def __init__(self, head: Head) -> None:
        everything = torch.ones(len(head.q), dtype=torch.bool)
        self.head = head
        self.q = _round_tiles(head.q, E4M3_MAX, to_e4m3)
        self.k = _round_tiles(head.k - k_mean(head.k, everything), E4M3_MAX, to_e4m3)
        self.c = quantisation_scale(head.v.abs().amax(dim=0))
        self.v8 = to_e4m3(head.v / self.c)
        s2 = head.scale * math.log2(math.e) * self.q @ self.k.T
        self.p = torch.exp2(s2 - (s2.amax(dim=1, keepdim=True).ceil() - P_OFFSET))
        self.total = self.p.sum(dim=1, keepdim=True)
        self.out = to_bf16(to_e4m3(self.p) @ self.v8 * self.c / self.total)

    def backward(self, way: Way) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        given = to_bf16(self.head.dout) * self.c / self.total
        do, most = ROUND[way.do]
        r = torch.ones(()) if way.do == "bf16" else _unit_of_tiles(given, most)
        y = given if way.do == "bf16" else do(given / r) * r
        seen = given if way.dp == "bf16" else y
        delta = ((given if way.delta == "given" else seen) * (self.out / self.c)).sum(1, True)
        p = ROUND[way.p][0](self.p)
        ds = self.p * (seen @ self.v8.T - delta)
        of_queries, of_keys = self._round(ds, seen, delta, r, way)
        dq = self.head.scale * of_queries @ self.k
        dk = self.head.scale * of_keys.T @ self.q
        return dq, dk, p.T @ y / self.c

    def _round(
        self, ds: Tensor, y: Tensor, delta: Tensor, r: Tensor, way: Way
    ) -> tuple[Tensor, Tensor]:
        """dS for dQ, and for dK. A bound's power of two is one of y / r, as products see it."""
        to, most = ROUND[way.ds]
        if way.ds == "bf16":
            return to(ds), to(ds)
        if way.ds_scales == "block":
            blocks = ds.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            unit = _power_of_two(blocks.abs().amax(dim=(1, 3), keepdim=True) * (E4M3_MAX / most))
            rounded = (to(blocks / unit) * unit).flatten(2).flatten(0, 1)
            return rounded, rounded
        largest = self.v8.norm(dim=1).amax()
        bound = 2**P_OFFSET * (y.norm(dim=1, keepdim=True) * largest + delta.abs())
        of_row = _power_of_two(bound / r * (E4M3_MAX / most)) * r
        of_tile = _of_tiles(of_row)
        return to(ds / of_row) * of_row, to(ds / of_tile) * of_tile


def _power_of_two(bound: Tensor) -> Tensor:
    """The least one for numbers up to a bound, which then are within e4m3."""
    return torch.exp2((bound.clamp(min=2.0**-100) / E4M3_MAX).log2().ceil())


def _of_tiles(x: Tensor) -> Tensor:
    """For each row the largest of its tile, [N, 1]."""
    largest = x.unflatten(0, (-1, BLOCK)).amax(dim=(1, 2))
    return largest.repeat_interleave(BLOCK)[:, None]


def _round_tiles(x: Tensor, most: float, to: Rounding) -> Tensor:
    unit = _unit_of_tiles(x, most)
    return to(x / unit) * unit


def _unit_of_tiles(x: Tensor, most: float) -> Tensor:
    """The scale of each row's tile, [N, 1]: its largest value becomes the largest of the format."""
    return quantisation_scale(_of_tiles(x.abs()) * (E4M3_MAX / most))


# ---- data


class Captured(TorchFunctionMode):
    """Notes q, k, v and the output of every self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, ...]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            q, k, v = (given[name] for name in names)
            if q.shape == k.shape:
                out.retain_grad()
                self.found.append((q, k, v, out))
        return out


def demo_heads(noise: float) -> Iterator[Head]:
    """A head of every self-attention of the demo's dense model, in its training loss."""
    from fpsc.demo.clips import clip, encode_prompt
    from fpsc.demo.model import GRID, encode_clip, load_model
    from fpsc.demo.train import HELD_OUT, Batch, losses

    picture, scene = clip(HELD_OUT)
    drawn = np.random.RandomState(HELD_OUT).standard_normal((1, *picture.shape))
    batch = Batch(
        encode_clip(picture)[None],
        torch.from_numpy(drawn.astype(np.float32)),
        encode_prompt(scene)[None],
        torch.tensor([noise]),
    )
    model = load_model().requires_grad_(True)
    with Captured() as captured:
        loss = losses(model, batch, sigma_floor=0.1).mean()
    loss.backward()
    order = layout(TokenGrid(*GRID), TILE, 0, 0).gather.flatten().long()
    for layer, (q, k, v, out) in enumerate(captured.found):
        h = layer % q.shape[1]
        yield Head(*(x[0, h, order].detach().float() for x in (q, k, v, out.grad)))


def random_heads(tokens: int, dim: int, outliers: bool) -> Iterator[Head]:
    """Standard normal; or with channels and rows that are larger, and means of K and V."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v, dout = (normal(tokens, dim) for _ in range(4))
    if outliers:
        large = torch.arange(dim) % 32 == 0
        q, k = (torch.where(large, 4 * x, x) for x in (q, k))
        k, v = k + 2 * normal(dim), v + 2 * normal(dim)
        dout = dout * torch.exp(2 * normal(tokens, 1))
    yield Head(q, k, v, dout)


DATA: dict[str, Callable[[], Iterator[Head]]] = {
    **{f"demo, noise {x:g}": lambda x=x: demo_heads(x) for x in NOISE},  # type: ignore[misc]
    "random, 2,048 tokens": lambda: random_heads(2048, 128, False),
    "random, 4,096 tokens": lambda: random_heads(4096, 128, False),
    "random with outliers": lambda: random_heads(2048, 128, True),
}


# ---- what is written


def measured(heads: Iterator[Head]) -> dict[str, dict[str, float]]:
    """Errors of dq, dk and dv of every way."""
    squares: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    norms = []
    for head in heads:
        right = exact(head)
        forward = Forward(head)
        norms.append([float(x.square().sum()) for x in right])
        for name, way in WAYS.items():
            pairs = zip(forward.backward(way), right, strict=True)
            squares[name].append([float((x - y).square().sum()) for x, y in pairs])
    total = np.sum(norms, axis=0)
    found = {name: np.sqrt(np.sum(rows, axis=0) / total) for name, rows in squares.items()}
    return {
        name: dict(zip(("dq", "dk", "dv"), (round(float(x), 4) for x in row), strict=True))
        for name, row in found.items()
    }


def errors(place: Path) -> str:
    """The table of bf16 against fp8, for docs/kernels.md."""
    rows = [
        [data, *(f"{100 * ways[way][x]:.1f}" for x in ("dq", "dk", "dv") for way in PAIR)]
        for data, ways in _read(place).items()
    ]
    head = ["error, %", *(f"{x}, {way}" for x in ("dq", "dk", "dv") for way in PAIR)]
    return markdown(head, rows)


def choices(place: Path) -> str:
    """The table of all ways, one data set a column: the errors of dq, dk and dv."""
    data = _read(place)
    rows = [
        [way, *(" / ".join(f"{100 * x:.1f}" for x in ways[way].values()) for ways in data.values())]
        for way in WAYS
    ]
    return markdown(["dq / dk / dv, %", *data], rows)


PAIR = ("bf16", "fp8")
PARTS = {"errors": errors, "choices": choices}


def _read(place: Path) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = json.loads(place.read_text())["data"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure all of it anew")
    parser.add_argument("--json", action="store_true", help="print what is written")
    given = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(2)
    known = _read(given.output) if given.output.exists() and not given.fresh else {}
    data: dict[str, dict[str, dict[str, float]]] = {}
    for name, make in track(DATA.items(), description="gradients", total=len(DATA)):
        kept = known.get(name)
        data[name] = kept if kept and list(kept) == list(WAYS) else measured(make())
        document = {"tile": TILE, "torch": torch.__version__, "data": data}
        text = json.dumps(document, indent=1) + "\n"
        with replacing(given.output) as beside:
            beside.write_text(text, encoding="utf-8")
    if given.json:
        print(text, end="")


if __name__ == "__main__":
    main()
