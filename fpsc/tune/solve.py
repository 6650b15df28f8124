"""A mode for every cell that minimises a sum under a budget on another sum: a multiple-choice
knapsack, by Lagrangian relaxation.

    minimise    sum values[b, c, x] + sum change[x_b, x_b+1]
    subject to  sum weights[b, c, x] <= limit

over x, a mode for each bin b and chain c (a head of a layer through all bins). For a price on
weight, p >= 0, the cells no longer depend on each other, or only along their chain, where dynamic
programming over the bins is exact:

    q(p) = min over x of  values + change + p * weights,  less  p * limit                       [1]

q(p) is a lower bound of the optimum for every p. The price is found by bisection; at its two sides
are the best choices that just keep and just break the budget, vertices of the cells' lower convex
hulls. From the one that keeps it, single cells are improved greedily until nothing fits [2]. What
is returned states its gap: its own objective less the best bound.

Sources
[1] Fisher, "The Lagrangian relaxation method for solving integer programming problems" (1981).
[2] Sinha and Zoltners, "The multiple-choice knapsack problem" (1979).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

Array = np.ndarray

BISECTIONS = 60
MOST_STEPS = 200
"""Of a search for a price that keeps the budget, each by a factor of four."""


class Infeasible(ValueError):
    """No choice keeps the budget. `least` is the smallest weight that one has."""

    def __init__(self, limit: float, least: float) -> None:
        super().__init__(f"no choice weighs {limit:g} or less; the least is {least:g}")
        self.limit, self.least = limit, least


@dataclass(frozen=True, eq=False)
class Problem:
    """values, weights: float [bins, chains, modes], not negative. change: [modes, modes], what it
    costs to go from a mode to another in the next cleaner bin, inf where that is not allowed; from
    a mode to itself nothing."""

    values: Array
    weights: Array
    limit: float
    change: Array

    @cached_property
    def by_weight(self) -> Array:
        """The modes of every cell, the lightest first."""
        order: Array = np.argsort(self.weights, axis=-1, kind="stable")
        return order

    @property
    def coupled(self) -> bool:
        """Whether the bins of a chain depend on each other."""
        return bool(self.change.any())


@dataclass(frozen=True, eq=False)
class Solution:
    """choice: int [bins, chains]. value with `change` in it; bound: no choice that keeps the budget
    has less value."""

    choice: Array
    value: float
    weight: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the best it may be, in the unit of value."""
        return max(self.value - self.bound, 0.0)


def free(modes: int) -> Array:
    """The `change` of bins that do not depend on each other."""
    return np.zeros((modes, modes))


def falling(keep: Array, penalty: float = 0.0, monotone: bool = True) -> Array:
    """A `change` that costs `penalty` for another mode, and with `monotone` allows none that keeps
    more at less noise."""
    change = np.where(np.eye(len(keep), dtype=bool), 0.0, penalty)
    if monotone:
        change[keep[None, :] > keep[:, None] + 1e-9] = np.inf
    return change


def solve(problem: Problem) -> Solution:
    """The best choice that was found, and how good the best can be.

    Raises:
        Infeasible: none keeps the budget.
    """
    hard = replace(problem, change=np.where(np.isinf(problem.change), np.inf, 0.0))
    lightest = _relaxed(hard, np.zeros_like(problem.values), problem.weights)
    least = _total(problem.weights, lightest)
    slack = 1e-12 * max(abs(problem.limit), least, 1e-300)
    if least > problem.limit + slack:
        raise Infeasible(problem.limit, least)
    best, bound = lightest, -np.inf

    def keeps(price: float) -> bool:
        nonlocal best, bound
        choice = _relaxed(problem, problem.values, price * problem.weights)
        value, weight = _value(problem, choice), _total(problem.weights, choice)
        bound = max(bound, float(value + price * (weight - problem.limit)))
        if weight <= problem.limit + slack and value < _value(problem, best):
            best = choice
        return weight <= problem.limit + slack

    if not keeps(0.0):
        spans = [float(np.ptp(x, axis=-1).mean()) for x in (problem.values, problem.weights)]
        close_in(keeps, max(spans[0], 1e-300) / max(spans[1], 1e-300), BISECTIONS)
    best = _filled(problem, best, slack)
    value = _value(problem, best)
    # A bound above what was found is rounding.
    return Solution(best, value, _total(problem.weights, best), min(bound, value))


