"""What policies cost without training: how those of the experiment were chosen."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

import fpsc
from bench.tuning.carry_out import Tell
from bench.tuning.record import RecordError, rounded
from bench.tuning.variants import (
    CONSTANT,
    PAPER,
    SAFE,
    TILE,
    Document,
    Phase,
    policy,
    without_fp8,
)
from fpsc.bench.environment import environment
from fpsc.bench.markdown import NONE, markdown
from fpsc.bench.record import Environment
from fpsc.demo.model import load_model
from fpsc.demo.train import Recipe, validation_loss
from fpsc.files import replacing
from fpsc.policy import Policy

SCHEMA = 1
CLIPS = 4
LEVELS = Recipe().validation_sigmas


def _always(tile: list[int] | str, **mode: Any) -> Document:
    whole = {"dtype": "fp8", "scales": {"qk": "tile", "v": "channel"}} | mode
    always = policy("survey", Phase("always", "1.00..0.00", 1.0))
    return always | {"modes": {"always": whole}, "tile": tile}


def _but(given: Document, layers: list[int]) -> Document:
    """With every tile, not quantised, in these layers."""
    modes = given["modes"] | {"dense": {"keep": 1.0, "dtype": "bf16"}}
    return given | {"modes": modes, "except": [{"layers": layers, "use": "dense"}]}


def _strips(**mode: Any) -> Document:
    return _always(TILE, **mode)


def _by_head(keep: float) -> Document:
    return policy("survey", Phase("always", "1.00..0.00", keep))


CANDIDATES: dict[str, Document] = {
    "every tile, FP8": _always("auto", keep=1.0),
    **{f"near, keep {k:g}": _always("auto", pattern="near", keep=k) for k in (0.5, 0.25, 0.125)},
    "near, keep 0.25, in layer 3 alone": _but(
        _always("auto", pattern="near", keep=0.25), [0, 1, 2, 4, 5]
    ),
    "near, keep 0.25, but in layer 3": _but(_always("auto", pattern="near", keep=0.25), [3]),
    "near, keep 0.25, without FP8": without_fp8(_always("auto", pattern="near", keep=0.25)),
    "radial, keep 0.25": _always("auto", pattern="radial", keep=0.25),
    "window 3x2x1": _always("auto", pattern="window", window=[3, 2, 1]),
    "near in half frames 1x8x16, keep 0.25": _always(
        [1, 8, 16], pattern="near", weights=[8.0, 1.0, 1.0], keep=0.25
    ),
    "near in strips 1x16x4, keep 0.25": _strips(pattern="near", keep=0.25),
    "frame in strips, keep 0.25": _strips(pattern="frame", keep=0.25),
    **{f"frame in strips, near in 4 heads, keep {k:g}": _by_head(k) for k in (0.25, 0.1875, 0.125)},
    "the same at keep 0.25, without FP8": without_fp8(_by_head(0.25)),
    "the paper's order": PAPER,
    "dense early": SAFE,
    "constant": CONSTANT,
}


class Survey(BaseModel):
    """The file. dense, losses: a row for each clip, a column for each noise level."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = SCHEMA
    noise: tuple[float, ...]
    dense: tuple[tuple[float, ...], ...]
    policies: dict[str, Document]
    losses: dict[str, tuple[tuple[float, ...], ...]]
    environment: Environment

    @classmethod
    def load(cls, path: Path) -> Survey:
        """Raises RecordError where it is not there, or no file of this schema."""
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            raise RecordError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        with replacing(path) as beside:
            beside.write_text(text + "\n", encoding="utf-8")

    def gap(self, name: str, level: int | None = None) -> float:
        """How much larger the loss is than the dense one, as a fraction of that."""
        part = slice(None) if level is None else slice(level, level + 1)
        mean = [
            statistics.fmean(value for row in table for value in row[part])
            for table in (self.losses[name], self.dense)
        ]
        return mean[0] / mean[1] - 1


def survey(path: Path, tell: Tell, *, weights: Path | None = None, clips: int = CLIPS) -> Survey:
    """Measure every candidate that the file has not yet, and write it after each."""
    found = Survey.load(path) if path.is_file() else None
    if found is None or len(found.dense) != clips:
        tell("dense", 0, 1)
        dense = _table(torch.compile(load_model(weights)), clips)
        here = environment(torch.device("cpu"))
        found = Survey(noise=LEVELS, dense=dense, policies={}, losses={}, environment=here)
        found.save(path)
    missing = [name for name, each in CANDIDATES.items() if found.policies.get(name) != each]
    model = load_model(weights)
    fast: Any = None
    for done, name in enumerate(missing):
        tell("policies", done, len(missing))
        chosen = Policy.from_dict(CANDIDATES[name])
        if fast is None:
            options: dict[str, Any] = {"policy": chosen, "strict": True}
            fast = torch.compile(model, backend="fpsattn", options=options)
        else:
            fpsc.set_policy(model, chosen, recompile=True)
        changes = {
            "policies": found.policies | {name: CANDIDATES[name]},
            "losses": found.losses | {name: _table(fast, clips)},
        }
        found = found.model_copy(update=changes)
        found.save(path)
    tell("policies", len(missing), len(missing))
    return found


def _table(model: Any, clips: int) -> tuple[tuple[float, ...], ...]:
    return rounded(validation_loss(model, clips, LEVELS, Recipe().sigma_floor))


def table(path: Path) -> str:
    """A row for each candidate, a dash where it was not measured.

    Raises:
        RecordError: the file cannot be read.
    """
    found = Survey.load(path) if path.is_file() else None
    rows = []
    for name, each in CANDIDATES.items():
        cells = [NONE] * (1 + len(LEVELS))
        if found is not None and found.policies.get(name) == each:
            gaps = (found.gap(name, level) for level in (None, *range(len(LEVELS))))
            cells = [f"{100 * gap:+.1f} %" for gap in gaps]
        rows.append((name, *cells))
    return markdown(("policy", "all", *(f"noise {level:g}" for level in LEVELS)), rows)
