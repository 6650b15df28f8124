"""A policy of a few lines that is close to a table: one mode for each phase of noise, and rules.

For a price on weight every cell has a score, value + price * weight. The best mode for a whole bin
begins; then the rule that lowers the sum of scores most is added, again and again. A rule gives one
mode to some bins in a row, for a list of layers, a list of heads, or some heads of one layer. The
price is found by bisection, so that the budget is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fpsc.tune.solve import Infeasible, close_in

Array = np.ndarray

BISECTIONS = 24

WORTH = 0.005
"""A rule must close this part of the distance to the best choice at its price."""


@dataclass(frozen=True)
class Rule:
    """A mode for the bins `first` to `last`, both included; None is all layers or heads."""

    first: int
    last: int
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    mode: int


@dataclass(frozen=True, eq=False)
class Phases:
    """base: the mode of each bin. choice: int [bins, layers, heads], what both come to."""

    base: tuple[int, ...]
    rules: tuple[Rule, ...]
    choice: Array
    value: float
    weight: float


def fit(values: Array, weights: Array, limit: float, lines: int) -> Phases:
    """The phases of least value within a limit of weight.

    Args:
        values, weights: [bins, layers, heads, modes].
        lines: rules at most.

    Raises:
        Infeasible: no phases keep the limit.
    """
    slack = 1e-9 * max(abs(limit), 1e-300)
    spans = [max(float(np.ptp(x, axis=-1).mean()), 1e-300) for x in (values, weights)]
    best: Phases | None = None

    def at(price: float) -> bool:
        nonlocal best
        found = _at(values, weights, price, lines)
        keeps = found.weight <= limit + slack
        if keeps and (best is None or found.value < best.value):
            best = found
        return keeps

    if at(0.0):
        assert best is not None
        return best
    close_in(at, spans[0] / spans[1], BISECTIONS)
    if best is None:
        raise Infeasible(limit, float(weights.min(axis=-1).sum()))
    return best


def _at(values: Array, weights: Array, price: float, lines: int) -> Phases:
    scores = values + price * weights
    n, layers, heads, _ = scores.shape
    base = scores.sum(axis=(1, 2)).argmin(axis=-1)
    choice = np.broadcast_to(base[:, None, None], (n, layers, heads)).copy()
    lowest = float(scores.min(axis=-1).sum())
    rules: list[Rule] = []
    for _ in range(lines):
        now = np.take_along_axis(scores, choice[..., None], -1)
        distance = float(now.sum()) - lowest
        gain, rule = max(_rules(now - scores), key=lambda found: found[0])
        if distance <= 0 or gain < WORTH * distance:
            break
        rules.append(rule)
        where = np.ix_(
            range(rule.first, rule.last + 1),
            range(layers) if rule.layers is None else rule.layers,
            range(heads) if rule.heads is None else rule.heads,
        )
        choice[where] = rule.mode
    picked = choice[..., None]
    return Phases(
        base=tuple(int(m) for m in base),
        rules=tuple(rules),
        choice=choice,
        value=float(np.take_along_axis(values, picked, -1).sum()),
        weight=float(np.take_along_axis(weights, picked, -1).sum()),
    )


def _rules(gains: Array) -> Iterator[tuple[float, Rule]]:
    """For every range of bins the best rule of each form, with what it gains.

    gains: [bins, layers, heads, modes].
    """
    n, layers, heads, _ = gains.shape
    for first in range(n):
        total = np.zeros(gains.shape[1:])
        for last in range(first, n):
            total = total + gains[last]
            by_layer, by_head = total.sum(axis=1), total.sum(axis=0)
            mode = int(np.maximum(by_layer, 0).sum(axis=0).argmax())
            members = _positive(by_layer[:, mode])
            yield (
                float(by_layer[list(members), mode].sum()),
                Rule(first, last, None if len(members) == layers else members, None, mode),
            )
            mode = int(np.maximum(by_head, 0).sum(axis=0).argmax())
            members = _positive(by_head[:, mode])
            yield (
                float(by_head[list(members), mode].sum()),
                Rule(first, last, None, None if len(members) == heads else members, mode),
            )
            one = np.maximum(total, 0).sum(axis=1)
            layer, mode = (int(i) for i in np.unravel_index(one.argmax(), one.shape))
            members = _positive(total[layer, :, mode])
            yield float(one[layer, mode]), Rule(first, last, (layer,), members or None, mode)


def _positive(x: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(x > 0))
