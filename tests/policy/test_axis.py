"""Steps and percent of a run as noise, against the schedulers of diffusers themselves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpsc.policy import Policy, resolve
from fpsc.policy.axis import edge, levels
from fpsc.policy.schema import Sampling

SCHEDULERS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "DPMSolverMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "CogVideoXDDIMScheduler": {"timestep_spacing": "trailing"},
    "CogVideoXDPMScheduler": {"timestep_spacing": "trailing"},
}


def sampling(name: str, steps: int, **settings: Any) -> dict[str, Any]:
    shift = {} if name.startswith("CogVideoX") else {"shift": 5.0}
    return {"scheduler": name, "steps": steps, **shift, **settings}


def policy(axis: str, ranges: list[str], run: dict[str, Any], **more: Any) -> Policy:
    uses = [f"m{i}" for i in range(len(ranges))]
    modes = {use: {"pattern": "near", "keep": (i + 1) / 8} for i, use in enumerate(uses)}
    schedule = [{axis: r, "use": use} for r, use in zip(ranges, uses, strict=True)]
    return Policy.from_dict(
        {"fpsc": 1, "modes": modes, "sampling": run, "schedule": schedule, **more}
    )


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [4, 50])
def test_every_step_gets_its_mode(name: str, steps: int) -> None:
    """Through the table, by the timesteps that the scheduler hands to a model."""
    shift = {"FlowMatchEulerDiscreteScheduler": "shift"}.get(name, "flow_shift")
    settings = {} if name.startswith("CogVideoX") else {shift: 5.0}
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name], **settings)
    scheduler.set_timesteps(steps)
    cuts = [0, 1, steps // 2, steps]
    ranges = [f"{a}..{b}" for a, b in pairwise(cuts)]
    table = resolve(policy("steps", ranges, sampling(name, steps)), layers=1, heads=1, fp8=False)
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        expected = sum(step >= cut for cut in cuts[1:])
        assert int(table.cells[0, table.row_of(min(timestep / 1000, 1)), 0]) == expected


def test_uniform_sigmas_are_those_that_pipelines_hand_over() -> None:
    """`get_sigmas` of the HunyuanVideo pipeline: np.linspace(1.0, 0.0, steps + 1)[:-1]."""
    run = Sampling(
        scheduler="FlowMatchEulerDiscreteScheduler", steps=10, shift=7.0, sigmas="uniform"
    )
    shifted = [7 * s / (1 + 6 * s) for s in (1 - i / 10 for i in range(10))]
    assert levels(run) == pytest.approx(shifted, abs=1e-6)


@given(steps=st.integers(1, 100), shift=st.floats(0.5, 12))
def test_an_edge_lies_between_its_steps(steps: int, shift: float) -> None:
    run = Sampling(scheduler="FlowMatchEulerDiscreteScheduler", steps=steps, shift=shift)
    noise = levels(run)
    for step in range(1, steps):
        assert noise[step] <= edge(run, step) < noise[step - 1]
    assert (edge(run, 0), edge(run, steps)) == (1.0, 0.0)


def test_percent_counts_steps() -> None:
    """18 of 50 steps are 36 %; a step belongs to the range in which its share of the run lies."""
    run = sampling("UniPCMultistepScheduler", 50)
    by_steps = policy("steps", ["0..18", "18..50"], run)
    for percent in (["0..36", "36..100"], ["0..35.5", "35.5..100"]):
        assert [p.noise for p in policy("percent", percent, run).schedule] == [
            p.noise for p in by_steps.schedule
        ]


def test_rules_count_in_the_same_axis() -> None:
    run = sampling("UniPCMultistepScheduler", 50)
    rule = {"steps": "10..20", "layers": 0, "use": "m1"}
    found = policy("steps", ["0..10", "10..50"], run, **{"except": [rule]})
    schedule = policy("steps", ["0..10", "10..20", "20..50"], run).schedule
    assert found.rules[0].noise == schedule[1].noise
    assert found.edges == [schedule[0].noise.lo, schedule[1].noise.lo]
