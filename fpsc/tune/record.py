"""A calibration: what was measured, in one safetensors file.

Tensors of the file, float32:

- `damage` [prompts, bins, layers, heads, modes]: the squared change of the model's prediction that
  a mode in this head causes, over the squared prediction; see `fpsc.tune.measure`.
- `attention` of the same shape: the squared error of the head's output over its square.
- `carried` [prompts that were run, bins, 2]: the squared change of a run's result where all heads
  ran in a reference mode, the gentle or the strong one, in this bin alone, over the squared result.
- `maps` [bins, layers, heads, tiles]: of the attention of the tile in the middle of the video, the
  part that goes to each tile.

The metadata hold one string, `calibration`: the `Facts` as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fpsc.errors import UserError
from fpsc.files import replacing
from fpsc.grid import TileShape, TokenGrid, tile_grid
from fpsc.policy import Policy
from fpsc.tune.cost import Cost
from fpsc.tune.modes import DENSE, policy

KEY = "calibration"
TENSORS = ("damage", "attention", "carried", "maps")

Array = np.ndarray


class Run(BaseModel):
    """What the first dense run shows of a model and of how it is sampled.

    Attributes:
        steps: the noise of every step, from noisy to clean.
        edges: between the bins, from 1 to 0.
        levels: of each bin, the noise at which it is measured.
        grid, tile, prefix, suffix: of the video in the sequence.
        references: the modes of `carried`, the gentle one first.
        keep, pairs: of every candidate, the fraction of the video's key tiles, and of all pairs of
            query and key, that it visits.
        forward_seconds: of one dense forward; None where nothing was timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: tuple[float, ...]
    edges: tuple[float, ...]
    levels: tuple[float, ...]
    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    prefix: int
    suffix: int
    references: tuple[str, str]
    keep: tuple[float, ...]
    pairs: tuple[float, ...]
    cost: Cost

    @property
    def bins(self) -> int:
        return len(self.levels)

    @property
    def tiles(self) -> TokenGrid:
        """Tiles of the video along each axis."""
        return tile_grid(TokenGrid(*self.grid), TileShape(*self.tile))


