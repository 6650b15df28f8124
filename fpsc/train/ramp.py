"""From dense to what the policy says, over the first steps: keep falls, then fp8 begins.

What a compiled model runs with is always the run's policy with other numbers. Which dtypes occur is
structure, and compiled code depends on it; so every policy of a run declares both dtypes from the
start, in two modes that nothing uses, and no step recompiles anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fpsc.grid import TokenGrid, tile_grid
from fpsc.policy import Policy
from fpsc.policy.patterns import fraction, pattern_of
from fpsc.policy.schema import Mode
from fpsc.train import config

STAGES = 32
"""Values of keep on the way: each costs new lists, and few tiles make out more."""

DECLARED = {
    "declares-bf16": {"keep": 1.0, "dtype": "bf16"},
    "declares-fp8": {"keep": 1.0, "dtype": "fp8"},
}


class Ramp:
    """The policies of a run.

    Args:
        policy: what the model is trained for.
        spec: over which steps.
        grid: (T, Y, X) of a clip; a window's keep depends on it.
        baseline: train dense.
    """

    def __init__(
        self, policy: Policy, spec: config.Ramp, grid: Sequence[int], *, baseline: bool = False
    ) -> None:
        self._policy = policy
        self._spec = spec
        self._grid = TokenGrid(*grid)
        self._baseline = baseline

    @cached_property
    def target(self) -> Policy:
        """What the policy says, as it stands."""
        return self._with({})

    @cached_property
    def dense(self) -> Policy:
        """All tiles in the input's dtype, at every noise."""
        return self._with(dict.fromkeys(self._policy.modes, DECLARED["declares-bf16"]))

    def stage(self, step: int) -> tuple[int, bool]:
        """How far a step is: keep in `STAGES` parts of its way, and whether fp8 has begun."""
        way = self._spec.keep
        passed = 1.0 if way is None else (step - way.first) / (way.stop - way.first)
        return int(min(max(passed, 0.0), 1.0) * STAGES), step >= self._spec.fp8

    def at(self, step: int) -> Policy:
        """The policy of a step, counted from 0."""
        stage, fp8 = self.stage(step)
        if self._baseline:
            return self.dense
        if stage == STAGES and fp8:
            return self.target
        return self._with(
            {
                name: self._mode(mode, stage / STAGES, fp8)
                for name, mode in self._policy.modes.items()
            }
        )

    def keep_at(self, step: int) -> float:
        """Keep of the sparsest mode at a step."""
        if self._baseline:
            return 1.0
        stage, _ = self.stage(step)
        least = min(self._keep(mode) for mode in self._policy.modes.values())
        return 1 - stage / STAGES * (1 - least)

    def fp8_at(self, step: int) -> bool:
        """Whether any mode is in fp8 at a step."""
        wanted = any(mode.dtype == "fp8" for mode in self._policy.modes.values())
        return wanted and step >= self._spec.fp8 and not self._baseline

    def _mode(self, mode: Mode, passed: float, fp8: bool) -> dict[str, Any]:
        """A mode on the way: `near` where its own pattern has no keep to set."""
        given: dict[str, Any] = mode.model_dump(mode="json", exclude_unset=True, warnings=False)
        if not fp8:
            given["dtype"] = "bf16"
        keep = self._keep(mode)
        if passed == 1 or keep == 1:
            return given
        for key in ("window", "offsets", "lists"):
            given.pop(key, None)
        if mode.pattern in ("window", "explicit"):
            given["pattern"] = "near"
        given["keep"] = 1 - passed * (1 - keep)
        return given

    def _keep(self, mode: Mode) -> float:
        tile = self._policy.tile_for(self._grid)
        return fraction(pattern_of(mode), tile_grid(self._grid, tile))

    def _with(self, modes: dict[str, dict[str, Any]]) -> Policy:
        changes = {f"modes.{name}": mode for name, mode in {**DECLARED, **modes}.items()}
        return self._policy.with_values(changes)


def trains(policy: Policy, grid: Sequence[int]) -> bool:
    """Whether any noise level, layer or head of a policy is sparse or in fp8 on a grid."""
    tiles = tile_grid(TokenGrid(*grid), policy.tile_for(grid))
    used = [phase.use for phase in policy.schedule] + [rule.use for rule in policy.rules]
    used += policy.table.modes if policy.table else []
    return any(
        policy.modes[name].dtype == "fp8" or fraction(pattern_of(policy.modes[name]), tiles) < 1
        for name in used
    )
