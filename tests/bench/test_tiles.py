"""docs/tiles.md is what its script writes, and says what is promised of the planner."""

from __future__ import annotations

from pathlib import Path

from bench import tiles
from fpsc.grid import padded_work, plan_tile


def test_the_page_is_what_the_script_writes(checkout: Path) -> None:
    text = (checkout / "docs" / "tiles.md").read_text(encoding="utf-8")
    assert text == tiles.page(), "run python bench/tiles.py"
    assert text.count("x") > 100


def test_the_page_has_the_grids_of_models_and_random_ones() -> None:
    grids = list(tiles.grids())
    assert grids[:4] == [(21, 45, 80), (21, 30, 52), (33, 45, 80), (13, 60, 90)]
    assert len(set(grids)) == 24


def test_the_planned_tile_costs_least() -> None:
    """At 720p hardly more than without padding, and nowhere more than the fixed tiles."""
    assert padded_work((21, 45, 80), plan_tile((21, 45, 80))) <= 1.05
    for grid in tiles.grids():
        planned = padded_work(grid, plan_tile(grid))
        for fixed in tiles.TILES:
            size = fixed[0] * fixed[1] * fixed[2]
            assert planned <= 1.01 * padded_work(grid, fixed, size), (grid, fixed)
