"""Steps and percent of a sampling run as ranges of noise.

A policy acts on noise; `steps` and `percent` are other ways to write it down. `levels` asks the
scheduler of diffusers which noise each step has, and the edge between two steps lies half-way
between theirs, so that a timestep that a model rounds still falls on the right side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from .schema import Phase, PolicySpec, Rule, Sampling
from .values import NoiseRange, PercentRange, StepRange, level

AXES = ("noise", "steps", "percent")

CLOSEST = 2e-5
"""Levels of two steps that differ by less have no edge of five decimals between them."""


class Axis(NamedTuple):
    """How the schedule of a file counts.

    Attributes:
        key: the key of its ranges.
        start, end: where a schedule starts and ends, for messages.
        first, last: the same as numbers.
        write: a range as people write it.
    """

    key: str
    start: str
    end: str
    first: float
    last: float
    write: Callable[[float, float], str]

    def position(self, value: float) -> float:
        """A number that grows in the course of a run."""
        return -value if self.first > self.last else value

    def say(self, value: float) -> str:
        """A place on the axis as people write it."""
        return level(value) if self.key == "noise" else f"{value:g}"


def axis_of(key: str, sampling: Sampling | None) -> Axis:
    """The axis behind a key; `steps` needs the run that it counts in."""
    if key == "steps":
        n = sampling.steps if sampling else 0
        return Axis(key, "0", f"{n}, as many steps as sampling has", 0, n, _steps_text)
    if key == "percent":
        return Axis(key, "0", "100", 0, 100, lambda a, b: str(PercentRange(a, b)))
    start, end = "1.00 (pure noise)", "0.00 (clean)"
    return Axis("noise", start, end, 1, 0, lambda a, b: str(NoiseRange(a, b)))


def _steps_text(first: float, stop: float) -> str:
    return str(StepRange(int(first), int(stop)))


def range_of(entry: Phase | Rule, key: str) -> tuple[float, float] | None:
    """The range that a phase or rule gives on an axis, None where it gives none."""
    value = getattr(entry, key)
    return value if key in entry.model_fields_set else None


def levels(sampling: Sampling) -> tuple[float, ...]:
    """The noise of every step of a run, from pure noise down: its timesteps / 1000.

    The numbers are those of diffusers' `set_timesteps`:

    - FlowMatchEulerDiscreteScheduler (scheduling_flow_match_euler_discrete.py):
      sigma' = shift sigma / (1 + (shift - 1) sigma), as Esser et al. 2024 (arXiv:2403.03206),
      section 5.3.2, with `sigmas` linearly spaced; the timestep is 1000 sigma'. A pipeline with
      dynamic shifting has shift = exp(mu).
    - UniPCMultistepScheduler and DPMSolverMultistepScheduler (scheduling_unipc_multistep.py,
      scheduling_dpmsolver_multistep.py) with `use_flow_sigmas`: the same formula as `flow_shift`,
      and timesteps cut to whole numbers.
    - CogVideoXDDIMScheduler and CogVideoXDPMScheduler (scheduling_ddim_cogvideox.py,
      scheduling_dpm_cogvideox.py) with trailing timesteps, as CogVideoX is published: they have no
      shift of the timesteps.
    """
    return _levels(sampling.scheduler, sampling.steps, sampling.shift, sampling.sigmas)


@lru_cache(maxsize=32)
def _levels(name: str, steps: int, shift: float | None, sigmas: str) -> tuple[float, ...]:
    if sigmas == "linear-quadratic":
        return _linear_quadratic(steps)
    import diffusers  # takes a second, and only policies by steps or percent need it

    settings: dict[str, Any]
    if name == "FlowMatchEulerDiscreteScheduler":
        settings = {"shift": shift or 1.0}
    elif name.startswith("CogVideoX"):
        settings = {"timestep_spacing": "trailing"}
    else:
        settings = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift or 1.0,
        }
    scheduler = getattr(diffusers, name)(**settings)
    if sigmas == "uniform":
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    return tuple(min(float(t) / 1000, 1.0) for t in scheduler.timesteps)


def _linear_quadratic(steps: int) -> tuple[float, ...]:
    """The levels of Mochi (pipeline_mochi.py, linear_quadratic_schedule): the first half of the
    steps goes from 1 to 0.975 in equal steps, the second half on to 0, faster and faster."""
    half, threshold = steps // 2, 0.025
    if half == 0:
        return (1.0,) * steps
    rest, slope = steps - half, threshold / half
    # The parabola through the end of the line, with its slope, that ends at 1.
    bend = (half - threshold * steps) / (half * rest**2)
    clean = [slope * i + (bend * (i - half) ** 2 if i > half else 0.0) for i in range(steps)]
    return tuple(1.0 - c for c in clean)


def step_range(value: StepRange | PercentRange, steps: int) -> StepRange:
    """The steps inside a range of percent: those whose share of the run so far lies in it."""
    if isinstance(value, StepRange):
        return value
    first, stop = (math.ceil(p * steps / 100 - 1e-9) for p in value)
    return StepRange(first, stop)


def edge(sampling: Sampling, step: int) -> float:
    """The noise level between step - 1 and step, of five decimals; 1 before the first step, 0
    after the last.

    Raises:
        ValueError: both steps have the same noise, as far as five decimals tell.
    """
    noise = levels(sampling)
    if step <= 0:
        return 1.0
    if step >= len(noise):
        return 0.0
    before, after = noise[step - 1], noise[step]
    if before - after < CLOSEST:
        raise ValueError(
            f"steps {step - 1} and {step} of this run have the same noise, {before:.5f}; "
            "let the range begin or end elsewhere"
        )
    return round((before + after) / 2, 5)


def noise_range(sampling: Sampling, value: StepRange | PercentRange) -> NoiseRange:
    """A range of steps or percent as noise.

    Raises:
        ValueError: no edge can be laid there (`edge`).
    """
    first, stop = step_range(value, sampling.steps)
    return NoiseRange(edge(sampling, first), edge(sampling, stop))


def in_noise(spec: PolicySpec) -> PolicySpec:
    """A valid policy with the noise of every range of steps or percent filled in."""
    if spec.sampling is None:
        return spec
    changes: dict[str, Any] = {
        "schedule": [_phase(phase, spec.sampling) for phase in spec.schedule],
        "except_": [_rule(rule, spec.sampling) for rule in spec.except_],
    }
    return spec.model_copy(update=changes)


def _phase(phase: Phase, sampling: Sampling) -> Phase:
    value = phase.steps or phase.percent
    return phase.model_copy(update={"noise": noise_range(sampling, value)}) if value else phase


def _rule(rule: Rule, sampling: Sampling) -> Rule:
    value = rule.steps or rule.percent
    return rule.model_copy(update={"noise": noise_range(sampling, value)}) if value else rule
