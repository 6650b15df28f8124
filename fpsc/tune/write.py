"""Policies of what was chosen: YAML, and a table in safetensors beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fpsc.files import replacing
from fpsc.policy import Policy, tables
from fpsc.policy.document import from_value
from fpsc.policy.values import NoiseRange
from fpsc.tune.modes import DENSE, DENSE_FP8, min_tokens
from fpsc.tune.phases import Phases, Rule
from fpsc.tune.record import Calibration

Array = np.ndarray


def write_table(
    path: Path,
    calibration: Calibration,
    choice: Array,
    simple: Phases | None,
    measured: Mapping[str, Any],
) -> Policy:
    """A policy with a mode for every (bin, layer, head) in a table beside it.

    Args:
        path: of the YAML; the table has the same name and ends in .safetensors.
        choice: int [bins, layers, heads].
        simple: whose phases stand in the YAML; the table decides in every cell.
        measured: stands under `measured`.
    """
    base = simple.base if simple else _most_frequent(choice)
    used = sorted({int(m) for m in np.unique(choice)} | set(base))
    names = [calibration.names[m] for m in used]
    table = path.with_suffix(".safetensors")
    cells = np.searchsorted(used, choice).astype(np.uint8)
    with replacing(table) as beside:
        tables.write(beside, edges=calibration.run.edges, modes=names, cells=cells)
    value = _document(path.stem, calibration, used, base, measured)
    value["table"] = table.name
    return _save(path, value, calibration, "a table: the cells in the file beside this one decide")


def write_phases(
    path: Path, calibration: Calibration, simple: Phases, measured: Mapping[str, Any]
) -> Policy:
    """A policy of a few lines."""
    used = sorted({*simple.base, *(rule.mode for rule in simple.rules)})
    value = _document(path.stem, calibration, used, simple.base, measured)
    if simple.rules:
        value["except"] = [_rule(rule, calibration) for rule in simple.rules]
    return _save(path, value, calibration, "phases fitted to a table")


def _document(
    name: str,
    calibration: Calibration,
    used: Sequence[int],
    base: Sequence[int],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    facts, run = calibration.facts, calibration.run
    about: dict[str, Any] = {"model": facts.origin} if facts.origin else {}
    about |= {"grid": list(run.grid), "weights": "base"}
    # The dense ones always: policies of one structure are taken without compiling again.
    always = [DENSE, *([DENSE_FP8] if DENSE_FP8 in facts.modes else [])]
    names = [*always, *(n for n in (calibration.names[m] for m in used) if n not in always)]
    value: dict[str, Any] = {
        "fpsc": 1,
        "name": name,
        "for": about,
        "tile": facts.tile if isinstance(facts.tile, str) else list(facts.tile),
        "modes": {n: dict(facts.modes[n]) for n in names},
        "schedule": _schedule(base, calibration),
    }
    value["limits"] = {"min_tokens": min_tokens(run.grid)}
    value["measured"] = dict(measured)
    return value


def _schedule(base: Sequence[int], calibration: Calibration) -> list[dict[str, str]]:
    """Neighbouring bins of one mode are one phase."""
    found = []
    for mode, group in groupby(range(len(base)), key=base.__getitem__):
        bins = list(group)
        found.append(
            {"noise": _noise(bins[0], bins[-1], calibration), "use": _name(mode, calibration)}
        )
    return found


def _rule(rule: Rule, calibration: Calibration) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rule.layers is not None:
        found["layers"] = _spans(rule.layers)
    if rule.heads is not None:
        found["heads"] = _spans(rule.heads)
    found["noise"] = _noise(rule.first, rule.last, calibration)
    return found | {"use": _name(rule.mode, calibration)}


def _spans(members: Sequence[int]) -> list[int | str]:
    """[0, 1, 2, 5] as [0..2, 5]."""
    found: list[int | str] = []
    for _, group in groupby(enumerate(members), key=lambda pair: pair[1] - pair[0]):
        run = [member for _, member in group]
        found += [f"{run[0]}..{run[-1]}"] if len(run) > 2 else run
    return found


def _noise(first: int, last: int, calibration: Calibration) -> str:
    edges = calibration.run.edges
    return str(NoiseRange(edges[first], edges[last + 1]))


def _name(mode: int, calibration: Calibration) -> str:
    return calibration.names[mode]


def _most_frequent(choice: Array) -> tuple[int, ...]:
    return tuple(int(np.bincount(row.ravel()).argmax()) for row in choice)


def _save(path: Path, value: dict[str, Any], calibration: Calibration, what: str) -> Policy:
    """Write a policy and read it back, which checks it."""
    facts, run = calibration.facts, calibration.run
    t, y, x = run.grid
    head = (
        f"# Tuned by `fpsc tune` for {facts.model}: {what}.\n"
        f"# From {facts.prompts} prompts on a grid of {t} x {y} x {x}, sampled in "
        f"{len(run.steps)} steps. Noise does\n# not depend on the number of steps. On another grid "
        "the tiles are laid out anew, and the\n# backend warns.\n"
    )
    text = head + from_value(value).text
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return Policy.load(path)
