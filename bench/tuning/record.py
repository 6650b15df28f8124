"""What a run of the experiment writes: one JSON file, checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fpsc.bench.record import Environment
from fpsc.files import replacing

SCHEMA = 1
"""Rises when a reader of the older files would misunderstand a newer one."""


class RecordError(Exception):
    """A file is no record of this schema. The message names the file, the place and what to do."""


class SettingsError(Exception):
    """A run was begun with other settings. The message names the folder and what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Losses(_Model):
    """Validation losses: a row for each clip, a column for each noise level.

    dense: with dense attention; as_run: under the variant's policy.
    """

    noise: tuple[float, ...]
    dense: tuple[tuple[float, ...], ...]
    as_run: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _rectangles(self) -> Losses:
        for table in (self.dense, self.as_run):
            if len(table) != len(self.dense) or any(len(row) != len(self.noise) for row in table):
                raise ValueError(f"expected rows of {len(self.noise)} losses, one for each level")
        return self


class Distance(_Model):
    """Squared maximum mean discrepancy of the judge's features, and its standard error."""

    value: float
    error: float


class Samples(_Model):
    """A set of sampled clips.

    Attributes:
        clips, steps: how many, and of how many sampling steps each.
        psnr, ssim: of each clip, to the dense model's clip from the same noise; null where equal.
        distances: to the dense model's sets from other noise, by the number of the set.
        accuracy: how often the judge reads what the prompt says, by question.
    """

    clips: int
    steps: int
    psnr: tuple[float | None, ...]
    ssim: tuple[float, ...]
    distances: dict[int, Distance]
    accuracy: dict[str, float]


class Training(_Model):
    """What `fpsc train` found. curve: (step, dense loss, loss under the policy) of its own
    validations, on fewer clips."""

    steps: int
    seconds: float
    curve: tuple[tuple[int, float, float], ...]


class Record(_Model):
    """One run.

    settings: `Run.settings`, all that the result depends on. seconds: of each part, training apart.
    """

    schema_version: int = SCHEMA
    name: str
    variant: str
    seed: int
    settings: dict[str, Any]
    training: Training | None
    losses: Losses
    samples: Samples
    seconds: dict[str, float]
    environment: Environment

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            RecordError: there is no such file, or it is no record of this schema.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecordError(f"cannot read {path}: {error}") from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA:
            raise RecordError(
                f"{path}: expected a record of bench/joint.py with schema_version {SCHEMA}, found "
                f"{version}; delete it and run it again"
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the record"
            raise RecordError(f"{path}: {place}: {first['msg']}") from error

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        with replacing(path) as beside:
            beside.write_text(text + "\n", encoding="utf-8")


def rounded(table: Sequence[Sequence[float]], digits: int = 6) -> tuple[tuple[float, ...], ...]:
    """Significant digits of what is written."""
    return tuple(tuple(float(f"{value:.{digits}g}") for value in row) for row in table)
