"""Settings of other methods as policies: Sliding Tile Attention and Sparse VideoGen.

What they leave open, and what a policy cannot say, stands as a comment in the policy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .axis import edge
from .errors import nearest, shown
from .schema import ROWS, Sampling
from .tables import NO_CHOICE
from .values import level

STA_TILE = (6, 8, 8)
"""Tokens of a tile in Sliding Tile Attention (fastvideo, sliding_tile_attn.py)."""

TILE = (2, 8, 8)
"""Our tile: a third of theirs along time, so that it fills a block of 128 tokens exactly."""

MAX_RULES = 12
"""More exceptions than this are a table for programs, not rules that people read."""

_KEY = re.compile(r"(\d{1,4})_(\d{1,4})_(\d{1,4})")


@dataclass(frozen=True)
class Converted:
    """A policy's text, and the table that it names, if it needs one (see `tables.write`)."""

    text: str
    edges: list[float] | None = None
    modes: list[str] | None = None
    cells: np.ndarray | None = None


def from_sta(
    text: str,
    *,
    scheduler: str,
    shift: float | None,
    name: str,
    table: str,
    grid: Sequence[int] | None = None,
    dtype: str = "bf16",
) -> Converted:
    """A mask strategy of Sliding Tile Attention, as its search writes it (FastVideo,
    STA_configuration.py): JSON {"t_l_h": [t, y, x]}, the window in tiles of 6x8x8 tokens of every
    step t, layer l and head h.

    Args:
        scheduler, shift: of the run whose steps it counts, as `sampling` of a policy has them.
        name, table: of the policy, and the file name of its table if it needs one.
        grid: the token grid; without it the largest window is taken as the whole video.
        dtype: of the sparse modes; STA itself computes in the input's dtype.

    Raises:
        ValueError: it is no such strategy, or there is no such run; the message says where.
    """
    windows, cells = _strategy(text)
    steps, layers, heads = cells.shape
    sampling = sampling_of(scheduler, steps, shift)
    whole = _whole(windows, grid)
    names = ["dense" if _covers(w, whole) else f"w{w[0]}-{w[1]}-{w[2]}" for w in windows]
    distinct = list(dict.fromkeys(names))
    cells = np.array([distinct.index(n) for n in names], np.uint8)[cells]
    base = [int(np.bincount(step.ravel()).argmax()) for step in cells]
    cells = np.where(cells == np.array(base)[:, None, None], NO_CHOICE, cells).astype(np.uint8)
    phases = _runs([(mode,) for mode in base])
    schedule = [f"  - {{steps: {a}..{b}, use: {distinct[base[a]]}}}" for a, b in phases]
    stretches = _runs([step.tobytes() for step in cells], also=[a for a, _ in phases])
    if len(stretches) > ROWS:
        raise ValueError(f"its steps differ in {len(stretches)} stretches; a policy has {ROWS}")
    rules = _rules(cells, stretches, distinct)
    lines = [
        f"# From a mask strategy of Sliding Tile Attention: {steps} steps, {layers} layers,",
        f"# {heads} heads. Its windows count tiles of 6x8x8 tokens; here they count tiles of",
        "# 2x8x8, three for one along time, and are centred on the smaller tile.",
        f"# {_said(whole, grid)}",
        "fpsc: 1",
        f"name: {name}",
        *([f"for: {{grid: {list(grid)}}}"] if grid else []),
        f"tile: {list(TILE)}",
        "modes:",
        *(_mode(n, w, dtype) for n, w in dict(zip(names, windows, strict=True)).items()),
        *_sampling_lines(sampling),
        "schedule:",
        *schedule,
    ]
    if len(rules) <= MAX_RULES:
        lines += ["except:", *rules] if rules else []
        return Converted("\n".join(lines) + "\n")
    edges = [edge(sampling, first) for first, _ in stretches] + [0.0]
    lines.append(f"table: {table}    # where single heads do otherwise than the schedule says")
    chosen = np.stack([cells[first] for first, _ in stretches])
    return Converted("\n".join(lines) + "\n", edges, distinct, chosen)


