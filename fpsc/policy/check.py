"""From a document to a checked model, or to every problem with its place and its fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .document import Document, Path_
from .errors import PolicyError, Problem, either, listed, nearest, shown
from .schema import ROWS, Mode, Phase, PolicySpec, Rule, edges
from .values import NoiseRange, level

ELSEWHERE = {
    "steps": 'steps are not read yet; say it in noise, "noise: 1.00..0.90" (1 is pure noise)',
    "percent": 'percent is not read yet; say it in noise, "noise: 1.00..0.90" (1 is pure noise)',
    "sampling": 'sampling is not read yet; give the phases in noise and remove "sampling"',
    "table": "tables are not read yet; write the choices as rules under except",
    "roles": "roles are not read yet; a policy covers every video self-attention",
    "components": "components are not read yet; give each transformer its own policy",
    "$import": "imports are not read yet; copy the base policy's lines",
}
"""Keys of the planned format that this version refuses, and what to write instead."""


def validate(document: Document) -> PolicySpec:
    """The model of a document.

    Raises:
        PolicyError: every problem that was found, each with its place.
    """
    try:
        spec = PolicySpec.model_validate(document.value)
    except ValidationError as e:
        errors: list[dict[str, Any]] = [dict(error) for error in e.errors()]
        # A phase by steps lacks its noise: one message says it all.
        refused = {x["loc"][:-1] for x in errors if _is_planned(x)}
        kept = [x for x in errors if x["type"] != "missing" or x["loc"][:-1] not in refused]
        problems = [_problem(document, error) for error in kept]
        raise PolicyError(document.file, problems) from None
    problems = [document.problem(*p) for p in _conflicts(spec)]
    if problems:
        raise PolicyError(document.file, problems)
    return spec


def _problem(document: Document, error: dict[str, Any]) -> Problem:
    path: Path_ = error["loc"]
    model, field, here = _declared(path)
    keys = [f.alias or name for name, f in model.model_fields.items()]
    last = path[-1] if path else ""
    match error["type"]:
        case "extra_forbidden" if _is_planned(error):
            return document.problem(path[:-1], ELSEWHERE[str(last)], at=path)
        case "extra_forbidden":
            message = f'unknown key "{last}"{nearest(last, keys)} (valid: {listed(keys)})'
            return document.problem(path[:-1], message, at=path)
        case "missing":
            message = f'"{last}" is missing: expected {field.description}'
            return document.problem(path[:-1], message)
        case "value_error":
            return document.problem(path, str(error["ctx"]["error"]))
    expected, found = field.description, error["input"]
    if _is_model(here):
        expected = "a mapping with " + listed(f.alias or n for n, f in here.model_fields.items())
    choices = [c for c in get_args(here) if isinstance(c, str)]
    guess = nearest(found, choices) if isinstance(found, str) else ""
    message = f"expected {expected}, found {shown(found)}{guess}"
    # Where nothing stands, YAML's position is that of the next thing: point at the key.
    return document.problem(path, message, at=path if found is None else None)


def _is_planned(error: dict[str, Any]) -> bool:
    return error["type"] == "extra_forbidden" and error["loc"][-1] in ELSEWHERE


def _declared(path: Path_) -> tuple[type[BaseModel], Any, Any]:
    """For a place: the model around it, the field that declares it, and what stands there."""
    model: type[BaseModel] = PolicySpec
    field: Any = None
    here: Any = PolicySpec
    for step in path:
        if _is_model(here):
            model = here
            fields = {f.alias or name: f for name, f in model.model_fields.items()}
            if step not in fields:
                break
            field = fields[str(step)]
            here = field.annotation
            if type(None) in get_args(here):
                here = next(a for a in get_args(here) if a is not type(None))
        else:  # an item of a list or of a mapping
            here = get_args(here)[-1] if get_args(here) else Any
    return model, field, here


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


Conflict = tuple[Path_, str]


def _conflicts(spec: PolicySpec) -> Iterator[Conflict]:
    """What single fields cannot know: names that must exist, ranges that must meet."""
    for name, mode in spec.modes.items():
        if not re.fullmatch(r"[\w-]+", name):
            message = f'a mode\'s name is letters, digits, "-" and "_"; found {shown(name)}'
            yield ("modes", name), message
        for key, message in mode_conflicts(mode):
            yield ("modes", name, *key), message
    parts: dict[str, Sequence[Phase | Rule]]
    parts = {"schedule": spec.schedule, "except": spec.except_}
    for part, entries in parts.items():
        for i, entry in enumerate(entries):
            if entry.use not in spec.modes:
                guess = nearest(entry.use, spec.modes)
                message = f'no mode "{entry.use}"{guess} (modes: {listed(spec.modes)})'
                yield (part, i, "use"), message
    yield from _schedule_conflicts(spec.schedule)
    for i, rule in enumerate(spec.except_):
        if rule.layers is None and rule.heads is None and rule.noise is None:
            message = "says not where: add layers, heads or noise, or change the schedule instead"
            yield ("except", i), message
    rows = len(edges(spec)) + 1
    if rows > ROWS:
        message = (
            f"the ranges of schedule and except cut noise in {rows} rows; a table has {ROWS} at "
            "most, so let rules share their edges"
        )
        yield ("schedule",), message


def _schedule_conflicts(schedule: list[Phase]) -> Iterator[Conflict]:
    end = 1.0
    for i, phase in enumerate(schedule):
        hi, lo = phase.noise
        place = ("schedule", i, "noise")
        fix = f"write {NoiseRange(end, lo)}"
        if i == 0 and hi != end:
            yield place, f"the schedule starts at 1.00 (pure noise), found {phase.noise}; {fix}"
        elif hi < end:
            gap = NoiseRange(end, hi)
            yield place, f"gap: no phase covers {gap}; {fix}, or add a phase before this one"
        elif hi > end and lo < end:
            yield place, f"overlap: {NoiseRange(hi, end)} is covered twice; {fix}"
        elif hi > end:
            message = (
                f"{phase.noise} comes after {level(end)}; phases run from noisy to clean and "
                "cover each level once"
            )
            yield place, message
        end = min(end, lo)
    if end != 0:
        place = ("schedule", len(schedule) - 1, "noise")
        fix = f"write {NoiseRange(schedule[-1].noise.hi, 0)}, or add a phase {NoiseRange(end, 0)}"
        yield place, f"the schedule ends at 0.00 (clean), found {schedule[-1].noise}; {fix}"


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
