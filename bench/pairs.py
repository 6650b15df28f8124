"""How many key tiles a kernel that takes two at a time takes, under the built-in policies.

    python bench/pairs.py            # prints and writes bench/results/pairs.json
    python bench/pairs.py --check    # fails where the file is not what it would write

Two tiles in one step need not be neighbours: then a list of odd length costs one tile more. A step
that copies 256 neighbouring rows at once would need neighbours; the share of those is beside it.
Nothing is measured: the numbers follow from lists, and are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from fpsc.grid import layout  # noqa: E402
from fpsc.policy import find, plan, resolve  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "pairs.json"
CASES = {
    "Wan2.1-14B, 720p": ("wan-2.1-14b", (21, 45, 80), 0, 0),
    "Wan2.1-1.3B, 480p": ("wan-2.1-1.3b", (21, 30, 52), 0, 0),
    "HunyuanVideo, 720p": ("hunyuan-video", (33, 45, 80), 0, 256),
    "CogVideoX-5B, 480p": ("cogvideox", (13, 30, 45), 226, 0),
}
"""By model: policy, grid, and text tokens before and after."""

Array = NDArray[np.integer[Any]]


def visits_taken(lengths: Array) -> int:
    """Key tiles that are multiplied where two are taken at a time."""
    return int((lengths + lengths % 2).sum())


def neighbours(lengths: Array, tiles: Array, aligned: bool) -> int:
    """Visits that a copy of two neighbouring tiles serves; aligned: of tiles 2j and 2j + 1 alone.

    tiles: those of all lists, ascending in each; lengths: of each.
    """
    last_of_list = np.zeros(len(tiles), dtype=bool)
    last_of_list[lengths[lengths > 0].cumsum() - 1] = True
    followed = ~last_of_list[:-1] & (np.diff(tiles) == 1)
    if aligned:
        return 2 * int((followed & (tiles[:-1] % 2 == 0)).sum())
    edges = np.flatnonzero(~followed)
    runs = np.diff(np.concatenate(([-1], edges, [len(tiles) - 1])))
    return int((runs - runs % 2).sum())


def count(policy_name: str, grid: tuple[int, int, int], before: int, after: int) -> dict[str, Any]:
    """Every list of FP8 cells of a policy, by its share of the tiles."""
    policy = find(policy_name)
    tiles = layout(grid, policy.tile_for(grid), before, after)
    modes = resolve(policy, layers=1, heads=1, fp8=True).modes
    lists = plan(policy, tiles)
    found = {}
    for pattern in sorted({int(p) for p, fp8, _ in modes.tolist() if fp8}):
        ptr = lists.list_ptr[pattern].numpy()
        lengths, idx = np.diff(ptr), lists.list_idx.numpy()[ptr[0] : ptr[-1]]
        found[f"{len(idx) / len(lengths) ** 2:.3f} of all tiles"] = {
            "visits": len(idx),
            "taken_two_at_a_time": round(visits_taken(lengths) / len(idx), 4),
            "with_a_neighbour": round(neighbours(lengths, idx, aligned=False) / len(idx), 4),
            "with_an_aligned_neighbour": round(
                neighbours(lengths, idx, aligned=True) / len(idx), 4
            ),
        }
    return {"policy": policy_name, "grid": list(grid), "tiles": tiles.n_tiles, "lists": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    found = {name: count(*case) for name, case in CASES.items()}
    text = json.dumps(found, indent=2) + "\n"
    if not parser.parse_args().check:
        print(text, end="")
        RESULTS.write_text(text, encoding="utf-8")
    elif RESULTS.read_text(encoding="utf-8") != text:
        sys.exit("bench/results/pairs.json is not what bench/pairs.py writes; run it")


if __name__ == "__main__":
    main()