def from_svg(
    *,
    first_times: float,
    first_layers: float,
    keep: float,
    layers: int,
    name: str,
    sampling: Sampling | None = None,
    dtype: str = "bf16",
) -> str:
    """Settings of Sparse VideoGen (svg-project/Sparse-VideoGen): `first_times_fp`,
    `first_layers_fp` and `sparsity`, which is the share that is computed.

    Args:
        first_times: with `sampling` the share of its first steps that are dense, rounded down as
            in wan_t2v_inference.py; without it, as in older versions, a share of noise: dense above
            timestep 1000 (1 - first_times).
        first_layers: the share of the first layers that are dense in every step, of `layers`.
        keep: `sparsity`.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    for key, value in {"first_times": first_times, "first_layers": first_layers}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{key}: expected a share from 0 to below 1, found {value:g}")
    if not 0 < keep <= 1:
        raise ValueError(f"sparsity: expected a share above 0 and at most 1, found {keep:g}")
    dense_layers = math.floor(first_layers * layers + 1e-9)
    if sampling is not None:
        dense_steps = math.floor(first_times * sampling.steps + 1e-9)
        ranges = [f"steps: 0..{dense_steps}", f"steps: {dense_steps}..{sampling.steps}"]
        any_dense = dense_steps > 0
    else:
        at = round(1 - first_times, 5)
        ranges = [f"noise: 1.00..{level(at)}", f"noise: {level(at)}..0.00"]
        any_dense = at < 1
    lines = [
        "# From settings of Sparse VideoGen. It decides while it runs, for every head, between a",
        "# pattern along frames and one along places. A policy is fixed, so that choice is ours:",
        "# the nearest tiles, as many of them.",
        "fpsc: 1",
        f"name: {name}",
        "modes:",
        "  dense:  {keep: 1.0, dtype: bf16}",
        f"  sparse: {{pattern: near, keep: {keep:g}, dtype: {dtype}}}",
        *(_sampling_lines(sampling) if sampling else []),
        "schedule:",
        *([f"  - {{{ranges[0]}, use: dense}}"] if any_dense else []),
        f"  - {{{ranges[1]}, use: sparse}}",
    ]
    if dense_layers:
        first = f"0..{dense_layers - 1}" if dense_layers > 1 else "0"
        lines += ["except:", f"  - {{layers: {first}, use: dense}}"]
    return "\n".join(lines) + "\n"


Window = tuple[int, int, int]


def _strategy(text: str) -> tuple[list[Window], np.ndarray]:
    """Distinct windows, and int [steps, layers, heads] indices into them."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError('expected a mapping like {"0_0_0": [3, 6, 10]}, found none')
    windows: dict[Window, int] = {}
    places: list[tuple[int, int, int]] = []
    chosen: list[int] = []
    for key, value in found.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise ValueError(f'expected keys step_layer_head like "0_0_0", found {shown(key)}')
        if not _is_window(value):
            raise ValueError(f"{key}: expected a window of three tiles [t, y, x], found {value!r}")
        step, layer, head = map(int, match.groups())
        places.append((step, layer, head))
        chosen.append(windows.setdefault(tuple(value), len(windows)))
    shape = tuple(int(n) + 1 for n in np.max(places, axis=0))
    if math.prod(shape) > 4 * len(places) + 64:
        raise ValueError(f"{len(places)} cells are too few for {shape} steps, layers, heads")
    cells = np.full(shape, -1)
    cells[tuple(np.transpose(places))] = chosen
    missing = np.argwhere(cells < 0)
    if len(missing):
        key = "_".join(map(str, missing[0]))
        raise ValueError(f"{key} is missing; {len(missing)} of {cells.size} cells are")
    return list(windows), cells


def _is_window(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(n) is int and 0 < n < 1000 for n in value)
    )


def _whole(windows: Sequence[Window], grid: Sequence[int] | None) -> Window:
    """The window that covers the video, in tiles of STA."""
    if grid is not None:
        t, y, x = (math.ceil(n / size) for n, size in zip(grid, STA_TILE, strict=True))
        return t, y, x
    t, y, x = np.max(windows, axis=0).tolist()
    if (t, y, x) not in windows:
        raise ValueError(
            f"no window is the largest along every axis ({t}, {y}, {x}), so that it is not known "
            "which one covers the video; give the token grid"
        )
    return t, y, x


def _covers(window: Window, whole: Window) -> bool:
    return all(n >= size for n, size in zip(window, whole, strict=True))


def _said(whole: Window, grid: Sequence[int] | None) -> str:
    tiles = "x".join(map(str, whole))
    if grid is not None:
        return f"The video has {tiles} of their tiles; a window of all of them is dense."
    return f"Its largest window, {tiles}, is taken for the whole video: dense."


def _mode(name: str, window: Window, dtype: str) -> str:
    if name == "dense":
        return "  dense: {keep: 1.0, dtype: bf16}"
    ours = [n * (a // b) for n, a, b in zip(window, STA_TILE, TILE, strict=True)]
    return f"  {name}: {{pattern: window, window: {ours}, dtype: {dtype}}}"


def _sampling_lines(sampling: Sampling) -> list[str]:
    settings = sampling.model_dump(exclude_none=True, exclude_defaults=True)
    return [f"sampling: {{{', '.join(f'{k}: {v}' for k, v in settings.items())}}}"]


def _runs(values: Sequence[Any], also: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Stretches of equal values, half-open; new ones begin at the places in `also`, too."""
    starts = [
        i for i in range(len(values)) if i == 0 or values[i] != values[i - 1] or i in set(also)
    ]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


def _rules(cells: np.ndarray, stretches: Sequence[tuple[int, int]], names: list[str]) -> list[str]:
    """Rules for all cells that differ from the schedule; gives up past MAX_RULES."""
    rules: list[str] = []
    for first, stop in stretches:
        for mode in np.unique(cells[first][cells[first] != NO_CHOICE]):
            at = cells[first] == mode
            for heads in np.unique(at[at.any(axis=1)], axis=0):
                layers = np.flatnonzero((at == heads).all(axis=1)).tolist()
                who = "" if heads.all() else f", heads: {np.flatnonzero(heads).tolist()}"
                where = f"steps: {first}..{stop}, layers: {layers}{who}"
                rules.append(f"  - {{{where}, use: {names[int(mode)]}}}")
                if len(rules) > MAX_RULES:
                    return rules
    return rules


def sampling_of(scheduler: str, steps: int, shift: float | None) -> Sampling:
    """A run from loose settings.

    Raises:
        ValueError: there is no such scheduler, or a number is out of range.
    """
    names = Sampling.model_json_schema()["properties"]["scheduler"]["enum"]
    if scheduler not in names:
        raise ValueError(f"no scheduler {scheduler}{nearest(scheduler, names)}")
    given: Mapping[str, Any] = {"scheduler": scheduler, "steps": steps}
    try:
        return Sampling.model_validate({**given, **({"shift": shift} if shift else {})})
    except ValueError:
        raise ValueError(
            f"expected 1 to 1000 steps and a shift above 0, at most 100; found {steps} and {shift}"
        ) from None
