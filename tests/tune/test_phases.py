"""Phases of a few lines: within the budget, and exact where a table is that simple."""

from __future__ import annotations

import numpy as np
import pytest

from fpsc.tune import phases
from fpsc.tune.solve import Infeasible


def cells(target: np.ndarray, modes: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that are zero where a cell has its target mode, else one; all weigh the same."""
    values = (np.arange(modes) != target[..., None]).astype(float)
    return values, np.ones_like(values)


def test_a_table_of_phases_and_rules_is_found_exactly() -> None:
    target = np.zeros((4, 6, 5), int)
    target[2:] = 1
    target[1:3, [0, 4, 5]] = 2  # layers
    target[:, :, 3] = 3  # a head in all layers
    target[3, 2, [0, 1]] = 0  # heads of one layer
    values, weights = cells(target, 4)
    found = phases.fit(values, weights, float(target.size), lines=8)
    assert (found.choice == target).all() and found.value == 0
    assert found.base[0] == 0 and found.base[3] == 1
    assert len(found.rules) <= 5


@pytest.mark.parametrize("lines", [0, 1, 3, 12])
def test_the_budget_is_kept_and_lines_help(lines: int) -> None:
    rng = np.random.default_rng(1)
    keep = np.array([1, 0.5, 0.25, 0.125])
    matters = rng.exponential(1, (3, 6, 4, 1)) * rng.exponential(1, (1, 6, 1, 1))
    values = matters * (1 - keep) ** 2
    weights = np.broadcast_to(keep / values[..., 0].size, values.shape)
    found = phases.fit(values, weights, 0.3, lines)
    assert found.weight <= 0.3 + 1e-6 and len(found.rules) <= lines
    bare = phases.fit(values, weights, 0.3, 0)
    assert found.value <= 1.05 * bare.value
    assert lines < 12 or found.value < 0.9 * bare.value


def test_rules_say_what_the_choice_is() -> None:
    rng = np.random.default_rng(2)
    values = rng.random((3, 4, 3, 4))
    found = phases.fit(values, np.ones_like(values), 1e9, 6)
    again = np.broadcast_to(np.array(found.base)[:, None, None], (3, 4, 3)).copy()
    for rule in found.rules:
        layers = range(4) if rule.layers is None else rule.layers
        heads = range(3) if rule.heads is None else rule.heads
        again[np.ix_(range(rule.first, rule.last + 1), layers, heads)] = rule.mode
    assert (again == found.choice).all()


def test_no_phases_within_an_impossible_budget() -> None:
    values = np.zeros((1, 1, 1, 2))
    with pytest.raises(Infeasible):
        phases.fit(values, values + 1, 0.5, 3)
