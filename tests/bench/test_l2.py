"""The simulation of the cache against small cases that are known, and what was committed of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import l2
from bench.l2 import Case, Sizes, simulate

ONE = Sizes(cache=4, keys=1, queries=0, out=0)


def test_a_cache_forgets_what_was_least_recently_used() -> None:
    cache = l2.Cache(3)
    assert [cache.touch(key, 1) for key in (1, 2, 3, 1, 4, 1, 2)] == [
        False, False, False, True, False, True, False,
    ]  # fmt: skip
    assert not cache.touch(5, 3) and not cache.touch(1, 1), "what is large takes the place of many"


def test_tiles_that_fit_come_from_memory_once() -> None:
    lists = [[0, 1, 2, 3]] * 4
    in_turn = [(head, tile) for head in range(3) for tile in range(4)]
    assert simulate(in_turn, lists, ONE, workers=2) == (12, 24)
    mixed = [(head, tile) for tile in range(4) for head in range(3)]
    assert simulate(mixed, lists, ONE, workers=2)[0] > 12
    # Two workers at the same key in the same tick: it comes once.
    assert simulate([(0, 0), (0, 1)], lists, Sizes(1, 1, 0, 0), workers=2) == (4, 4)


def test_every_nth_item_or_the_next_when_free() -> None:
    lists = [[0] * 6, [0], [0], [0]]
    items = [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert simulate(items, lists, ONE, workers=2)[1] == 7  # 6 + 1 and 1 + 1
    assert simulate(items, lists, ONE, workers=2, free=True)[1] == 6
    assert l2.shares(np.array([6, 1, 1, 1]), 2) == pytest.approx(7 / 4.5)


@pytest.mark.parametrize("name", l2.ORDERS)
def test_an_order_has_every_item_once(name: str) -> None:
    case = Case("small", (4, 20, 24), 3, 0.2, True, text=5)
    items = list(l2.ORDERS[name](case))
    assert sorted(items) == [(h, t) for h in range(3) for t in range(len(case.lists))]


def test_what_is_committed_says_what_the_page_says(checkout: Path) -> None:
    """The numbers of the page are tables of the file (test_tables.py); this is what it says."""
    record = json.loads((checkout / "bench" / "results" / "l2.json").read_text(encoding="utf-8"))
    assert record["kind"] == "simulation, not a measurement"
    assert [case["name"] for case in record["cases"]] == [case.name for case in l2.CASES]
    for case in record["cases"]:
        orders = case["orders"]
        ours, rows = orders["head by head, in a sweep"], orders["head by head, in rows"]
        if not case["text"]:
            assert len({each["every n-th"]["time"] for each in orders.values()}) == 1
            traffic = {name: each["every n-th"]["traffic"] for name, each in orders.items()}
            assert traffic["head by head, in a sweep"] <= min(traffic.values()) + 0.01
            continue
        last, first = (orders[f"all heads, long lists {end}"] for end in ("last", "first"))
        assert last["every n-th"]["time"] <= ours["every n-th"]["time"] + 1e-3
        assert last["every n-th"]["traffic"] <= first["every n-th"]["traffic"]
        assert ours["every n-th"]["traffic"] <= rows["every n-th"]["traffic"]
    balance = record["balance"]
    assert balance == l2.balance()
    worst = [found["worst"] for found in balance.values() if isinstance(found, dict)]
    assert worst == sorted(worst, reverse=True) and worst[0] > 5 and worst[-1] < 1.5
