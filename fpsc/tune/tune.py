"""Everything behind `fpsc tune`: calibrate, solve, validate, write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpsc.bench.progress import Tell, quiet
from fpsc.files import replacing
from fpsc.policy import Policy
from fpsc.tune import choose, write
from fpsc.tune.budget import Budget
from fpsc.tune.choose import Chosen, Wishes
from fpsc.tune.predict import Prediction
from fpsc.tune.record import Calibration

if TYPE_CHECKING:  # they need the compiler, which takes seconds to import
    from fpsc.tune.subjects import Subject
    from fpsc.tune.validate import Validation

WITHIN = 2.0
"""How wrong a prediction may be: by this factor in the relative error of the result."""

SIMPLE = "-phases"
"""What follows the name of a policy in that of its simplification."""


@dataclass(frozen=True)
class Tuned:
    """One policy that was made, or why it was not.

    Attributes:
        file: where it lies; None where it was refused.
        lines: phases and rules of a simplified policy; None of a table.
        refused: why nothing was written, "" where it was.
    """

    name: str
    budget: Budget
    predicted: Prediction
    gap: float
    lines: int | None
    validation: Validation | None
    file: Path | None = None
    refused: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "budget": str(self.budget),
            "predicted": self.predicted.as_dict(),
            "gap": round(self.gap, 6),
            "lines": self.lines,
            "validation": self.validation and self.validation.as_dict(),
            "file": self.file and str(self.file),
            "refused": self.refused,
        }


@dataclass
class Result:
    """What a call of `fpsc tune` found.

    Attributes:
        chosen: the solutions of the budgets that were asked for.
        tuned: the policies made of them, and their simplifications.
        front: solutions from the lowest keep to dense, and the files that hold them.
    """

    calibration: Calibration
    chosen: list[Chosen]
    tuned: list[Tuned] = field(default_factory=list)
    front: list[tuple[Chosen, Path]] = field(default_factory=list)

    @property
    def refused(self) -> list[Tuned]:
        return [tuned for tuned in self.tuned if tuned.refused]


def tune(
    calibration: Calibration,
    budgets: Sequence[Budget],
    wishes: Wishes,
    folder: Path,
    *,
    subject: Subject | None = None,
    prompts: Sequence[int] = (),
    within: float = WITHIN,
    tell: Tell = quiet,
) -> Result:
    """Solve for budgets and write the policies into a folder.

    Every policy is validated first where there are held-out `prompts`; one whose prediction was
    wrong by more than a factor of `within` is not written. The Pareto set, in `pareto/`, is only
    written where all that were validated are good.

    Raises:
        UserError: a budget cannot be kept.
    """
    chosen = [choose.choose(calibration, budget, wishes) for budget in budgets]
    result = Result(calibration, chosen)
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        policies: dict[str, tuple[Policy, float | None]] = {}
        parts = {name: each for one in chosen for name, each in _drafts(calibration, one).items()}
        for name, each in parts.items():
            policies[name] = each.write(draft / f"{name}.yaml", None), each.predicted.error
        found: dict[str, Validation] = {}
        if subject is not None and prompts:
            from fpsc.tune.validate import Validator

            found = Validator(subject, calibration, prompts, tell=tell).run(policies)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for name, each in parts.items():
        result.tuned.append(_written(name, each, found.get(name), folder, within))
    if not result.refused:
        for one in choose.front(calibration, wishes):
            path = folder / "pareto" / f"{one.budget.slug}.yaml"
            each = _Draft(calibration, one, one.choice, one.predicted, simple=False)
            each.write(path, None)
            result.front.append((one, path))
    return result


@dataclass(frozen=True)
class _Draft:
    """A policy before it is written."""

    calibration: Calibration
    chosen: Chosen
    choice: Any
    predicted: Prediction
    simple: bool

    @property
    def lines(self) -> int | None:
        phases = self.chosen.simple
        if not self.simple or phases is None:
            return None
        changes = sum(a != b for a, b in zip(phases.base, phases.base[1:], strict=False))
        return 1 + changes + len(phases.rules)

    def write(self, path: Path, validation: Validation | None) -> Policy:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = self.calibration.facts
        measured: dict[str, Any] = {
            "by": f"fpsc tune {facts.versions['fpsc']}",
            "budget": str(self.chosen.budget),
            "device": facts.device,
            "cost": self.calibration.run.cost.kind,
            "predicted": self.predicted.as_dict(),
        }
        if self.simple:
            table = self.chosen.predicted.error
            measured["error_of_the_table"] = round(table, 5)
        else:
            measured["gap"] = round(self.chosen.gap, 6)
        measured["validated"] = validation.as_dict() if validation else False
        measured = _without_none(measured)
        if self.simple:
            assert self.chosen.simple is not None
            return write.write_phases(path, self.calibration, self.chosen.simple, measured)
        return write.write_table(path, self.calibration, self.choice, self.chosen.simple, measured)


def _drafts(calibration: Calibration, chosen: Chosen) -> dict[str, _Draft]:
    """The policies of one solution, by name."""
    name = chosen.budget.slug
    found = {name: _Draft(calibration, chosen, chosen.choice, chosen.predicted, simple=False)}
    if chosen.simple is not None and chosen.simple_predicted is not None:
        found[name + SIMPLE] = _Draft(
            calibration, chosen, chosen.simple.choice, chosen.simple_predicted, simple=True
        )
    return found


def _written(
    name: str, draft: _Draft, validation: Validation | None, folder: Path, within: float
) -> Tuned:
    refused, file = "", None
    if validation is not None and validation.factor > within:
        refused = (
            f"{name} is not written: its error was predicted as {validation.predicted:.3g} and is "
            f"{validation.error:.3g} on {len(validation.prompts)} held-out prompts, wrong by a "
            f"factor of {validation.factor:.2f} where {within:g} is allowed; measure on more "
            "prompts (--measure), or allow more (--within)"
        )
    else:
        file = folder / f"{name}.yaml"
        draft.write(file, validation)
    gap = 0.0 if draft.simple else draft.chosen.gap
    return Tuned(
        name, draft.chosen.budget, draft.predicted, gap, draft.lines, validation, file, refused
    )


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(each) if isinstance(each, dict) else each
        for name, each in value.items()
        if each is not None
    }


def write_record(result: Result, path: Path) -> None:
    """What was found, as JSON."""
    record = {
        "model": result.calibration.facts.model,
        "policies": [tuned.as_dict() for tuned in result.tuned],
        "front": [
            {"file": str(file), "budget": str(c.budget), "predicted": c.predicted.as_dict()}
            for c, file in result.front
        ],
    }
    with replacing(path) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
