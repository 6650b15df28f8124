"""Budgets: what may be spent, and what a mode costs in that unit.

| budget | limits |
|---|---|
| `keep=0.25` | the mean keep over the steps of a run, its layers and heads |
| `attention=0.4`, `attention=12s` | all attention, of the dense run's time, or in seconds |
| `time=0.7`, `time=40s` | all forwards, likewise |
| `error=0.1` | the relative error of the result, predicted; the cheapest attention within it |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fpsc.errors import UserError
from fpsc.tune.record import Calibration

Kind = Literal["keep", "attention", "time", "error"]

BUDGET = re.compile(r"\s*(\w+)\s*=\s*([0-9.]+(?:e-?\d+)?)\s*(s?)\s*")


@dataclass(frozen=True)
class Budget:
    """A limit; `seconds` where it is stated in seconds a run."""

    kind: Kind
    value: float
    seconds: bool = False

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}{'s' if self.seconds else ''}"

    @property
    def slug(self) -> str:
        """For names of files: keep-0.25."""
        return f"{self.kind}-{self.value:g}{'s' if self.seconds else ''}"


def parse(text: str) -> Budget:
    """Read `keep=0.25`, `attention=0.4`, `time=40s` or `error=0.1`.

    Raises:
        UserError: it is none of these.
    """
    kinds = get_args(Kind)
    match = BUDGET.fullmatch(text)
    if match is None or match[1] not in kinds:
        raise UserError(
            f"--budget {text}: expected one of {', '.join(kinds)} and a number, as keep=0.25, "
            "attention=0.4, time=40s or error=0.1"
        )
    kind: Kind = match[1]  # type: ignore[assignment]
    try:
        value = float(match[2])
    except ValueError:
        raise UserError(f"--budget {text}: {match[2]} is not a number") from None
    if match[3] and kind not in ("attention", "time"):
        raise UserError(f"--budget {text}: only attention and time are stated in seconds")
    if value <= 0 or (value > 1 and not match[3] and kind != "error"):
        raise UserError(
            f"--budget {text}: expected a number above 0 and at most 1, a fraction of the dense run"
        )
    return Budget(kind, value, bool(match[3]))


def check(calibration: Calibration, budget: Budget) -> None:
    """Raises: UserError, where a budget counts times, and those that were taken were refused."""
    refused = calibration.run.cost.refused
    if refused and budget.kind in ("attention", "time"):
        raise UserError(
            f"--budget {budget} needs times of this device, and those that were taken are not "
            f"used: {refused}. Calibrate again with --fresh on an idle machine, count with --cost "
            "pairs, or set a budget of keep"
        )


def unit_costs(calibration: Calibration, kind: Kind) -> tuple[np.ndarray, float]:
    """([bins, modes], constant): what one cell costs in each mode, and what all else does, in such
    units that the sum over the cells of a dense run and the constant are 1.

    Raises:
        UserError: the kind needs times, and none were taken.
    """
    run = calibration.run
    cells = run.layers * run.heads
    share = calibration.share[:, None]
    if kind == "keep":
        return share * np.array(run.keep)[None] / cells, 0.0
    heads = np.array(run.cost.heads)
    if kind in ("attention", "error"):
        return share * heads / (heads[calibration.dense] * cells), 0.0
    if run.cost.kind != "measured":
        raise UserError(
            "a budget of time needs times of this device: calibrate with --cost measured, or set a "
            "budget of attention or keep"
        )
    whole = run.cost.rest + cells * heads[calibration.dense]
    return share * heads / whole, float(run.cost.rest / whole)


def limit_of(calibration: Calibration, budget: Budget) -> float:
    """The limit of a budget in the units of `unit_costs`, without its constant; of an error, in
    those of `Calibration.loss`.

    Raises:
        UserError: seconds, and no times were taken.
    """
    if budget.kind == "error":
        return budget.value**2
    value = budget.value
    if budget.seconds:
        value /= dense_seconds(calibration, budget.kind)
    return value - unit_costs(calibration, budget.kind)[1]


def dense_seconds(calibration: Calibration, kind: Kind) -> float:
    """What a dense run takes, in attention or in all.

    Raises:
        UserError: no times were taken.
    """
    run = calibration.run
    if run.cost.kind != "measured":
        raise UserError(
            f"a budget of {kind} in seconds needs times of this device: calibrate with --cost "
            "measured"
        )
    attention = run.layers * run.heads * run.cost.heads[calibration.dense]
    rest = run.cost.rest if kind == "time" else 0.0
    return float((attention + rest) * len(run.steps))
