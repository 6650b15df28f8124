"""Which order of the work leaves K and V in the L2 cache, and all multiprocessors at work.

    python bench/l2.py            # writes bench/results/l2.json; about three minutes
    python bench/readme.py        # and from it the tables of docs/kernels.md

A simulation: nothing is measured. The model of a device: multiprocessors that take items (a query
tile of a head) and visit a key tile a tick; one L2 cache that forgets what was least recently used,
of the size of the device's, or of half of it, as if each half kept copies of its own. What it holds
are tiles: K and V of a key tile, Q and the output of a query tile. Time is that of the last
multiprocessor in ticks: waits for memory are not in it, and traffic is how long these may be.

Items are taken either every n-th, whatever they cost, as the persistent kernels do, or each when
one is free, as a GPU does with programs that are not persistent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fpsc.bench.markdown import markdown  # noqa: E402
from fpsc.files import replacing  # noqa: E402
from fpsc.grid import BLOCK, Layout, TokenGrid, layout, plan_tile, tile_grid  # noqa: E402
from fpsc.kernels.triton.configs import programs  # noqa: E402
from fpsc.policy.patterns import Pattern, lists  # noqa: E402
from fpsc.policy.resolve import work_order  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "l2.json"
MULTIPROCESSORS, L2_MIB = 132, 50
"""Of an H100 and an H200."""
HEAD_DIM = 128
SEED = 0

Item = tuple[int, int]  # head, tile


@dataclass(frozen=True)
class Case:
    """One layer: a grid with text behind it, one keep in all heads, FP8 or 16 bits."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    keep: float
    fp8: bool
    text: int = 0
    l2_mib: int = L2_MIB

    @cached_property
    def layout(self) -> Layout:
        return layout(self.grid, plan_tile(self.grid), suffix=self.text)

    @cached_property
    def csr(self) -> tuple[np.ndarray, np.ndarray]:
        ptr, idx = lists(Pattern("near", self.keep), self.layout)
        return ptr.numpy(), idx.numpy()

    @cached_property
    def lists(self) -> list[list[int]]:
        """The key tiles that each query tile sees."""
        ptr, idx = (x.tolist() for x in self.csr)
        return [idx[a:b] for a, b in pairwise(ptr)]

    @cached_property
    def order(self) -> list[int]:
        """The tiles as a plan has them: long lists first, then a sweep."""
        found: list[int] = work_order(*self.csr, self.layout).tolist()
        return found


WAN, LONG, HUNYUAN, COG = (21, 45, 80), (41, 45, 80), (33, 45, 80), (13, 30, 45)
CASES = (
    Case("Wan2.1-14B 720p, fp8, keep 0.1", WAN, 40, 0.1, True),
    Case("Wan2.1-14B 720p, fp8, keep 0.25", WAN, 40, 0.25, True),
    Case("Wan2.1-14B 720p, fp8, keep 0.25, half the cache", WAN, 40, 0.25, True, l2_mib=25),
    Case("Wan2.1-14B 720p, bf16, keep 0.1", WAN, 40, 0.1, False),
    Case("Wan2.1-14B 720p, bf16, keep 0.25", WAN, 40, 0.25, False),
    Case("twice the frames, bf16, keep 0.1", LONG, 8, 0.1, False),
    Case("HunyuanVideo 720p without text, bf16, keep 0.25", HUNYUAN, 8, 0.25, False),
    Case("HunyuanVideo 720p with text, fp8, keep 0.1", HUNYUAN, 24, 0.1, True, text=256),
    Case("CogVideoX-5B with text, fp8, keep 0.25", COG, 48, 0.25, True, text=226),
)


# ---- orders of the work


def tile_by_tile(case: Case) -> Iterator[Item]:
    """All heads of a tile, then the next tile."""
    return ((head, tile) for tile in case.order for head in range(case.heads))


def at_random(case: Case) -> Iterator[Item]:
    """Head by head, the tiles of a head at random."""
    draw = np.random.default_rng(SEED)
    tiles = len(case.lists)
    return ((h, int(t)) for h in range(case.heads) for t in draw.permutation(tiles))


def in_rows(case: Case) -> Iterator[Item]:
    """Head by head; long lists first, then the raster of tiles."""
    rows = sorted(range(len(case.lists)), key=lambda tile: -_bits(case, tile))
    return ((head, tile) for head in range(case.heads) for tile in rows)


