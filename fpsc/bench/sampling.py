"""The level `sampling`: a loop of denoising steps, each contender with a latent of its own.

All take turns step by step, so that the time of one step is compared with that of the same step.
The latent follows the model's velocity (Euler), whatever the model predicts: weights are random,
and what is measured is the time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import Tensor

from fpsc.bench.contenders import EAGER, INDUCTOR
from fpsc.bench.environment import load, now, state
from fpsc.bench.forward import at, enter, forward, gates_of, rows_of
from fpsc.bench.measure import Clock, Effort, clock_for, relative_rms
from fpsc.bench.progress import Tell, quiet
from fpsc.bench.record import Case, Result, Status, Step, Times, compared, rounded
from fpsc.bench.subject import Machine, Sized, Subject, subject
from fpsc.models.materialise import timestep_for
from fpsc.policy import Policy
from fpsc.policy.axis import levels
from fpsc.policy.models import size_for
from fpsc.policy.resolve import resolve


def measure(case: Sized, machine: Machine, effort: Effort, tell: Tell = quiet) -> Case:
    began, start = now(), time.monotonic()
    tell("building the model")
    given = subject(case, machine)
    noise = noise_of_steps(case)
    green = gates_of(case, machine, tell)
    if not case.spec.contenders:  # the others are timed at the level transformer
        case = replace(case, spec=replace(case.spec, contenders=(EAGER, INDUCTOR)))
    entered, results = enter(case, machine, given, forward, green, None, tell)
    before = load()
    clock = clock_for(machine.device)
    calls = {name: entrant.call for name, entrant in entered.items()}
    samples: dict[str, list[list[float]]] = defaultdict(list)
    last: dict[str, Tensor] = {}
    rounds = effort.rounds
    for number in range(rounds + 1):  # the first does not count
        tell(f"round {number} of {rounds}", number, rounds + 1)
        began_round = time.perf_counter()
        times, last = one_round(calls, given, noise, clock)
        if number:
            for name, found in times.items():
                samples[name].append(found)
        else:
            seconds = time.perf_counter() - began_round
            rounds = min(rounds, max(effort.least, int(effort.seconds / max(seconds, 1e-6))))
        if number == rounds:
            break
    for name, each in samples.items():
        policy = entered[name].contender.policy
        error = relative_rms(last[name], last[EAGER]) if EAGER in last else None
        results[name] = _whole(results[name], each, noise, given, policy, case, machine, error)
    whole, best = compared(list(results.values()))
    return Case(
        name=case.spec.name,
        problem=case.problem,
        status=Status.measured if samples else Status.failed,
        reason="" if samples else "no contender could be measured",
        results=whole,
        best=best,
        rounds=len(next(iter(samples.values()), ())),
        warmup=1,
        load=before,
        device_state=state(machine.device),
        began=began,
        took=rounded(time.monotonic() - start),
        notes=(
            "weights are random: the error of a sparse contender says nothing of its quality",
            "one forward a step, without guidance; text encoder and VAE are not in it",
            "the error is of the last latent, without FP8 rounding where the clock ran without it",
        ),
    )


def noise_of_steps(case: Sized) -> tuple[float, ...]:
    """The noise of every step, by the scheduler that the model is usually sampled with."""
    sampling = size_for(case.spec.model).sampling
    return levels(sampling.model_copy(update={"steps": case.problem.steps}))


def one_round(
    calls: dict[str, Any], given: Subject, noise: tuple[float, ...], clock: Clock
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of every step, and the last latent, of every contender."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    latents = dict.fromkeys(calls, given.inputs["hidden_states"])
    for level, following in zip(noise, (*noise[1:], 0.0), strict=True):
        there = at(given, level)
        for name, call in calls.items():
            now_ = Subject(there.model, {**there.inputs, "hidden_states": latents[name]})
            found: list[Tensor] = []

            def step(call: Any = call, given: Subject = now_, found: Any = found) -> None:
                found.append(forward(call, given))

            times[name].append(clock(step))
            velocity = found[0]
            if velocity.shape == latents[name].shape:  # an image-to-video model takes more channels
                latents[name] = latents[name] + (following - level) * velocity
    return times, latents


def _whole(
    result: Result,
    rounds: list[list[float]],
    noise: tuple[float, ...],
    given: Subject,
    policy: Policy | None,
    case: Sized,
    machine: Machine,
    error: float | None,
) -> Result:
    """The times of the loop and of its steps, with the phases of the policy."""
    by_step = list(zip(*rounds, strict=True))
    modes: list[tuple[str, ...]] = [()] * len(noise)
    keeps: list[float | None] = [None] * len(noise)
    visited = result.visited
    if policy is not None:
        modes, keeps = phases_of_steps(policy, noise, case, machine)
        visited = rounded(sum(keep or 0.0 for keep in keeps) / len(keeps))
    steps = tuple(
        Step(
            index=i,
            timestep=rounded(timestep_for(given.model, level)),
            noise=rounded(level),
            modes=modes[i],
            keep=keeps[i],
            seconds=Times.of(by_step[i]),
        )
        for i, level in enumerate(noise)
    )
    return result.model_copy(
        update={
            "seconds": Times.of([sum(each) for each in rounds]),
            "steps": steps,
            "keep": result.keep if result.keep is not None else visited,
            "visited": visited,
            "error": float(f"{error:.2g}") if error is not None else None,
            "status": Status.measured,
        }
    )


def phases_of_steps(
    policy: Policy, noise: tuple[float, ...], case: Sized, machine: Machine
) -> tuple[list[tuple[str, ...]], list[float | None]]:
    """Modes, most frequent first, and mean keep of every step."""
    p = case.problem
    table = resolve(policy, layers=p.layers, heads=p.heads, fp8=machine.fp8)
    _, keeps = rows_of(policy, case, machine)
    rows = [table.row_of(level) for level in noise]
    names = []
    for row in range(table.n_rows):
        cells = table.cells[:, row].flatten().tolist()
        often = sorted(set(cells), key=lambda cell: -cells.count(cell))
        names.append(tuple(table.mode_names[cell] for cell in often))
    return [names[row] for row in rows], [keeps[row] for row in rows]
