"""Policy: a validated document, and where to find one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from ..grid import TileShape, plan_tile
from . import document as doc
from .check import validate
from .errors import PolicyError, Problem, listed, nearest
from .schema import Limits, Mode, Phase, PolicySpec, Rule, Tuned


class Policy:
    """What every attention of a video model does, by noise, layer and head. Immutable.

    Made by `load`, `from_dict` or `find`; each raises `PolicyError` with every problem found.
    """

    def __init__(self, document: doc.Document) -> None:
        self.document = document
        self.spec: PolicySpec = validate(document)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Policy:
        """Reads a policy from a file's path, or from YAML text (a string with a line break)."""
        return cls(doc.read(source))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Policy:
        """A policy from plain Python values, spelled as in the file."""
        return cls(doc.from_value(value))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as YAML, comments included."""
        doc.write(self.document, path)

    def with_values(self, changes: Mapping[str, Any]) -> Policy:
        """A policy with values replaced: {"modes.fast.keep": 0.2, "schedule.0.use": "fast"}.

        Comments stay. Raises KeyError where a key's parent does not exist.
        """
        return type(self)(doc.edited(self.document, changes))

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

    def error(self, path: doc.Path_, message: str) -> PolicyError:
        """An error about a place in this policy: ("except", 0, "layers")."""
        return PolicyError(self.source, [self.document.problem(path, message)])

    def where(self, path: doc.Path_) -> str:
        """A place as people find it: "wan.yaml:12 except[0]"."""
        line, _ = doc.position(self.document.tree, path)
        return f"{self.source}:{line} {doc.dotted(path)}" if line else doc.dotted(path)

    def __repr__(self) -> str:
        return f"Policy({self.name!r}, modes={listed(self.modes)}, from {self.source})"


def presets() -> dict[str, Traversable]:
    """The built-in policies by name."""
    folder = resources.files(__package__) / "presets"
    files = sorted(folder.iterdir(), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f for f in files if f.name.endswith(".yaml")}


def find(name_or_path: str | os.PathLike[str] | Policy) -> Policy:
    """A policy by the name of a preset, by the path of a file, or as it is.

    Raises:
        PolicyError: there is no such preset and no such file, or the policy is not valid.
    """
    if isinstance(name_or_path, Policy):
        return name_or_path
    built_in = presets()
    if name_or_path in built_in:
        preset = built_in[str(name_or_path)]
        return Policy(doc.parse(preset.read_bytes(), preset.name))
    if isinstance(name_or_path, str) and "\n" in name_or_path:
        return Policy.load(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        guess = nearest(name_or_path, built_in)
        message = f"no such policy, neither a file nor one of {listed(built_in)}{guess}"
        raise PolicyError(str(name_or_path) or '""', [Problem(None, None, message)])
    return Policy.load(path)