def in_boxes(case: Case) -> Iterator[Item]:
    """Head by head; long lists first, then along a Z-order curve."""
    grid, video = case.layout.tile_grid, case.layout.video_tiles
    code = np.zeros(grid, np.int64)
    for bit, (place, axis) in product(range(8), enumerate(reversed(np.indices(grid)))):
        code |= ((axis >> bit) & 1) << (3 * bit + place)
    rank = dict(zip(video, code.ravel().tolist(), strict=True))
    tiles = sorted(case.order, key=lambda tile: (-_bits(case, tile), rank.get(tile, -1)))
    return ((head, tile) for head in range(case.heads) for tile in tiles)


def in_a_sweep(case: Case) -> Iterator[Item]:
    """Head by head; long lists first, then as `work_order` has it: what Triton's kernel does."""
    return ((head, tile) for head in range(case.heads) for tile in case.order)


def long_first(case: Case) -> Iterator[Item]:
    """The long lists of all heads, then the shorter ones, each class head by head in a sweep."""
    for bits in sorted({_bits(case, tile) for tile in case.order}, reverse=True):
        of_class = [tile for tile in case.order if _bits(case, tile) == bits]
        yield from ((head, tile) for head in range(case.heads) for tile in of_class)


def long_last(case: Case) -> Iterator[Item]:
    """The same backwards: what the Gluon kernel does (`schedule.list_work`)."""
    return reversed(list(long_first(case)))


ORDERS: dict[str, Callable[[Case], Iterator[Item]]] = {
    "tile by tile": tile_by_tile,
    "head by head, at random": at_random,
    "head by head, in rows": in_rows,
    "head by head, in boxes": in_boxes,
    "head by head, in a sweep": in_a_sweep,
    "all heads, long lists first": long_first,
    "all heads, long lists last": long_last,
}


def _bits(case: Case, tile: int) -> int:
    return len(case.lists[tile]).bit_length()


# ---- the simulation


class Cache:
    """What was least recently used goes first. Keys are tiles of any kind; sizes in bytes."""

    def __init__(self, size: int) -> None:
        self.free = size
        self._held: OrderedDict[int, int] = OrderedDict()

    def touch(self, key: int, size: int) -> bool:
        """Whether it was there; now it is."""
        held = self._held
        if key in held:
            held.move_to_end(key)
            return True
        held[key] = size
        self.free -= size
        while self.free < 0:
            self.free += held.popitem(last=False)[1]
        return False


@dataclass(frozen=True)
class Sizes:
    """Bytes of the cache, of K and V of a tile, and of Q and the output of one."""

    cache: int
    keys: int
    queries: int
    out: int


def simulate(
    items: Sequence[Item],
    lists: Sequence[Sequence[int]],
    sizes: Sizes,
    *,
    workers: int = MULTIPROCESSORS,
    free: bool = False,
) -> tuple[int, int]:
    """(key tiles from memory, ticks until the last worker is done).

    free: a worker takes the next item when it is free; else the items w, w + workers, ...
    """
    n, cache, misses = len(lists), Cache(sizes.cache), 0
    place, step = list(range(workers)), [0] * workers
    running = [w for w in range(workers) if w < len(items)]
    ticks, taken = 0, workers
    while running:
        done = []
        for w in running:
            head, tile = items[place[w]]
            keys, first = lists[tile], 3 * n * head
            if step[w] == 0:
                cache.touch(first + n + tile, sizes.queries)
            misses += not cache.touch(first + keys[step[w]], sizes.keys)
            step[w] += 1
            if step[w] == len(keys):
                cache.touch(first + 2 * n + tile, sizes.out)
                step[w] = 0
                place[w] = taken if free else place[w] + workers
                taken += 1
                if place[w] >= len(items):
                    done.append(w)
        for w in done:
            running.remove(w)
        ticks += 1
    return misses, ticks


def run(case: Case) -> dict[str, Any]:
    """Every order: K and V from memory as a multiple of all of them once, and time as a multiple of
    what it is where all multiprocessors end together."""
    element, row = 1 if case.fp8 else 2, BLOCK * HEAD_DIM
    sizes = Sizes(case.l2_mib * 2**20, 2 * row * element, row * element, 2 * row)
    tiles, visits = len(case.lists), sum(map(len, case.lists))
    orders: dict[str, Any] = {}
    for name, order in ORDERS.items():
        items = list(order(case))
        orders[name] = {}
        # Without text all items are equally long, and both ways are one.
        for way, free in (("every n-th", False), ("when free", True))[: 1 + bool(case.text)]:
            misses, ticks = simulate(items, case.lists, sizes, free=free)
            orders[name][way] = {
                "traffic": round(misses / (case.heads * tiles), 3),
                "gigabytes": round(misses * sizes.keys / 1e9, 2),
                "time": round(ticks * MULTIPROCESSORS / (case.heads * visits), 4),
            }
        print(f"{case.name}: {name}: {orders[name]}", flush=True)
    return {
        **asdict(case),
        "tokens": case.layout.tokens,
        "tiles": tiles,
        "megabytes_of_a_head": round(tiles * sizes.keys / 1e6, 1),
        "orders": orders,
    }


