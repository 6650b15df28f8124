"""Predicted against true: policies on prompts that nothing was measured on."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fpsc.bench.progress import Tell, quiet
from fpsc.errors import UserError
from fpsc.policy import Policy
from fpsc.quality.metrics import psnr
from fpsc.tune import modes
from fpsc.tune.calibrate import relative_square
from fpsc.tune.instrument import Instrument
from fpsc.tune.parts import Parts
from fpsc.tune.record import Calibration
from fpsc.tune.subjects import Subject

LEAST = 1e-3
"""Relative errors below are as good as none: predicted or found, they count as this much."""


@dataclass(frozen=True)
class Validation:
    """What a policy did to the results of some prompts.

    Attributes:
        prompts: their numbers.
        errors: relative error of each result against the dense one.
        psnr: of each clip against the dense one, in dB; none where results cannot be decoded.
        predicted: the relative error that was expected.
    """

    prompts: tuple[int, ...]
    errors: tuple[float, ...]
    psnr: tuple[float, ...]
    predicted: float | None

    @property
    def error(self) -> float:
        """Root of the mean square over the prompts."""
        return statistics.fmean(e * e for e in self.errors) ** 0.5

    @property
    def factor(self) -> float:
        """How wrong the prediction was: the larger of the two errors over the smaller.

        Raises:
            ValueError: nothing was predicted.
        """
        if self.predicted is None:
            raise ValueError("nothing was predicted")
        a, b = max(self.error, LEAST), max(self.predicted, LEAST)
        return max(a / b, b / a)

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "held_out": len(self.prompts),
            "error": round(self.error, 5),
        }
        if self.psnr:
            mean = statistics.fmean(self.psnr)
            found["psnr_db"] = round(mean, 2) if math.isfinite(mean) else None
        if self.predicted is not None:
            found |= {"predicted": round(self.predicted, 5), "wrong_by": round(self.factor, 3)}
        return found


class Validator:
    """Runs policies on held-out prompts; the dense results are made once.

    Args:
        prompts: which, none of them of the calibration.
        parts: where results are kept, so that what is interrupted goes on; None keeps nothing.
    """

    def __init__(
        self,
        subject: Subject,
        calibration: Calibration,
        prompts: Sequence[int],
        *,
        parts: Parts | None = None,
        tell: Tell = quiet,
    ) -> None:
        measured = range(calibration.facts.prompts)
        if wrong := [p for p in prompts if p in measured or not 0 <= p < subject.prompts]:
            raise UserError(
                f"prompt {wrong[0]} cannot be held out: {subject.prompts} are there, and the first "
                f"{len(measured)} were measured on; give more prompts, or measure on fewer"
            )
        if type(subject.model).__name__ != calibration.facts.model_class:
            raise UserError(
                f"the calibration is of a {calibration.facts.model_class}, and this is a "
                f"{type(subject.model).__name__}"
            )
        self.subject, self.calibration, self.prompts = subject, calibration, tuple(prompts)
        self.parts, self.tell = parts, tell
        self._dense: dict[int, Tensor] = {}

    def run(self, policies: Mapping[str, tuple[Policy, float | None]]) -> dict[str, Validation]:
        """What each policy does, with what was predicted of it, by name."""
        known = {name: self._known(name, policy) for name, (policy, _) in policies.items()}
        missing = [name for name, found in known.items() if found is None]
        if missing:
            facts = self.calibration.facts
            structure = policies[missing[0]][0].limits.min_tokens
            dense = modes.policy(facts.modes, tile=facts.tile, min_tokens=structure)
            with Instrument(self.subject.model, dense, self.subject.options) as instrument:
                total = len(missing) * len(self.prompts)
                for i, name in enumerate(missing):
                    policy, predicted = policies[name]
                    place = (i * len(self.prompts), total)
                    known[name] = self._measured(instrument, policy, predicted, place)
                    self._keep(name, policy, known[name])
                instrument.use(None)
        return {name: found for name, found in known.items() if found is not None}

    def _measured(
        self,
        instrument: Instrument,
        policy: Policy,
        predicted: float | None,
        place: tuple[int, int],
    ) -> Validation:
        errors, likeness = [], []
        done, total = place
        for prompt in self.prompts:
            if prompt not in self._dense:
                self.tell(f"{policy.name}: held-out prompt {prompt}, dense", done, total)
                instrument.use(None)
                self._dense[prompt] = self.subject.sample(prompt)
            instrument.use(policy)
            self.tell(f"{policy.name}: held-out prompt {prompt}", done, total)
            dense, found = self._dense[prompt], self.subject.sample(prompt)
            errors.append(relative_square(found, dense) ** 0.5)
            if self.subject.decode is not None:
                likeness.append(psnr(*(self.subject.decode(x) for x in (dense, found))))
            done += 1
        return Validation(self.prompts, tuple(errors), tuple(likeness), predicted)

    def _known(self, name: str, policy: Policy) -> Validation | None:
        found = self.parts.facts(f"{name}.json") if self.parts else None
        if found is None or found.pop("says") != says(policy):
            return None
        prompts, errors, likeness = (tuple(found[n]) for n in ("prompts", "errors", "psnr"))
        return Validation(prompts, errors, likeness, found["predicted"])

    def _keep(self, name: str, policy: Policy, found: Validation | None) -> None:
        if self.parts is not None and found is not None:
            self.parts.note(f"{name}.json", {**asdict(found), "says": says(policy)})


def says(policy: Policy) -> str:
    """What a policy says, apart from what was measured of it: equal texts are equal policies."""
    value = {n: x for n, x in policy.document.value.items() if n not in ("measured", "name")}
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    if policy.table is not None:
        digest.update(np.ascontiguousarray(policy.table.cells).tobytes())
    return digest.hexdigest()[:16]


def held_out(calibration: Calibration, subject: Subject, n: int) -> list[int]:
    """The n prompts behind those that were measured on.

    Raises:
        UserError: there are not so many.
    """
    first = calibration.facts.prompts
    if first + n > subject.prompts:
        raise UserError(
            f"{n} prompts to validate on, and {subject.prompts - first} are left of "
            f"{subject.prompts}: give more prompts, or ask for fewer with --held-out"
        )
    return list(range(first, first + n))
