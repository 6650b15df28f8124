"""From a document to a checked model, or to every problem with its place and its fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .axis import AXES, Axis, axis_of, in_noise, noise_range, range_of, step_range
from .document import Document, Path_
from .errors import PolicyError, either, listed, nearest, shown
from .fields import validated
from .schema import ROWS, Mode, Phase, PolicySpec, Rule, Sampling, component_spec, edges
from .values import PercentRange, StepRange


def validate(document: Document) -> PolicySpec:
    """The model of a document, with all ranges as noise.

    Raises:
        PolicyError: every problem that was found, each with its place.
    """
    spec = validated(document, PolicySpec)
    problems = [document.problem(*p) for p in _conflicts(spec)]
    if problems:
        raise PolicyError(document.file, problems)
    return in_noise(spec)


Conflict = tuple[Path_, str]


def _conflicts(spec: PolicySpec) -> Iterator[Conflict]:
    """What single fields cannot know: names that must exist, ranges that must meet."""
    for name, mode in spec.modes.items():
        if not re.fullmatch(r"[\w-]+", name):
            message = f'a mode\'s name is letters, digits, "-" and "_"; found {shown(name)}'
            yield ("modes", name), message
        for key, message in mode_conflicts(mode):
            yield ("modes", name, *key), message
    yield from _sampling_conflicts(spec.sampling)
    yield from _plan_conflicts(spec)
    for name, component in spec.components.items():
        if not component.model_fields_set:
            yield ("components", name), "changes nothing; give it a schedule, or remove it"
        stated = {"except" if f == "except_" else f for f in component.model_fields_set}
        for path, message in _plan_conflicts(component_spec(spec, name)):
            if path[0] in stated:
                yield ("components", name, *path), message


def _plan_conflicts(spec: PolicySpec) -> Iterator[Conflict]:
    """Of schedule and rules."""
    parts: dict[str, Sequence[Phase | Rule]]
    parts = {"schedule": spec.schedule, "except": spec.except_}
    for part, entries in parts.items():
        for i, entry in enumerate(entries):
            if entry.use not in spec.modes:
                guess = nearest(entry.use, spec.modes)
                message = f'no mode "{entry.use}"{guess} (modes: {listed(spec.modes)})'
                yield (part, i, "use"), message
    for i, rule in enumerate(spec.except_):
        if not rule.model_fields_set - {"use"}:
            message = "says not where: add layers, heads or noise, or change the schedule instead"
            yield ("except", i), message
    found = list(_axis_conflicts(spec))
    yield from found
    if not found:
        yield from _row_conflicts(spec)


def _sampling_conflicts(sampling: Sampling | None) -> Iterator[Conflict]:
    if sampling is None or not sampling.scheduler.startswith("CogVideoX"):
        return
    for key in ("shift", "sigmas"):
        if key in sampling.model_fields_set:
            message = f"{sampling.scheduler} does not move its timesteps by it; remove it"
            yield ("sampling", key), message


def _axis_conflicts(spec: PolicySpec) -> Iterator[Conflict]:
    """Of the ranges: one axis, inside it, no gaps, no overlaps, a level for each edge."""
    entries: list[tuple[Path_, Phase | Rule]] = [
        *((("schedule", i), phase) for i, phase in enumerate(spec.schedule)),
        *((("except", i), rule) for i, rule in enumerate(spec.except_)),
    ]
    given = [(path, entry, [k for k in AXES if range_of(entry, k)]) for path, entry in entries]
    key = next((keys[0] for _, _, keys in given if keys), "noise")
    mixed = False
    for path, entry, keys in given:
        if isinstance(entry, Phase) and not keys:
            description = type(entry).model_fields[key].description
            yield path, f'"{key}" is missing: expected {description}'
            mixed = True
        for other in keys:
            if other != key:
                yield (*path, other), f"a file has one axis, and this one began with {key}"
                mixed = True
    if mixed:
        return
    if key != "noise" and spec.sampling is None:
        path = next(path for path, _, keys in given if keys)
        yield (
            (*path, key),
            f"{key} counts in a run; say which: sampling: "
            "{scheduler: UniPCMultistepScheduler, steps: 50, shift: 5.0}",
        )
        return
    axis = axis_of(key, spec.sampling)
    bad = False
    for path, entry, _ in given:
        message = _range_conflict(range_of(entry, key), axis, spec.sampling)
        if message:
            yield (*path, key), message
            bad = True
    if not bad:
        yield from _schedule_conflicts([range_of(p, key) or (0, 0) for p in spec.schedule], axis)


def _range_conflict(
    value: tuple[float, float] | None, axis: Axis, sampling: Sampling | None
) -> str | None:
    """What is wrong with one range of steps or percent in a run."""
    if not isinstance(value, StepRange | PercentRange) or sampling is None:
        return None
    if axis.key == "steps" and value.stop > axis.last:
        return f"sampling has {sampling.steps} steps (0..{sampling.steps}), found {value}"
    first, stop = step_range(value, sampling.steps)
    if first == stop:
        return f"{value} percent holds none of the {sampling.steps} steps; make it wider"
    try:
        noise_range(sampling, value)
    except ValueError as error:
        return str(error)
    return None


def _schedule_conflicts(schedule: Sequence[tuple[float, float]], axis: Axis) -> Iterator[Conflict]:
    write, position = axis.write, axis.position
    end = axis.first
    for i, (first, last) in enumerate(schedule):
        place = ("schedule", i, axis.key)
        fix = f"write {write(end, last)}"
        if i == 0 and first != end:
            found = write(first, last)
            yield place, f"the schedule starts at {axis.start}, found {found}; {fix}"
        elif position(first) > position(end):
            gap = write(end, first)
            yield place, f"gap: no phase covers {gap}; {fix}, or add a phase before this one"
        elif position(first) < position(end) and position(last) > position(end):
            yield place, f"overlap: {write(first, end)} is covered twice; {fix}"
        elif position(first) < position(end):
            rule = (
                "noisy to clean and cover each level once"
                if axis.key == "noise"
                else "first to last and cover each step once"
            )
            message = f"{write(first, last)} comes after {axis.say(end)}; phases run from {rule}"
            yield place, message
        end = max(end, last, key=position)
    if end != axis.last:
        place = ("schedule", len(schedule) - 1, axis.key)
        first, last = schedule[-1]
        fix = f"write {write(first, axis.last)}, or add a phase {write(end, axis.last)}"
        yield place, f"the schedule ends at {axis.end}, found {write(first, last)}; {fix}"


def _row_conflicts(spec: PolicySpec) -> Iterator[Conflict]:
    rows = len(edges(in_noise(spec))) + 1
    if rows > ROWS:
        message = (
            f"the ranges of schedule and except cut noise in {rows} rows; a table has {ROWS} at "
            "most, so let rules share their edges"
        )
        yield ("schedule",), message


def mode_conflicts(mode: Mode) -> Iterator[Conflict]:
    """What does not go together in one mode, with the key inside it."""
    needs = {"window": "window", "near": "keep", "radial": "keep"}
    owners = {
        "keep": ("near", "radial", "frame", "column"),
        "window": ("window",),
        "weights": ("near",),
        "offsets": ("explicit",),
        "lists": ("explicit",),
    }
    kind = mode.pattern or "dense"
    if mode.window is not None and mode.keep is not None:
        yield ("keep",), "a mode sets keep or window, not both; remove one"
        return
    for key, patterns in owners.items():
        value = getattr(mode, key)
        if value is None or kind in patterns or (key, value, kind) == ("keep", 1, "dense"):
            continue
        if mode.pattern is None:
            yield (key,), f"needs a pattern; add pattern: {either(patterns)}"
        else:
            yield (key,), f"belongs to pattern {either(patterns)}, not to {kind}; remove it"
    if kind == "explicit" and (mode.offsets is None) == (mode.lists is None):
        yield ("pattern",), "explicit needs offsets (the same for all tiles) or lists, one of both"
    need = needs.get(kind)
    if need and getattr(mode, need) is None:
        description = type(mode).model_fields[need].description
        yield ("pattern",), f'{kind} needs "{need}": {description}'
