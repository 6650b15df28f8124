"""What an attention call takes on a device: a model of a few numbers, fitted to measurements.

    seconds = overhead + bytes / bandwidth + makespan of each kind of cell
    an item = item + visits * tile        seconds of one worker

An item is a query tile of a head, and visits the key tiles of its list. Workers are the
multiprocessors of a GPU or the threads of a CPU; they take the items of a kind, the costliest first
and each when it is free, so what counts is not the sum of the items but when the last of them ends
(`makespan`). Cells of another kind are another launch, which waits for that end. `bytes` are those
of the passes that put q, k and v in tile order; the bandwidth is that of a copy, and what they take
beyond it is in `item`, from which no timing of whole calls can tell it apart. Nor is there a term
for the L2 cache: items run head by head, and the keys of a head fit into it (docs/kernels.md).

`fit` finds overhead, item and tile; `roofline` is a bound from a device's data sheet for where
nothing was measured, and says so. This module stands beside `fpsc.grid`: numpy alone, no torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fpsc.errors import UserError
from fpsc.files import replacing

Array = np.ndarray
Dtype = Literal["bf16", "fp8"]
"""Kinds of cells, as policies spell them; bf16 stands for the dtype of the input."""

DTYPES: tuple[Dtype, ...] = ("bf16", "fp8")

WORST_HELD_OUT = 0.25
"""Relative error at a measurement that was held out, above which a fit is refused. Our choice: a
tuner's budget that is wrong by more is none."""

ROUNDS = 20

