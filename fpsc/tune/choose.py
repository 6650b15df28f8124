"""From a calibration and a budget to a choice of modes, and to phases that are close to it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from fpsc.errors import UserError
from fpsc.tune import phases, predict, solve
from fpsc.tune.budget import Budget, check, dense_seconds, limit_of, unit_costs
from fpsc.tune.phases import Phases
from fpsc.tune.predict import Prediction
from fpsc.tune.record import Calibration
from fpsc.tune.solve import Problem

Array = np.ndarray

FRONT = 8
"""Budgets of a Pareto set."""

ROUNDS = 4


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
        gap: how much lower the least possible predicted error is at most, as a part of this one's,
            with errors counting what they count here; where the error is the budget, the same of
            the attention's cost.
        simple: phases of a few lines under the same budget; None where none keep it.
    """

    budget: Budget
    choice: Array
    predicted: Prediction
    gap: float
    simple: Phases | None
    simple_predicted: Prediction | None


NOTHING = Wishes()


def choose(
    calibration: Calibration, budget: Budget, wishes: Wishes = NOTHING, *, simplify: bool = True
) -> Chosen:
    """Solve a calibration for a budget.

    What an error in a bin counts depends on how large it is, so the problem is solved again with
    what the last choice makes of it, and the best of some rounds is taken. Where the error is the
    budget, the largest that it can count is taken.

    simplify: whether to fit phases too.

    Raises:
        UserError: no choice keeps the budget; names the nearest one that can be kept.
    """
    check(calibration, budget)
    by_error = budget.kind == "error"
    gains = calibration.largest_gains if by_error else calibration.gains
    best: tuple[float, Array, Array, float] | None = None  # error, gains, choice, gap
    for _ in range(1 if by_error else ROUNDS):
        choice, gap = _solved(calibration, budget, wishes, gains)
        error = predict.of_choice(calibration, choice).error
        if best is None or error < best[0]:
            best = error, gains, choice, gap
        picked = np.take_along_axis(calibration.mean_damage, choice[..., None], -1)
        again = calibration.gains_at(picked.sum(axis=(1, 2, 3)))
        if np.allclose(again, gains, rtol=0.02):
            break
        gains = again
    assert best is not None
    _, gains, choice, gap = best
    simple, simple_predicted = None, None
    if simplify:
        with suppress(solve.Infeasible):
            limit = limit_of(calibration, budget)
            simple = phases.fit(*_sums(calibration, budget, gains), limit, wishes.lines)
            simple_predicted = predict.of_choice(calibration, simple.choice)
    return Chosen(
        budget=budget,
        choice=choice,
        predicted=predict.of_choice(calibration, choice),
        gap=gap,
        simple=simple,
        simple_predicted=simple_predicted,
    )


def _solved(
    calibration: Calibration, budget: Budget, wishes: Wishes, gains: Array
) -> tuple[Array, float]:
    """(choice, gap) where what an error counts is given."""
    values, weights = _sums(calibration, budget, gains)
    n, layers, heads, modes = values.shape
    unit = float(np.ptp(values, axis=-1).mean())
    problem = Problem(
        values.reshape(n, layers * heads, modes),
        weights.reshape(n, layers * heads, modes),
        limit_of(calibration, budget),
        solve.falling(np.array(calibration.run.keep), wishes.smooth * unit, wishes.monotone),
    )
    try:
        solution = solve.solve(problem)
    except solve.Infeasible as error:
        raise UserError(_nearest(calibration, budget, error.least)) from None
    gap = solution.gap / solution.value if solution.value > 0 else 0.0
    if budget.kind != "error":  # values are squares of errors
        gap = 1 - max(1 - gap, 0.0) ** 0.5
    return solution.choice.reshape(n, layers, heads), gap


def front(calibration: Calibration, wishes: Wishes = NOTHING, n: int = FRONT) -> list[Chosen]:
    """Solutions from the lowest keep to the dense run, evenly spaced by ratio."""
    low = min(calibration.run.keep)
    found = []
    for keep in np.geomspace(low, 1.0, n + 2)[1:-1]:
        budget = Budget("keep", float(f"{keep:.2g}"))
        found.append(choose(calibration, budget, wishes, simplify=False))
    return found


def uniform(calibration: Calibration, mode: int) -> Array:
    """The choice that has one mode everywhere."""
    run = calibration.run
    return np.full((run.bins, run.layers, run.heads), mode)


def best_uniform(calibration: Calibration, budget: Budget) -> int | None:
    """The one mode for all cells that keeps a budget at the least error (or attention)."""
    limit = budget.value * (1 + 1e-9)
    best: dict[int, float] = {}
    for mode in range(len(calibration.names)):
        found = predict.of_choice(calibration, uniform(calibration, mode))
        if budget.kind == "error":
            value, kept = found.attention, found.error <= limit
        else:
            spent = {"keep": found.keep, "attention": found.attention, "time": found.time}
            value, kept = found.error, (spent[budget.kind] or np.inf) <= limit
        if kept:
            best[mode] = value
    return min(best, key=lambda mode: best[mode], default=None)


def _sums(calibration: Calibration, budget: Budget, gains: Array) -> tuple[Array, Array]:
    """(what is minimised, what is limited): [bins, layers, heads, modes]."""
    loss = calibration.loss(gains)
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
