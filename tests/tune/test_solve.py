"""The knapsack against every choice there is, on small instances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsc.tune import solve
from fpsc.tune.solve import Infeasible, Problem


def exhaustive(problem: Problem) -> tuple[float, float]:
    """(least value of a choice that keeps the budget, least weight); inf where none does."""
    n, chains, modes = problem.values.shape
    best = least = np.inf
    for flat in itertools.product(range(modes), repeat=n * chains):
        choice = np.array(flat).reshape(n, chains)
        value = np.take_along_axis(problem.values, choice[..., None], -1).sum()
        weight = np.take_along_axis(problem.weights, choice[..., None], -1).sum()
        value += problem.change[choice[:-1], choice[1:]].sum()
        if np.isinf(value):
            continue
        least = min(least, weight)
        if weight <= problem.limit:
            best = min(best, value)
    return float(best), float(least)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n, chains, modes = draw(
        st.sampled_from([(1, 4, 4), (2, 2, 4), (3, 2, 3), (4, 1, 4), (1, 1, 3)])
    )
    number = st.one_of(st.integers(0, 8).map(float), st.floats(0, 10, width=32))
    cells = n * chains * modes
    values = np.array(draw(st.lists(number, min_size=cells, max_size=cells)))
    weights = np.array(draw(st.lists(number, min_size=modes, max_size=modes)))
    if draw(st.booleans()):
        per_bin = np.array(draw(st.lists(number, min_size=n, max_size=n))) + 0.125
        all_weights = np.broadcast_to(per_bin[:, None, None] * weights, (n, chains, modes))
    else:
        drawn = draw(st.lists(number, min_size=cells, max_size=cells))
        all_weights = np.array(drawn).reshape(n, chains, modes)
    change = solve.free(modes)
    if draw(st.booleans()):
        penalty = draw(st.sampled_from([0.0, 0.5, 3.0]))
        change = solve.falling(weights, penalty, monotone=draw(st.booleans()))
    low, high = all_weights.min(-1).sum(), all_weights.max(-1).sum()
    limit = float(low + draw(st.floats(-0.1, 1.1)) * (high - low))
    return Problem(values.reshape(n, chains, modes), all_weights, limit, change)


@settings(max_examples=200)
@given(problems())
def test_within_the_stated_gap_of_the_best(problem: Problem) -> None:
    best, least = exhaustive(problem)
    tolerance = 1e-9 * max(1.0, abs(problem.limit))
    try:
        found = solve.solve(problem)
    except Infeasible as error:
        assert least > problem.limit
        assert error.least == pytest.approx(least)
        return
    weight = np.take_along_axis(problem.weights, found.choice[..., None], -1).sum()
    value = np.take_along_axis(problem.values, found.choice[..., None], -1).sum()
    value += problem.change[found.choice[:-1], found.choice[1:]].sum()
    assert weight <= problem.limit + tolerance and found.weight == pytest.approx(weight)
    assert found.value == pytest.approx(value)
    if np.isinf(best):  # kept by a rounding error alone
        assert weight > problem.limit
        return
    assert found.bound <= best + 1e-9 * max(1.0, best)
    assert found.value - best <= found.gap + 1e-9 * max(1.0, best)


@settings(max_examples=100)
@given(problems())
def test_the_gap_is_no_more_than_one_step_of_one_chain(problem: Problem) -> None:
    """A bound of the method, without which any gap would pass: only one chain is fractional."""
    try:
        found = solve.solve(problem)
    except Infeasible:
        return
    finite = np.where(np.isinf(problem.change), 0, problem.change).max()
    bins = len(problem.values) if problem.coupled else 1
    assert found.gap <= bins * (np.ptp(problem.values, axis=-1).max() + finite) + 1e-6


def test_many_cells_come_close() -> None:
    """As many cells as a large model has: the gap is next to nothing."""
    rng = np.random.default_rng(0)
    keep = np.array([1, 0.75, 0.5, 0.25, 0.125])
    values = rng.exponential(1, (5, 1600, 1)) * (1 - keep) ** 2
    weights = np.broadcast_to(keep / values[..., 0].size, values.shape)
    found = solve.solve(Problem(values, weights, 0.3, solve.free(5)))
    assert found.weight <= 0.3 + 1e-9 and found.gap < 1e-3 * found.value
    falling = solve.solve(Problem(values, weights, 0.3, solve.falling(keep)))
    kept = keep[falling.choice]
    assert (np.diff(kept, axis=0) <= 0).all()
    assert found.value <= falling.value and falling.gap < 0.01 * falling.value


def test_a_loose_budget_is_solved_exactly_and_lightly() -> None:
    """Of choices that lose equally little the lightest is taken."""
    values, weights = np.array([[[0.0, 0.0, 5.0]]]), np.array([[[3.0, 2.0, 1.0]]])
    found = solve.solve(Problem(values, weights, 10.0, solve.free(3)))
    assert found.choice.item() == 1 and found.gap == 0


def test_smoothness_leaves_out_changes_that_save_little() -> None:
    values = np.array([[[0.0, 1.0]], [[1.0, 0.9]], [[0.0, 1.0]]])
    weights = np.zeros_like(values)
    rough = solve.solve(Problem(values, weights, 0.0, solve.free(2)))
    smooth = solve.solve(Problem(values, weights, 0.0, solve.falling(np.ones(2), 0.2, False)))
    assert rough.choice[:, 0].tolist() == [0, 1, 0]
    assert smooth.choice[:, 0].tolist() == [0, 0, 0]