def close_in(keeps: Callable[[float], bool], start: float, bisections: int) -> None:
    """Tries prices that close in on the lowest one that keeps the budget; `keeps` remembers what it
    wants of each.

    start: the first price; 0 does not keep it.
    """
    low = high = start
    if keeps(start):
        for _ in range(MOST_STEPS):
            low = high / 4
            if not keeps(low):
                break
            high = low
    else:
        for _ in range(MOST_STEPS):
            low, high = high, 4 * high
            if keeps(high):
                break
    for _ in range(bisections):
        middle = (low * high) ** 0.5
        if keeps(middle):
            high = middle
        else:
            low = middle


def _relaxed(problem: Problem, values: Array, priced: Array) -> Array:
    """The choice that minimises values + priced + change, exactly; of equal ones the lightest."""
    scores = values + priced
    if not problem.coupled:
        order = problem.by_weight
        at = np.take_along_axis(scores, order, axis=-1).argmin(axis=-1)
        found: Array = np.take_along_axis(order, at[..., None], axis=-1)[..., 0]
        return found
    n, chains, modes = scores.shape
    came = np.zeros((n, chains, modes), np.int64)
    best = scores[0]
    for b in range(1, n):
        arriving = best[:, :, None] + problem.change  # [chains, from, to]
        came[b] = arriving.argmin(axis=1)
        best = np.take_along_axis(arriving, came[b][:, None], axis=1)[:, 0] + scores[b]
    choice = np.zeros((n, chains), np.int64)
    choice[-1] = best.argmin(axis=-1)
    for b in range(n - 1, 0, -1):
        choice[b - 1] = np.take_along_axis(came[b], choice[b][:, None], axis=1)[:, 0]
    return choice


def _filled(problem: Problem, choice: Array, slack: float) -> Array:
    """Spends what is left of the budget: cell by cell, the most value for the weight first."""
    choice = choice.copy()
    left = problem.limit + slack - _total(problem.weights, choice)
    now_weight = np.take_along_axis(problem.weights, choice[..., None], -1)
    now_value = np.take_along_axis(problem.values, choice[..., None], -1)
    for _ in range(4 * choice.size):
        gain = now_value - problem.values
        if problem.coupled:
            gain -= _changes(problem, choice)
        more = problem.weights - now_weight
        possible = (gain > 1e-15 * np.abs(now_value)) & (gain > 0) & (more <= left)
        if not possible.any():
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(more <= 0, np.inf, gain / more)
        # Of what costs nothing, the largest gain.
        rank = np.where(possible, rate, -np.inf)
        top = rank.max()
        ties = np.where(rank == top, gain, -np.inf)
        b, c, m = np.unravel_index(ties.argmax(), ties.shape)
        left -= more[b, c, m]
        choice[b, c] = m
        now_weight[b, c], now_value[b, c] = problem.weights[b, c, m], problem.values[b, c, m]
    return choice


def _changes(problem: Problem, choice: Array) -> Array:
    """[bins, chains, modes]: what each mode would add to the change along its chain."""
    found = np.zeros(problem.values.shape)
    change = problem.change
    found[1:] += change[choice[:-1]]  # from the noisier neighbour
    found[:-1] += change.T[choice[1:]]
    return found - np.take_along_axis(found, choice[..., None], -1)


def _value(problem: Problem, choice: Array) -> float:
    between = problem.change[choice[:-1], choice[1:]].sum() if problem.coupled else 0.0
    return _total(problem.values, choice) + float(between)


def _total(x: Array, choice: Array) -> float:
    return float(np.take_along_axis(x, choice[..., None], -1).sum())
