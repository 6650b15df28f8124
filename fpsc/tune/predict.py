"""What a choice, or any policy, is predicted to cost and to change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fpsc.errors import UserError
from fpsc.policy import Policy
from fpsc.policy.resolve import resolve
from fpsc.tune import modes
from fpsc.tune.budget import Kind, unit_costs
from fpsc.tune.record import Calibration

Array = np.ndarray


class NotMeasured(UserError):
    """A policy uses a mode that the calibration does not have."""


@dataclass(frozen=True)
class Prediction:
    """Of one run.

    Attributes:
        error: relative error of the result: |found - dense| / |dense|.
        keep: mean over steps, layers and heads.
        attention: time of all attention, of the dense one's.
        time: of all forwards, of the dense one's; None where it was not measured.
    """

    error: float
    keep: float
    attention: float
    time: float | None

    def as_dict(self) -> dict[str, float | None]:
        return {name: value and round(value, 5) for name, value in vars(self).items()}


def of_choice(calibration: Calibration, choice: Array) -> Prediction:
    """Of a mode for each cell: int [bins, layers, heads]."""
    return _of_parts(calibration, choice[:, None], np.ones((len(choice), 1)))


def of_policy(calibration: Calibration, policy: Policy) -> Prediction:
    """Of a policy, on the model and the run of a calibration; its stretches of noise may differ
    from the bins.

    Raises:
        NotMeasured: one of its cells has a mode that was not measured.
        PolicyError: it names a layer or head that the model does not have.
    """
    run = calibration.run
    table = resolve(policy, layers=run.layers, heads=run.heads, fp8=True)
    rows = [table.row_of(noise) for noise in run.steps]
    cells = table.cells[:, : table.n_rows].numpy().transpose(1, 0, 2)  # [rows, layers, heads]
    number: dict[int, int] = {}
    for i in np.unique(cells[rows]):
        name = table.mode_names[i]
        same = modes.find(policy.modes[name], calibration.policy)
        if same is None:
            raise NotMeasured(f"{policy.name}: mode {name} is none that was measured")
        number[int(i)] = calibration.names.index(same)
    known = np.vectorize(lambda i: number.get(i, 0), otypes=[int])(cells)
    parts = np.zeros((run.bins, table.n_rows))
    for noise, row in zip(run.steps, rows, strict=True):
        parts[calibration.bin_of(noise), row] += 1
    total = parts.sum(axis=1, keepdims=True)
    parts = np.divide(parts, total, out=np.zeros_like(parts), where=total > 0)
    return _of_parts(calibration, np.broadcast_to(known, (run.bins, *known.shape)), parts)


def _of_parts(calibration: Calibration, choice: Array, parts: Array) -> Prediction:
    """choice: int [bins, parts, layers, heads]; parts: [bins, parts], how much of a bin each is."""

    def per_bin(x: Array) -> Array:
        """x [bins, layers, heads, modes] -> [bins]"""
        picked = np.take_along_axis(x[:, None], choice[..., None], -1)[..., 0]
        found: Array = (picked.sum(axis=(2, 3)) * parts).sum(axis=1)
        return found

    def cost(kind: Kind) -> float:
        cells, constant = unit_costs(calibration, kind)
        costs = np.broadcast_to(cells[:, None, None], calibration.mean_damage.shape)
        return float(per_bin(costs).sum() + constant)

    damage = per_bin(calibration.mean_damage)
    timed = calibration.run.cost.kind == "measured"
    return Prediction(
        error=float((calibration.gains_at(damage) * damage).sum()) ** 0.5,
        keep=cost("keep"),
        attention=cost("attention"),
        time=cost("time") if timed else None,
    )
