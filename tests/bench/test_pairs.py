"""bench/pairs.py counts what a loop over the entries counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import pairs

LISTS = st.lists(st.sets(st.integers(0, 9)).map(sorted), min_size=1, max_size=5)


@given(LISTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_counts(aligned, lists):
    lengths = np.array([len(one) for one in lists])
    tiles = np.array([w for one in lists for w in one], dtype=int)
    served = taken = 0
    for one in lists:
        taken += 2 * -(-len(one) // 2)
        n = 0
        while n < len(one):
            pair = one[n : n + 2] == [one[n], one[n] + 1] and not (aligned and one[n] % 2)
            served += 2 * pair
            n += 1 + pair
    if len(tiles):
        assert pairs.neighbours(lengths, tiles, aligned) == served
    assert pairs.visits_taken(lengths) == taken


def test_the_file_is_what_the_script_finds():
    name, case = min(pairs.CASES.items(), key=lambda item: item[1][1])
    assert pairs.json.loads(pairs.RESULTS.read_text())[name] == pairs.count(*case)