TENSOR_OPERATIONS = {
    (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024,
}  # fmt: skip
"""Of dense 16-bit matrix products in a clock of a multiprocessor, by compute capability; e4m3 has
twice as many. From the peak rates, multiprocessors and boost clocks of NVIDIA's data sheets (A100,
A10, L40S, H100, B200, RTX PRO 6000)."""
FP8_CAPABILITY = (8, 9)
EXPONENTIALS = 16
"""In a clock of a multiprocessor (CUDA C++ Programming Guide, throughput of instructions)."""

BLOCK = 128


class Kind(BaseModel):
    """Seconds of one worker: of a query tile apart from its list, and of a visited key tile."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    item: float = Field(ge=0)
    tile: float = Field(ge=0)


class Point(BaseModel):
    """One measurement beside the model. held_out: the model was not fitted to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    seconds: float = Field(gt=0)
    predicted: float
    held_out: bool

    @property
    def error(self) -> float:
        """Relative."""
        return abs(self.predicted / self.seconds - 1)


class DeviceCost(BaseModel):
    """The model of one device for one head dim.

    Attributes:
        device: its name. source: `measured`, or `estimate` where nothing was.
        workers: multiprocessors, or threads of a CPU.
        overhead: seconds of a call. bandwidth: bytes read and written in a second.
        kinds: by dtype of the cells.
        points: the measurements, with what is predicted of them.
        versions: of what was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["fpsc-device-cost-1"] = "fpsc-device-cost-1"
    device: str
    source: Literal["measured", "estimate"]
    workers: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    overhead: float = Field(ge=0)
    bandwidth: float = Field(gt=0)
    kinds: dict[Dtype, Kind] = Field(min_length=1)
    points: tuple[Point, ...] = ()
    versions: dict[str, str] = {}

    def seconds(self, load: Load) -> float:
        """What a call takes.

        Raises:
            ValueError: the model does not know its head dim or one of its kinds of cells.
        """
        if load.head_dim != self.head_dim:
            raise ValueError(
                f"the cost of {self.device} is known for head dim {self.head_dim}, and this "
                f"attention has {load.head_dim}: measure it with --head-dim {load.head_dim}"
            )
        total = self.overhead + load.bytes / self.bandwidth
        for dtype, (visits, counts) in load.items.items():
            kind = self.kinds.get(dtype)
            if kind is None:
                raise ValueError(
                    f"the cost of {dtype} cells on {self.device} is not known, only of "
                    f"{', '.join(self.kinds)}"
                )
            total += makespan(kind.item + visits * kind.tile, counts, self.workers)
        return total

    @property
    def fit_error(self) -> float:
        """The largest relative error of what it was fitted to; 0 where there is nothing."""
        return max((p.error for p in self.points if not p.held_out), default=0.0)

    @property
    def held_out_error(self) -> float | None:
        """The largest relative error of what was held out; None where nothing was."""
        return max((p.error for p in self.points if p.held_out), default=None)

    @property
    def refusal(self) -> str | None:
        """Why it is not to be used; None where it is."""
        error = self.held_out_error
        if self.source == "estimate":
            return None
        if error is None:
            return "no measurement was held out, so nothing says how well the cost is predicted"
        if error > WORST_HELD_OUT:
            return (
                f"a measurement that was held out is predicted wrong by {error:.0%}, more than "
                f"{WORST_HELD_OUT:.0%}"
            )
        return None

    def __str__(self) -> str:
        if self.source == "estimate":
            return f"{self.device}: an estimate from its data sheet, not measured"
        held_out = self.held_out_error
        known = "nothing held out" if held_out is None else f"held-out error {held_out:.1%}"
        return f"{self.device}: measured, {known}"

    def save(self, path: Path) -> None:
        """Write the file: the whole of it, or nothing."""
        with replacing(path) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> DeviceCost:
        """Read a file.

        Raises:
            UserError: it is not there, is no such file, or its fit is refused.
        """
        try:
            found = cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} cannot be read as the cost of a device ({reason}); measure it with "
                f"`fpsc bench device -o {path}`"
            ) from error
        if found.refusal:
            raise UserError(f"{path}: {found.refusal}; measure again on an idle machine")
        return found


@dataclass(frozen=True)
class Load:
    """What one call asks of a device.

    Attributes:
        items: by dtype of the cells, (visits, counts): so many query tiles with so long a list.
        bytes: read and written to put q, k and v in tile order.
    """

    items: Mapping[Dtype, tuple[Array, Array]]
    bytes: float
    head_dim: int


class Heads(NamedTuple):
    """So many heads (of all batch elements) with one dtype and one list of lengths."""

    dtype: Dtype
    visits: Array
    number: int


def load_of(heads: Iterable[Heads], tokens: int, head_dim: int, element: int = 2) -> Load:
    """The load of some heads, on a sequence of so many tokens. element: bytes of a number in q."""
    found: dict[Dtype, dict[int, int]] = {}
    moved = 0.0
    for dtype, visits, number in heads:
        counts = found.setdefault(dtype, {})
        for length, n in zip(*np.unique(visits, return_counts=True), strict=True):
            counts[int(length)] = counts.get(int(length), 0) + int(n) * number
        # q, k, v are read and written; of FP8 cells, k and v are read once more for their scales.
        passes = 5 * element + 3 if dtype == "fp8" else 6 * element
        moved += float(passes * tokens * head_dim * number)
    items: dict[Dtype, tuple[Array, Array]] = {
        dtype: (np.array(list(counts), np.int64), np.array(list(counts.values()), np.int64))
        for dtype, counts in found.items()
    }
    return Load(items, moved, head_dim)


def makespan(costs: Array, counts: Array, workers: int) -> float:
    """When the last item ends: workers take items, the costliest first, each when it is free.

    costs, counts: so many items of each cost. It lies between max(sum / workers, longest) and
    sum / workers + longest, and grows with every cost.
    """
    loads = np.zeros(workers)
    for at in np.argsort(-costs, kind="stable"):
        cost, left = float(costs[at]), int(counts[at])
        if cost <= 0:
            break
        # Items that start before the busiest worker is nearly done, the earliest first.
        room = np.floor((loads.max() - loads) / cost).astype(np.int64)
        if room.sum() > left:
            _place(loads, cost, left)
            continue
        loads += room * cost
        left -= int(room.sum())
        # All now end within one item of each other, so each takes one in turn.
        loads += left // workers * cost
        loads[np.argsort(loads, kind="stable")[: left % workers]] += cost
    return float(loads.max())


def _place(loads: Array, cost: float, left: int) -> None:
    """Items of one cost, each to the worker that is free first."""
    for _ in range(left):
        loads[loads.argmin()] += cost


# ---- fitting


class Measurement(NamedTuple):
    """A call that was timed."""

    name: str
    load: Load
    seconds: float
    held_out: bool = False


def fit(
    measurements: Sequence[Measurement],
    *,
    device: str,
    workers: int,
    bandwidth: float,
    versions: Mapping[str, str] | None = None,
) -> DeviceCost:
    """The model of least relative squares with no number negative.

    When the last item ends is linear in (overhead, item, tile) as long as the same worker is the
    last, so it is solved as a linear problem, again from what was found, until nothing changes.

    Raises:
        ValueError: no measurement to fit to, or they differ in head dim.
    """
    fitted = [m for m in measurements if not m.held_out]
    if not fitted:
        raise ValueError("expected a measurement that is not held out, found none")
    head_dim = fitted[0].load.head_dim
    if any(m.load.head_dim != head_dim for m in measurements):
        raise ValueError(f"expected measurements of head dim {head_dim} alone, found others")
    dtypes = [d for d in DTYPES if any(d in m.load.items for m in fitted)]
    seconds = np.array([m.seconds for m in fitted])
    wanted = 1 - np.array([m.load.bytes for m in fitted]) / bandwidth / seconds

    def model(numbers: Array) -> DeviceCost:
        overhead, *rest = (float(x) for x in numbers)
        pairs = zip(dtypes, zip(rest[::2], rest[1::2], strict=True), strict=True)
        return DeviceCost(
            device=device,
            source="measured",
            workers=workers,
            head_dim=head_dim,
            overhead=overhead,
            bandwidth=bandwidth,
            kinds={dtype: Kind(item=item, tile=tile) for dtype, (item, tile) in pairs},
            versions=dict(versions or {}),
        )

    best: tuple[float, Array] | None = None
    # So that an item alone costs what a visited tile does: the order of items is that of visits.
    numbers = np.array([0.0, *(1.0, 1.0) * len(dtypes)])
    for _ in range(ROUNDS):
        columns = np.stack([_columns(m.load, dtypes, numbers, workers) for m in fitted])
        solved = nonnegative(columns / seconds[:, None], wanted)
        predicted = np.array([model(solved).seconds(m.load) for m in fitted])
        loss = float(((predicted / seconds - 1) ** 2).sum())
        if best is None or loss < best[0]:
            best = loss, solved
        if np.allclose(solved, numbers, rtol=1e-6, atol=0):
            break
        numbers = solved
    assert best is not None
    found = model(best[1])
    points = tuple(
        Point(
            name=m.name,
            seconds=m.seconds,
            predicted=found.seconds(m.load),
            held_out=m.held_out,
        )
        for m in measurements
    )
    return found.model_copy(update={"points": points})


def _columns(load: Load, dtypes: Sequence[Dtype], numbers: Array, workers: int) -> Array:
    """What a second of (overhead, item, tile, item, tile, ...) adds to a call: of the worker that
    ends last, its items and its visits."""
    found = [1.0]
    for dtype, (item, tile) in zip(dtypes, numbers[1:].reshape(-1, 2), strict=True):
        if dtype not in load.items:
            found += [0.0, 0.0]
            continue
        visits, counts = load.items[dtype]
        if item == tile == 0:
            tile = 1.0
        end = makespan(item + visits * tile, counts, workers)
        step = 1e-6 * (item + tile)
        further = makespan(item + step + visits * tile, counts, workers)
        items = (further - end) / step
        found += [items, (end - item * items) / tile if tile else visits.mean() * items]
    return np.array(found)


def nonnegative(columns: Array, wanted: Array) -> Array:
    """x >= 0 of least |columns x - wanted|: the best that any of the columns do by themselves.

    That is exact: the numbers that are not zero solve the problem of their columns alone. There are
    few columns, so all subsets are tried.
    """
    n = columns.shape[1]
    best, found = float((wanted**2).sum()), np.zeros(n)
    for size in range(1, n + 1):
        for some in itertools.combinations(range(n), size):
            solved, *_ = np.linalg.lstsq(columns[:, some], wanted, rcond=None)
            if (solved < 0).any():
                continue
            loss = float(((columns[:, some] @ solved - wanted) ** 2).sum())
            if loss < best * (1 - 1e-12):
                best, found = loss, np.zeros(n)
                found[list(some)] = solved
    return found


# ---- where nothing was measured


def roofline(properties: Any, head_dim: int) -> DeviceCost:
    """A bound on what a GPU can do, from its properties: an estimate, for comparing modes.

    A visited tile takes the longer of its matrix products and its exponentials at the boost clock,
    and nothing else takes time but bytes.

    Args:
        properties: `torch.cuda.get_device_properties(device)`.

    Raises:
        ValueError: the device has no known rate, or does not say its clocks.
    """
    capability = properties.major, properties.minor
    rate = TENSOR_OPERATIONS.get(capability)
    clock = 1e3 * getattr(properties, "clock_rate", 0)
    memory = 1e3 * getattr(properties, "memory_clock_rate", 0)
    width = getattr(properties, "memory_bus_width", 0) / 8
    if rate is None or not (clock and memory and width):
        lacks = "no known rate of matrix products" if rate is None else "clocks that torch shows"
        raise ValueError(
            f"{properties.name} (compute capability {capability[0]}.{capability[1]}) has "
            f"{lacks}: measure it with `fpsc bench device`"
        )
    dtypes = DTYPES if capability >= FP8_CAPABILITY else DTYPES[:1]
    exponentials = BLOCK * BLOCK / EXPONENTIALS
    products = 4 * BLOCK * BLOCK * head_dim / rate
    return DeviceCost(
        device=properties.name,
        source="estimate",
        workers=properties.multi_processor_count,
        head_dim=head_dim,
        overhead=0.0,
        bandwidth=2 * memory * width,
        kinds={
            dtype: Kind(
                item=0.0,
                tile=max(products / (2 if dtype == "fp8" else 1), exponentials) / clock,
            )
            for dtype in dtypes
        },
    )
