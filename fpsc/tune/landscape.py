"""What stands beside the tuned policies: uniform modes and built-in policies, as predicted."""

from __future__ import annotations

from dataclasses import dataclass

from fpsc.policy import Policy, find, presets
from fpsc.policy.errors import PolicyError
from fpsc.tune import choose, predict
from fpsc.tune.modes import DENSE
from fpsc.tune.predict import NotMeasured, Prediction
from fpsc.tune.record import Calibration

PAPER = "generic-tuned"
"""The built-in policy in the order of FPSAttention: sparse and coarse early."""


@dataclass(frozen=True)
class Landmark:
    """A policy that nobody tuned, by name."""

    name: str
    predicted: Prediction

    @property
    def label(self) -> str:
        return f"{self.name} (FPSAttention's order)" if self.name == PAPER else self.name


def uniform_modes(calibration: Calibration) -> list[Landmark]:
    """Every candidate but the dense one, in all cells."""
    return [
        Landmark(name, predict.of_choice(calibration, choose.uniform(calibration, mode)))
        for mode, name in enumerate(calibration.names)
        if name != DENSE
    ]


def built_in(calibration: Calibration) -> tuple[list[Landmark], list[str]]:
    """The built-in policies whose modes were all measured; and the names of the others.

    Of policies that say the same only the first stands here.
    """
    found: list[Landmark] = []
    left_out = []
    seen: list[Policy] = []
    for name in sorted(presets(), key=lambda name: (name != PAPER, "generic" not in name, name)):
        policy = find(name)
        if name == DENSE or any(alike(policy, other) for other in seen):
            continue
        seen.append(policy)
        try:
            found.append(Landmark(name, predict.of_policy(calibration, policy)))
        except (NotMeasured, PolicyError):
            left_out.append(name)
    return found, left_out


def alike(a: Policy, b: Policy) -> bool:
    """Whether both do the same on one model, whatever they are called and for."""

    def said(policy: Policy) -> object:
        phases = [(phase.noise, policy.modes[phase.use]) for phase in policy.schedule]
        rules = [(r.layers, r.heads, r.noise, policy.modes[r.use]) for r in policy.rules]
        return phases, rules, policy.tile

    return said(a) == said(b)
