"""The table of a policy: choices for each (noise, layer, head) that a tool made, in safetensors.

A file holds one tensor and three strings of metadata:

- tensor `choices`, uint8 [noise, layers, heads]: which mode, counted in `modes`; 255 leaves the
  cell to the schedule.
- `format`: "fpsc-table-1".
- `modes`: a JSON list of names of modes of the policy.
- `noise`: a JSON list of the edges between the first axis' stretches of noise, from 1 to 0:
  [1, 0.9, 0] are two, 1.00..0.90 and 0.90..0.00.

Choices win over the schedule, and rules under `except`, which people write, win over choices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .document import Document, Path_
from .errors import PolicyError, listed, nearest, shown
from .files import inside
from .schema import PolicySpec
from .values import NoiseRange

FORMAT = "fpsc-table-1"

NO_CHOICE = 255

MAX_BYTES = 64 << 20
"""Largest table that is read: 64 stretches of 1000 layers of 1000 heads."""

PLACE = ("table",)


@dataclass(frozen=True, eq=False)
class Choices:
    """A table that fits its policy.

    Attributes:
        file: where it was read from.
        noise: the stretch of noise of each entry of the first axis, from noisy to clean.
        modes: names of modes.
        cells: uint8 [noise, layers, heads], indices into `modes`, or NO_CHOICE.
    """

    file: Path
    noise: tuple[NoiseRange, ...]
    modes: tuple[str, ...]
    cells: np.ndarray

    def same_as(self, other: Choices) -> bool:
        """Whether both hold the same choices."""
        named = (self.noise, self.modes) == (other.noise, other.modes)
        return named and np.array_equal(self.cells, other.cells)

    @property
    def layers(self) -> int:
        return int(self.cells.shape[1])

    @property
    def heads(self) -> int:
        return int(self.cells.shape[2])


def write(
    path: str | os.PathLike[str],
    *,
    edges: Sequence[float],
    modes: Sequence[str],
    cells: np.ndarray,
) -> None:
    """Writes a table; the arguments are those of the format, checked when a policy reads it."""
    metadata = {
        "format": FORMAT,
        "modes": json.dumps(list(modes)),
        "noise": json.dumps(list(edges)),
    }
    save_file({"choices": np.ascontiguousarray(cells, np.uint8)}, path, metadata)


def read(document: Document, spec: PolicySpec) -> Choices | None:
    """The table that a policy names, or None.

    Raises:
        PolicyError: it is not there, is no table, or does not fit the policy.
    """
    if spec.table is None:
        return None
    owner = document.owner(document.place(PLACE))
    try:
        path = inside(owner, spec.table)
        choices = _parse(path)
        _check(choices, spec)
    except (ValueError, OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{spec.table}: {reason}"
        raise PolicyError(document.file, [document.problem(PLACE, message)]) from None
    problems = [document.problem(place, message) for place, message in _out_of_range(choices, spec)]
    if problems:
        raise PolicyError(document.file, problems)
    return choices


def _parse(path: Path) -> Choices:
    if not path.is_file():
        raise ValueError("no such file in the folder of the policy")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if metadata.get("format") != FORMAT:
                found = shown(metadata.get("format"))
                raise ValueError(f'expected metadata format: "{FORMAT}", found {found}')
            if names != ["choices"]:
                raise ValueError(f'expected one tensor "choices", found {listed(names) or "none"}')
            view = file.get_slice("choices")
            if view.get_dtype() != "U8" or len(view.get_shape()) != 3:
                shape = listed(map(str, view.get_shape()))
                raise ValueError(
                    "expected choices of uint8 [noise, layers, heads], found "
                    f"{view.get_dtype()} [{shape}]"
                )
            cells = file.get_tensor("choices")
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from None
    modes = _strings(metadata, "modes", str)
    levels = _strings(metadata, "noise", (int, float))
    good = len(levels) > 1 and levels[0] == 1 and levels[-1] == 0
    if not good or any(hi <= lo for hi, lo in pairwise(levels)):
        raise ValueError(f"expected noise from 1 down to 0, found {shown(levels)}")
    levels = [round(float(n), 5) for n in levels]
    noise = tuple(NoiseRange(hi, lo) for hi, lo in pairwise(levels))
    return Choices(path, noise, tuple(modes), cells)


def _strings(metadata: dict[str, str], key: str, kind: type | tuple[type, ...]) -> list[Any]:
    """A list in JSON, from the metadata."""
    try:
        found = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(
        isinstance(n, kind) and not isinstance(n, bool) for n in found
    ):
        raise ValueError(f"expected metadata {key}: a list in JSON, found {metadata.get(key)!r}")
    return found


def _check(choices: Choices, spec: PolicySpec) -> None:
    rows, layers, heads = choices.cells.shape
    if rows != len(choices.noise) or not layers or not heads:
        raise ValueError(
            f"expected choices of shape [{len(choices.noise)}, layers, heads], one for each "
            f"stretch of noise, found [{rows}, {layers}, {heads}]"
        )
    for name in choices.modes:
        if name not in spec.modes:
            guess = nearest(name, spec.modes)
            raise ValueError(f'no mode "{name}" in the policy{guess} (modes: {listed(spec.modes)})')
    wrong = choices.cells[(choices.cells >= len(choices.modes)) & (choices.cells != NO_CHOICE)]
    if wrong.size:
        raise ValueError(
            f"expected choices below {len(choices.modes)}, the number of modes, or {NO_CHOICE} for "
            f"none, found {int(wrong[0])}"
        )


def _out_of_range(choices: Choices, spec: PolicySpec) -> list[tuple[Path_, str]]:
    """Rules that name a layer or head that the table's model does not have."""
    found: list[tuple[Path_, str]] = []
    for i, rule in enumerate(spec.except_):
        for key, spans, n in (
            ("layers", rule.layers, choices.layers),
            ("heads", rule.heads, choices.heads),
        ):
            last = max((span.last for span in spans or ()), default=0)
            if last >= n:
                message = (
                    f"{key.removesuffix('s')} {last} does not exist; {spec.table} has {n} {key} "
                    f"(0..{n - 1})"
                )
                found.append((("except", i, key), message))
    return found
