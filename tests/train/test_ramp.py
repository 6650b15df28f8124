"""From dense to the policy: which numbers a step has, and that its structure never changes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fpsc.grid import layout
from fpsc.policy import Policy
from fpsc.policy.resolve import plan, resolve
from fpsc.runtime import structure_of
from fpsc.train import config
from fpsc.train.ramp import STAGES, Ramp, trains
from tests.train.common import GRID
from tests.wan import PHASES

POLICY = Policy.from_dict(PHASES)


def keep_of(policy: Policy) -> list[float]:
    """Mean keep of every row on the grid."""
    table = resolve(policy, layers=2, heads=2, fp8=True)
    return table.keep(plan(policy, layout(GRID, policy.tile_for(GRID))))


def ramp(keep: str | None, fp8: int = 0, **options: bool) -> Ramp:
    given = {"fp8": fp8} if keep is None else {"fp8": fp8, "keep": keep}
    return Ramp(POLICY, config.Ramp.model_validate(given), GRID, **options)


def test_without_one_every_step_has_the_policy() -> None:
    for step in (0, 1, 1000):
        found = ramp(None).at(step)
        assert keep_of(found) == keep_of(POLICY)
        assert {**POLICY.modes, **found.modes} == found.modes  # and two that nothing uses


def test_keep_falls_from_one_and_never_rises() -> None:
    way = ramp(f"10..{10 + 2 * STAGES}")
    rows = [keep_of(way.at(step)) for step in range(20 + 2 * STAGES)]
    assert all(keep == 1 for row in rows[:11] for keep in row)
    assert rows[10 + 2 * STAGES] == keep_of(POLICY)
    for before, after in pairwise(rows):
        assert all(b >= a for b, a in zip(before, after, strict=True))
    # Half-way between 1 and 1 / 2 are 9 of the 12 tiles, between 1 and 1 / 12 they are 6.5: 7.
    half = rows[10 + STAGES]
    assert half == pytest.approx([1, (3 * 9 + 7) / 4 / 12, 7 / 12])
    assert way.keep_at(0) == 1 and way.keep_at(500) == pytest.approx(1 / 12)


def test_fp8_begins_when_it_is_to() -> None:
    way = ramp(None, fp8=5)
    before, after = way.at(4), way.at(5)
    assert {before.modes[name].dtype for name in POLICY.modes} == {"bf16"}
    assert {after.modes[name].dtype for name in ("near", "window")} == {"fp8"}
    assert keep_of(before) == keep_of(after)


def test_the_structure_is_the_same_at_every_step() -> None:
    way = ramp("0..100", fp8=50)
    policies = [way.at(step) for step in (0, 49, 50, 99, 100)] + [way.dense, way.target]
    structures = [structure_of(policy) for policy in policies]
    assert all(structure == structures[0] for structure in structures)
    assert structures[0]["dtypes"] == ["bf16", "fp8"]


def test_dense_is_dense_and_so_is_a_baseline() -> None:
    way = ramp("0..4", baseline=True)
    for policy in (way.dense, way.at(0), way.at(100)):
        assert set(keep_of(policy)) == {1.0} and not trains(policy, GRID)
    assert keep_of(way.target) == keep_of(POLICY)


def test_a_policy_that_trains_nothing() -> None:
    assert trains(POLICY, GRID)
    assert not trains(Policy.load("fpsc: 1\nmodes: {a: {keep: 1.0}}\n"
        "schedule: [{noise: 1.0..0.0, use: a}]\n"), GRID)  # fmt: skip
    unused = POLICY.with_values({"schedule": [{"noise": "1.0..0.0", "use": "dense"}], "except": []})
    assert not trains(unused, GRID)
    rule = unused.with_values({"except": [{"layers": [1], "use": "near"}]})
    assert trains(rule, GRID)
    dense_fp8 = POLICY.with_values({"modes.near": {"keep": 1.0, "dtype": "fp8"}})
    assert trains(dense_fp8, GRID)