class Facts(BaseModel):
    """Where a calibration comes from, and what its axes mean.

    Attributes:
        model: for people; origin: the hub id that policies name under `for`, "" for none.
        modes: the candidates, spelled as in a policy, in the order of the last axis.
        run: of the first prompt.
        queries: the part of the query tiles that was measured; 1 is all.
        probes: random directions for each forward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["fpsc-calibration-1"] = "fpsc-calibration-1"
    model: str
    origin: str
    model_class: str
    device: str
    dtype: str
    tile: tuple[int, int, int] | Literal["auto"]
    modes: dict[str, dict[str, Any]]
    run: Run
    prompts: int
    probes: int
    seed: int
    queries: float
    versions: dict[str, str]


@dataclass(frozen=True, eq=False)
class Calibration:
    """See the module's text."""

    facts: Facts
    damage: Array
    attention: Array
    carried: Array
    maps: Array

    @property
    def run(self) -> Run:
        return self.facts.run

    @property
    def names(self) -> list[str]:
        """Of the modes, in the order of the last axes."""
        return list(self.facts.modes)

    @property
    def dense(self) -> int:
        return self.names.index(DENSE)

    @cached_property
    def policy(self) -> Policy:
        """All candidates, and everything dense."""
        return policy(self.facts.modes, tile=self.facts.tile)

    @cached_property
    def share(self) -> Array:
        """[bins]: the part of a run's steps in each bin."""
        counts = np.bincount([self.bin_of(n) for n in self.run.steps], minlength=self.run.bins)
        return counts / len(self.run.steps)

    def bin_of(self, noise: float) -> int:
        """The bin of a noise level, as a policy with these edges would see it."""
        return bin_of(noise, self.run.edges)

    @cached_property
    def mean_damage(self) -> Array:
        """float64 [bins, layers, heads, modes]: over the prompts."""
        mean: Array = self.damage.mean(axis=0, dtype=np.float64)
        return mean

    @cached_property
    def anchors(self) -> tuple[Array, Array]:
        """[bins, 2] each, of both references: the damage that was predicted for all heads, and what
        one unit of it left in the squared error of the result.

        Where a reference does no damage nothing is known, and the bin counts with its part of the
        steps.
        """
        modes = [self.names.index(name) for name in self.run.references]
        rows = len(self.carried)
        predicted = self.damage[:rows][..., modes].sum(axis=(2, 3), dtype=np.float64).mean(axis=0)
        carried = np.maximum(self.carried.mean(axis=0, dtype=np.float64), 1e-20)
        known = predicted > 0
        safe = np.where(known, predicted, 1.0)
        return safe, np.where(known, carried / safe, self.share[:, None])

    def gains_at(self, damage: Array) -> Array:
        """[bins]: what a unit of damage leaves in the squared error of the result, where a bin does
        so much of it in all, [bins].

        An error in a composition grows until it is another one, so this depends on its size: it is
        interpolated between both references, in logarithms, and constant beyond them.
        """
        at, gain = (np.log(x) for x in self.anchors)
        span = at[:, 1] - at[:, 0]
        place = np.log(np.maximum(damage, 1e-300)) - at[:, 0]
        place = np.where(np.abs(span) > 1e-9, place / np.where(span == 0, 1.0, span), 0.5)
        place = np.clip(place, 0.0, 1.0)
        found: Array = np.exp((1 - place) * gain[:, 0] + place * gain[:, 1])
        return found

    @cached_property
    def gains(self) -> Array:
        """[bins]: half-way between the references."""
        found: Array = np.exp(np.log(self.anchors[1]).mean(axis=1))
        return found

    @cached_property
    def largest_gains(self) -> Array:
        """[bins]: no damage leaves more."""
        found: Array = self.anchors[1].max(axis=1)
        return found

    def loss(self, gains: Array) -> Array:
        """float64 [bins, layers, heads, modes]: what each choice adds to the squared relative error
        of the result. Additive over cells."""
        return self.mean_damage * gains[:, None, None, None]

    def save(self, path: Path) -> None:
        """Write the file: the whole of it, or nothing. The same bytes for the same calibration."""
        tensors = {n: np.ascontiguousarray(getattr(self, n), np.float32) for n in TENSORS}
        # One key, because safetensors writes several in no fixed order; and that of modes counts.
        metadata = {KEY: json.dumps(self.facts.model_dump(mode="json"))}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file.

        Raises:
            UserError: it is not there, or is no calibration of this version.
        """
        try:
            with safe_open(path, "np") as file:
                text = (file.metadata() or {}).get(KEY)
                if text is None:
                    raise UserError(
                        f"{path}: expected a calibration of `fpsc tune`, found other tensors"
                    )
                facts = Facts.model_validate_json(text)
                found = cls(facts, *(file.get_tensor(name) for name in TENSORS))
        except (SafetensorError, OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} cannot be read as a calibration ({reason}); make one with "
                "`fpsc tune MODEL`"
            ) from error
        return found._checked(path)

    def _checked(self, path: Path) -> Calibration:
        run, modes = self.run, len(self.facts.modes)
        expected = (self.facts.prompts, run.bins, run.layers, run.heads, modes)
        for name in ("damage", "attention"):
            found = getattr(self, name)
            if found.shape != expected or not np.isfinite(found).all():
                raise UserError(
                    f"{path}: expected finite {name} of shape {list(expected)}, found "
                    f"{list(found.shape)}; the file is damaged: calibrate again"
                )
        return self


def bin_of(noise: float, edges: tuple[float, ...]) -> int:
    """The bin of a noise level; one on an edge is in the cleaner bin, as for a policy's rows."""
    inner = np.array(edges[1:-1], np.float64)
    return int(np.sum(noise <= inner + 1e-6)) if noise > 0 else len(inner)
