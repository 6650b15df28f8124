"""The table of docs/tiles.md: what the planned tile of a grid costs, beside fixed tiles.

    python bench/tiles.py            # writes docs/tiles.md
    python bench/tiles.py --check    # fails where the page is not what it would write

Nothing is measured: the numbers follow from sizes, and are the same on every machine.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fpsc.grid import TokenGrid, padded_work, plan_tile, spread  # noqa: E402

PAGE = ROOT / "docs" / "tiles.md"
GRIDS = {
    (21, 45, 80): "Wan2.1, 81 frames, 720p",
    (21, 30, 52): "Wan2.1, 81 frames, 480p",
    (33, 45, 80): "HunyuanVideo, 129 frames, 720p",
    (13, 60, 90): "CogVideoX in latent pixels, 49 frames, 480 x 720",
}
RANDOM, SEED = 20, 0
TILES = ((6, 8, 8), (4, 4, 4))
BLOCKS = (128, 256)

TEXT = """\
# Tiles

A tile is a box of tokens (t, y, x) that fills one block of {block} rows of a kernel; rows without a
token are padding, which is multiplied all the same. `tile: auto` takes the tile that minimises

    (tiles x block)^2 x (t + 2r)(y + 2r)(x + 2r),    r = {reach}

over every tile of at most {block} tokens: the work of dense attention with its padding, times
what a tile visits to see r tokens in every direction, so that of two tiles that pad alike the
compact one wins. r is our choice and not measured. Any grid has such a tile; no resolution has to
change.

Two numbers for each tile. **Work** is that of dense attention over padded tiles as a multiple of
the work on the tokens alone: 1 is no padding. **Spread** is what it visits for that reach as a
multiple of what a cube of as many tokens would: 1 is a cube. The planned tile for blocks of {block}
is what fpsc uses; the next column plans for blocks of 256. (6, 8, 8) is the tile of FPSAttention
and of Sliding Tile Attention, (4, 4, 4) that of VSA; their blocks are as large as they are, 384
and 64 rows, so that their work is all ragged edges.

`fpsc policy show` prints these numbers for the policy and grid that it is given.

{table}

The last {random} grids are random (seed {seed}). Written by `python bench/tiles.py`.
"""


def grids() -> dict[tuple[int, int, int], str]:
    """The grids of the page, with what has them."""
    draw = random.Random(SEED)
    sizes = [(draw.randint(1, 40), draw.randint(8, 96), draw.randint(8, 96)) for _ in range(RANDOM)]
    return {**GRIDS, **dict.fromkeys(sizes, "")}


def row(grid: tuple[int, int, int], name: str) -> list[str]:
    cells = ["x".join(map(str, grid)), name, f"{TokenGrid(*grid).tokens:,}"]
    for block in BLOCKS:
        tile = plan_tile(grid, block)
        cells += ["x".join(map(str, tile)), f"{padded_work(grid, tile, block):.2f}"]
        cells.append(f"{spread(tile):.2f}")
    for fixed in TILES:
        size = fixed[0] * fixed[1] * fixed[2]
        cells.append(f"{padded_work(grid, fixed, size):.2f}")
    return cells


def page() -> str:
    from fpsc.grid import BLOCK, REACH

    head = ["grid", "of", "tokens"]
    for block in BLOCKS:
        head += [f"tile, {block}", "work", "spread"]
    head += [f"work of {tile}" for tile in TILES]
    lines = [head, ["---"] * len(head), *(row(*item) for item in grids().items())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return TEXT.format(block=BLOCK, reach=REACH, table=table, random=RANDOM, seed=SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/tiles.md is not what bench/tiles.py writes; run it")


if __name__ == "__main__":
    main()