# ---- how even the shares are


TEXTS, FRAMES = (226, 256, 512), range(4, 34)
PICTURES = ((30, 45), (30, 52), (45, 80), (34, 60), (48, 84), (68, 120))


def shares(lengths: np.ndarray, workers: int = MULTIPROCESSORS) -> float:
    """The largest share of who takes every n-th item, as a multiple of the mean."""
    padded = np.zeros(-(-len(lengths) // workers) * workers, np.int64)
    padded[: len(lengths)] = lengths
    of_each = padded.reshape(-1, workers).sum(axis=0)
    return float(of_each.max() / of_each.mean())


def balance(heads: int = 24, keep: float = 0.1) -> dict[str, Any]:
    """The longest time where every n-th item is taken, over many grids with text."""
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (y, x), t, text in product(PICTURES, FRAMES, TEXTS):
        grid = TokenGrid(t, y, x)
        video, own = tile_grid(grid, plan_tile(grid)).tokens, -(-text // BLOCK)
        seen = max(1, round(keep * video)) + own
        one = np.array([video + own] * own + [seen] * video)
        name = f"{t}x{y}x{x} with {text}"
        by_head, fewer = np.tile(one, heads), programs(MULTIPROCESSORS, len(one))
        found["head by head"].append((shares(by_head), name))
        # Fewer programs have more to do each: beside the mean of all multiprocessors.
        share = shares(by_head, fewer) * MULTIPROCESSORS / fewer
        found["head by head, programs by `configs.programs`"].append((share, name))
        found["all heads, by length"].append((shares(np.sort(by_head)), name))
    return {
        "heads": heads,
        "keep": keep,
        "grids": len(found["head by head"]),
        **{
            name: {
                "median": round(statistics.median(x for x, _ in times), 3),
                "worst": round(max(times)[0], 3),
                "of": max(times)[1],
            }
            for name, times in found.items()
        },
    }


# ---- tables


def traffic_table(record: dict[str, Any]) -> str:
    """K and V from memory, a row for each case without text."""
    names = list(ORDERS)[:5]
    rows = []
    for case in record["cases"]:
        if not case["text"]:
            found = (case["orders"][name]["every n-th"] for name in names)
            cells = [f"{x['traffic']:.2f} ({x['gigabytes']:.1f} GB)" for x in found]
            rows.append((case["name"], f"{case['megabytes_of_a_head']:.0f} MB", *cells))
    return markdown(("layer", "K and V of a head", *names), rows)


def text_table(record: dict[str, Any]) -> str:
    """Traffic and time of the orders where text is a part of the sequence."""
    rows = []
    for case in record["cases"]:
        for name in list(ORDERS)[4:]:
            ways = case["orders"][name]
            if case["text"]:
                cells = [f"{x['traffic']:.2f}, {x['time']:.3f}" for x in ways.values()]
                rows.append((case["name"], name, *cells))
    return markdown(("layer", "order", "every n-th item", "next item when free"), rows)


def balance_table(record: dict[str, Any]) -> str:
    found = record["balance"]
    rows = [
        (name, f"{x['median']:.2f}", f"{x['worst']:.2f}", x["of"])
        for name, x in found.items()
        if isinstance(x, dict)
    ]
    return markdown(("order", "median", "worst", "which is"), rows)


PARTS: dict[str, Callable[[Path], str]] = {
    name: lambda path, table=table: table(json.loads(path.read_text(encoding="utf-8")))  # type: ignore[misc]
    for name, table in (
        ("traffic", traffic_table),
        ("text", text_table),
        ("balance", balance_table),
    )
}
"""The tables of docs/kernels.md, by their name behind the file's (`bench.readme`)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--balance", action="store_true", help="only the shares, in seconds")
    if parser.parse_args().balance:
        record = json.loads(RESULTS.read_text(encoding="utf-8")) | {"balance": balance()}
        write(record)
        return
    record = {
        "command": "python bench/l2.py",
        "kind": "simulation, not a measurement",
        "multiprocessors": MULTIPROCESSORS,
        "l2_mib": L2_MIB,
        "head_dim": HEAD_DIM,
        "balance": balance(),
        "cases": [run(case) for case in CASES],
    }
    write(record)


def write(record: dict[str, Any]) -> None:
    with replacing(RESULTS) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
