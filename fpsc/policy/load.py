"""Policy: a validated document."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..grid import TileShape, plan_tile
from . import document as doc
from . import tables
from .axis import in_noise
from .check import validate
from .errors import PolicyError, listed
from .imports import follow, standalone
from .schema import ROWS, Limits, Mode, Phase, PolicySpec, Rule, Tuned, component_spec, edges

BESIDE = "fpsc-policy.yaml"
"""The policy of a model, in the folder of its weights."""


class Policy:
    """What every attention of a video model does, by noise, layer and head. Immutable.

    Made by `load`, `from_dict` or `find`; each raises `PolicyError` with every problem found.
    """

    def __init__(self, document: doc.Document) -> None:
        document = follow(document)
        self._init(document, validate(document))
        self._components = {
            name: self._part(name, component_spec(self.spec, name)) for name in self.spec.components
        }

    def _init(self, document: doc.Document, spec: PolicySpec) -> None:
        self.document = document
        self.spec = spec
        self.table = tables.read(document, spec)
        if len(self.edges) >= ROWS:
            message = (
                f"schedule, except and table cut noise in {len(self.edges) + 1} rows; a policy has "
                f"{ROWS} at most, so let them share their edges"
            )
            raise self.error(("table",), message)

    def _part(self, name: str, spec: PolicySpec) -> Policy:
        part = object.__new__(type(self))
        part._init(self.document.component(name), in_noise(spec))
        part._components = {}
        return part

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Policy:
        """Reads a policy from a file's path, or from YAML text (a string with a line break)."""
        return cls(doc.read(source))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Policy:
        """A policy from plain Python values, spelled as in the file."""
        return cls(doc.from_value(value))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as YAML, comments included.

        Raises:
            ValueError: it refers to files in its folder, and `path` is in another one.
        """
        folder = self.document.folder
        refers = self.document.base is not None or self._tables()
        if refers and folder and Path(path).parent.resolve() != folder.resolve():
            raise ValueError(
                f"{self.source} refers to files in its folder; save it there, or with save_beside"
            )
        doc.write(self.document, path)

    def save_beside(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the policy into the folder of a model's weights, where the backend finds it.

        What it imports is written out in it, and its tables are copied. Returns the file's path.
        """
        target = Path(folder) / BESIDE
        for choices, name in self._tables():
            copied = target.parent / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            if not copied.exists() or not copied.samefile(choices.file):
                shutil.copyfile(choices.file, copied)
        doc.write(standalone(self.document), target)
        return target

    def _tables(self) -> list[tuple[tables.Choices, str]]:
        """The tables of the policy and of its components, with their names in the file."""
        policies = [self, *self._components.values()]
        return [(p.table, p.spec.table) for p in policies if p.table and p.spec.table]

    def with_values(self, changes: Mapping[str, Any]) -> Policy:
        """A policy with values replaced: {"modes.fast.keep": 0.2, "schedule.0.use": "fast"}.

        Comments stay, and lines without a change stay byte for byte. Raises KeyError where a key's
        parent does not exist.
        """
        return type(self)(doc.edited(self.document, changes))

    @property
    def components(self) -> list[str]:
        """Names of the transformers for which the policy says something of their own."""
        return list(self._components)

    def component(self, name: str | None) -> Policy:
        """The policy as it holds for one transformer of a pipeline, `transformer_2` for example.

        The policy itself where it says nothing about that one.
        """
        return self._components.get(name or "", self)

    @property
    def edges(self) -> list[float]:
        """Noise levels, descending, at which anything changes: between the rows of a table."""
        stretches = self.table.noise if self.table else ()
        inner = {n for noise in stretches for n in noise} - {0.0, 1.0}
        return sorted({*edges(self.spec), *inner}, reverse=True)

    @property
    def roles(self) -> frozenset[str]:
        """Roles of attention that the policy covers; others stay dense."""
        return frozenset(self.spec.roles)

    @property
    def name(self) -> str:
        """The name it gives itself, else that of its file."""
        return self.spec.name or Path(self.document.file).stem

    @property
    def source(self) -> str:
        """The file it was read from, "<policy>" when there is none."""
        return self.document.file

    @property
    def tile(self) -> TileShape | Literal["auto"]:
        return self.spec.tile

    @property
    def modes(self) -> dict[str, Mode]:
        return self.spec.modes

    @property
    def schedule(self) -> list[Phase]:
        return self.spec.schedule

    @property
    def rules(self) -> list[Rule]:
        """The rules under `except`, in order."""
        return self.spec.except_

    @property
    def limits(self) -> Limits:
        return self.spec.limits

    @property
    def tuned_on(self) -> Tuned:
        """What stands under `for`."""
        return self.spec.for_

    def tile_for(self, grid: Sequence[int]) -> TileShape:
        """The tile of a grid: the policy's own, or the planned one where it says `auto`."""
        return plan_tile(grid) if self.spec.tile == "auto" else self.spec.tile

    def mismatches(
        self,
        *,
        model: str | None = None,
        grid: Sequence[int] | None = None,
        weights: str | None = None,
    ) -> list[str]:
        """One line for each thing given that is not what the policy was tuned on."""
        tuned = self.tuned_on
        given = {"model": model, "grid": grid and list(grid), "weights": weights}
        expected = {
            "model": tuned.model,
            "grid": tuned.grid and list(tuned.grid),
            "weights": tuned.weights,
        }
        return [
            f"{field}: {self.name} was tuned on {expected[field]}, this is {found}"
            for field, found in given.items()
            if None not in (found, expected[field]) and found != expected[field]
        ]

    def same_as(self, other: Policy) -> bool:
        """Whether both policies say the same, whatever their files are called."""
        ours, theirs = self.table, other.table
        tables_agree = ours is theirs or (
            ours is not None and theirs is not None and ours.same_as(theirs)
        )
        return self.spec == other.spec and tables_agree

    def error(self, path: doc.Path_, message: str) -> PolicyError:
        """An error about a place in this policy: ("except", 0, "layers")."""
        return PolicyError(self.source, [self.document.problem(path, message)])

    def where(self, path: doc.Path_) -> str:
        """A place as people find it: "wan.yaml:12 except[0]"."""
        return self.document.where(path)

    def __repr__(self) -> str:
        return f"Policy({self.name!r}, modes={listed(self.modes)}, from {self.source})"
