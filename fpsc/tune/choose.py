"""From a calibration and a budget to a choice of modes, and to phases that are close to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fpsc.errors import UserError
from fpsc.tune import phases, predict, solve
from fpsc.tune.budget import Budget, dense_seconds, limit_of, unit_costs
from fpsc.tune.phases import Phases
from fpsc.tune.predict import Prediction
from fpsc.tune.record import Calibration
from fpsc.tune.solve import Problem

Array = np.ndarray

FRONT = 8
"""Budgets of a Pareto set."""


@dataclass(frozen=True)
class Wishes:
    """What the user asks of a solution beside its budget.

    Attributes:
        monotone: no head keeps more at less noise.
        smooth: what another mode in the next bin must save, as a part of what the mean cell can
            lose or cost; 0 asks nothing.
        lines: rules of the simplified policy, at most.
    """

    monotone: bool = False
    smooth: float = 0.0
    lines: int = 8


@dataclass(frozen=True, eq=False)
class Chosen:
    """The solution of a budget.

    Attributes:
        choice: int [bins, layers, heads].
        gap: how much lower the least possible predicted error is at most, as a part of this one's;
            where the error is the budget, the same of the attention's cost.
        simple: phases of a few lines under the same budget; None where none keep it.
    """

    budget: Budget
    choice: Array
    predicted: Prediction
    gap: float
    simple: Phases | None
    simple_predicted: Prediction | None


NOTHING = Wishes()


def choose(calibration: Calibration, budget: Budget, wishes: Wishes = NOTHING) -> Chosen:
    """Solve a calibration for a budget.

    Raises:
        UserError: no choice keeps the budget; names the nearest one that can be kept.
    """
    values, weights = _sums(calibration, budget)
    limit = limit_of(calibration, budget)
    n, layers, heads, modes = values.shape
    unit = float(np.ptp(values, axis=-1).mean())
    change = solve.falling(np.array(calibration.run.keep), wishes.smooth * unit, wishes.monotone)
    problem = Problem(
        values.reshape(n, layers * heads, modes),
        weights.reshape(n, layers * heads, modes),
        limit,
        change,
    )
    try:
        solution = solve.solve(problem)
    except solve.Infeasible as error:
        raise UserError(_nearest(calibration, budget, error.least)) from None
    choice = solution.choice.reshape(n, layers, heads)
    try:
        simple = phases.fit(values, weights, limit, wishes.lines)
    except solve.Infeasible:
        simple = None
    gap = solution.gap / solution.value if solution.value > 0 else 0.0
    if budget.kind != "error":  # values are squares of errors
        gap = 1 - max(1 - gap, 0.0) ** 0.5
    return Chosen(
        budget=budget,
        choice=choice,
        predicted=predict.of_choice(calibration, choice),
        gap=gap,
        simple=simple,
        simple_predicted=simple and predict.of_choice(calibration, simple.choice),
    )


def front(calibration: Calibration, wishes: Wishes = NOTHING, n: int = FRONT) -> list[Chosen]:
    """Solutions from the lowest keep to the dense run, evenly spaced by ratio."""
    low = min(calibration.run.keep)
    found = []
    for keep in np.geomspace(low, 1.0, n + 2)[1:-1]:
        found.append(choose(calibration, Budget("keep", float(f"{keep:.2g}")), wishes))
    return found


def uniform(calibration: Calibration, mode: int) -> Array:
    """The choice that has one mode everywhere."""
    run = calibration.run
    return np.full((run.bins, run.layers, run.heads), mode)


def best_uniform(calibration: Calibration, budget: Budget) -> int | None:
    """The one mode for all cells that keeps a budget at the least predicted error (or cost)."""
    values, weights = (x.sum(axis=(0, 1, 2)) for x in _sums(calibration, budget))
    fits = weights <= limit_of(calibration, budget) + 1e-9
    return int(np.where(fits, values, np.inf).argmin()) if fits.any() else None


def _sums(calibration: Calibration, budget: Budget) -> tuple[Array, Array]:
    """(what is minimised, what is limited): [bins, layers, heads, modes]."""
    loss = calibration.loss
    costs, _ = unit_costs(calibration, budget.kind)
    cost = np.broadcast_to(costs[:, None, None], loss.shape)
    return (cost, loss) if budget.kind == "error" else (loss, cost)


def _nearest(calibration: Calibration, budget: Budget, least: float) -> str:
    """Why a budget cannot be kept, and which can."""
    if budget.kind == "error":
        value = least**0.5
    else:
        value = least + unit_costs(calibration, budget.kind)[1]
        if budget.seconds:
            value *= dense_seconds(calibration, budget.kind)
    # Rounded up, so that what is named can be kept.
    digits = 3 - int(np.floor(np.log10(max(value, 1e-12)))) - 1
    value = float(np.ceil(value * 10**digits) / 10**digits)
    near = Budget(budget.kind, value, budget.seconds)
    return (
        f"--budget {budget} cannot be kept: the cheapest modes that were measured come to "
        f"{value:g}{'s' if budget.seconds else ''}; the nearest that can be is --budget {near}"
    )
