"""The registry: what can be measured, by name, and how it is cut to fit a machine.

A name is LEVEL/MODEL/SIZE, as `transformer/wan-2.1-14b/720p`; `compile/MODEL`; or a point of a
scaling series, as `scaling/tokens/8192`. The beginning of a name stands for all that it begins.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fpsc.bench.record import Level
from fpsc.errors import UserError
from fpsc.grid import TokenGrid
from fpsc.models.build import ModelSpec
from fpsc.models.known import KNOWN

Grid = tuple[int, int, int]

KEEPS = (0.125, 0.25, 0.5)
QUICK = "quick"


@dataclass(frozen=True)
class Spec:
    """One case, before it meets a machine. None: what the model, or the machine, suggests.

    Attributes:
        name, level: of the case.
        model: a known model's name, or the user's own in `own`; "" for the op alone.
        size: a resolution of the known model.
        grid, heads, head_dim, layers, text_tokens: instead of the model's.
        keeps: of fpsattn's contenders. policies: names or files, beside them.
        variable: of a scaling series, what its points differ in.
        whole: never reduced on a CPU.
        gather: with gather + SDPA, beside the others.
        contenders: of those that are not fpsattn, only these; all where empty.
    """

    name: str
    level: Level
    model: str = ""
    own: ModelSpec | None = None
    size: str = ""
    grid: Grid | None = None
    heads: int | None = None
    head_dim: int | None = None
    layers: int | None = None
    text_tokens: int | None = None
    batch: int = 1
    steps: int | None = None
    keeps: tuple[float, ...] = KEEPS
    policies: tuple[str, ...] = ()
    noise: float = 0.5
    variable: str = ""
    whole: bool = False
    gather: bool = False
    contenders: tuple[str, ...] = field(default=())

    def names(self) -> tuple[str, ...]:
        """Of the records that it leaves."""
        if self.level is Level.compile:
            return (f"{self.name}/cold", f"{self.name}/warm")
        return (self.name,)


@dataclass(frozen=True)
class Limits:
    """The largest that a CPU is given by itself, so that a case ends within minutes."""

    tokens: int
    layers: int = 2
    heads: int | None = None
    steps: int = 6


CPU_LIMITS: Mapping[Level, Limits] = {
    Level.attention: Limits(8192, heads=4),
    Level.block: Limits(4096),
    Level.transformer: Limits(4096),
    Level.sampling: Limits(4096, layers=1),
    Level.training: Limits(2048, layers=1),
    Level.compile: Limits(128, layers=1000),
    Level.memory: Limits(4096),
}
STEPS = 20
"""Denoising steps of a sampling case on a GPU."""

SCALING_TOKENS_CPU = (2048, 4096, 8192, 16384, 32768)
SCALING_TOKENS_GPU = (4096, 8192, 16384, 32768, 75600, 151200, 302400)
SCALING_KEEPS = (0.0625, 0.125, 0.25, 0.5, 1.0)
SCALING_BATCHES = (1, 2, 4)


def registry(*, cuda: bool) -> dict[str, Spec]:
    """Every case by name. A CPU has other points in its scaling series."""
    found: list[Spec] = []
    for level in Level:
        for model, known in KNOWN.items():
            if level is Level.compile:
                found.append(Spec(f"compile/{model}", level, model, size="480p", keeps=(0.25,)))
                continue
            found += [
                Spec(f"{level}/{model}/{size}", level, model, size=size) for size in known.clips
            ]
    found += readme()
    found += scaling(SCALING_TOKENS_GPU if cuda else SCALING_TOKENS_CPU, 24 if cuda else 4)
    return {spec.name: spec for spec in found}


def readme() -> list[Spec]:
    """The op at one layer of 20,280 tokens: the table of the README."""
    given: dict[str, Any] = {"grid": (13, 30, 52), "heads": 4, "head_dim": 128, "whole": True}
    return [
        Spec(
            f"attention/13x30x52/keep-{keep:g}",
            Level.attention,
            keeps=(keep,),
            gather=True,
            **given,
        )
        for keep in (0.125, 0.25, 0.5, 1.0)
    ]


def scaling(tokens: Iterable[int], heads: int) -> list[Spec]:
    """The op along three axes: tokens, keep and batch."""
    given: dict[str, Any] = {"heads": heads, "head_dim": 128, "whole": True}
    common: dict[str, Any] = {"level": Level.attention, **given}
    points = [
        Spec(f"scaling/tokens/{n}", grid=grid_of(n), variable="tokens", **common) for n in tokens
    ]
    middle = grid_of(8192)
    points.append(
        Spec("scaling/keep/8192", grid=middle, keeps=SCALING_KEEPS, variable="keep", **common)
    )
    points += [
        Spec(
            f"scaling/batch/{n}",
            grid=grid_of(4096),
            batch=n,
            keeps=(0.25,),
            variable="batch",
            **common,
        )
        for n in SCALING_BATCHES
    ]
    return points


def grid_of(tokens: int) -> Grid:
    """A grid of exactly so many tokens, of frames that are half as high as wide where it can be."""
    shapes = [
        (tokens // (y * x), y, x)
        for y in range(1, 129)
        for x in range(y, min(2 * y, 160) + 1)
        if tokens % (y * x) == 0
    ]

    def badness(shape: Grid) -> float:
        t, y, x = shape
        return abs(x / y - 16 / 9) + abs(y / max(t, 1) - 1.5)

    return min(shapes, key=badness)


NARROW = ModelSpec(
    "WanTransformer3DModel",
    {"num_attention_heads": 4, "num_layers": 1, "ffn_dim": 3072, "text_dim": 512},
    "Wan2.1-T2V-1.3B, a third as wide, one layer",
)
"""So narrow that attention weighs at a few thousand tokens what it weighs in life at many."""


def quick() -> list[Spec]:
    """What `fpsc bench --quick` runs: every kind of answer, within five minutes on two cores."""
    plain = ("eager", "Inductor")
    narrow: dict[str, Any] = {
        "model": "wan-2.1-1.3b",
        "own": NARROW,
        "text_tokens": 64,
        "whole": True,
    }
    op: dict[str, Any] = {"heads": 4, "head_dim": 128, "whole": True}
    return [
        Spec(
            f"{QUICK}/attention",
            Level.attention,
            grid=(8, 16, 32),
            keeps=(0.125, 0.25),
            **op,
        ),
        *(
            Spec(
                f"{QUICK}/tokens/{n}",
                Level.attention,
                grid=grid_of(n),
                keeps=(0.25,),
                variable="tokens",
                contenders=("SDPA (default)",),
                **op,
            )
            for n in (1024, 2048, 4096, 8192)
        ),
        Spec(
            f"{QUICK}/transformer",
            Level.transformer,
            grid=(13, 20, 26),
            keeps=(0.125,),
            contenders=plain,
            **narrow,
        ),
        Spec(
            f"{QUICK}/sampling",
            Level.sampling,
            grid=(5, 16, 26),
            keeps=(),
            policies=("quick",),
            steps=5,
            contenders=plain,
            **narrow,
        ),
    ]


def chosen(names: Iterable[str], known: Mapping[str, Spec]) -> list[Spec]:
    """The cases of these names; the beginning of a name (up to a slash) stands for all of them.

    Raises:
        UserError: there is none of that name.
    """
    found: dict[str, Spec] = {}
    for name in names:
        prefix = name.rstrip("/") + "/"
        fitting = [spec for key, spec in known.items() if key == name or key.startswith(prefix)]
        if not fitting:
            groups = {key.split("/")[0] for key in known}
            near = difflib.get_close_matches(name, [*known, *groups], n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"case {name}: not in the registry{hint} `fpsc bench list` shows all")
        found |= {spec.name: spec for spec in fitting}
    return list(found.values())


def reduced(
    spec: Spec, full: Spec, *, cuda: bool, forced: frozenset[str] = frozenset()
) -> tuple[Spec, tuple[str, ...]]:
    """What a CPU is given of a case, and what was cut, in words.

    Args:
        spec: with every size filled in.
        full: the same, as the model is in real life.
        forced: sizes that the user set, which stay.
    """
    if cuda or spec.whole:
        return spec, _cuts(spec, full)
    limits = CPU_LIMITS[spec.level]
    changes: dict[str, Any] = {}
    assert spec.grid is not None and spec.layers is not None and spec.heads is not None
    if "grid" not in forced:
        changes["grid"] = smaller(spec.grid, limits.tokens)
    if "layers" not in forced:
        changes["layers"] = min(spec.layers, limits.layers)
    if limits.heads is not None:
        changes["heads"] = min(spec.heads, limits.heads)
    if spec.steps is not None and "steps" not in forced:
        changes["steps"] = min(spec.steps, limits.steps)
    cut = replace(spec, **changes)
    return cut, _cuts(cut, full)


def _cuts(spec: Spec, full: Spec) -> tuple[str, ...]:
    words = []
    if spec.layers != full.layers:
        words.append(f"{spec.layers} of {full.layers} layers")
    if spec.heads != full.heads:
        words.append(f"{spec.heads} of {full.heads} heads")
    if spec.grid != full.grid:
        sizes = ("x".join(map(str, grid or ())) for grid in (spec.grid, full.grid))
        words.append("grid {} instead of {}".format(*sizes))
    if spec.steps != full.steps:
        words.append(f"{spec.steps} of {full.steps} steps")
    return tuple(words)


def smaller(grid: Grid, tokens: int) -> Grid:
    """A grid of about the same shape, and at most so many tokens."""
    t, y, x = grid
    if t * y * x <= tokens:
        return grid
    scale = (tokens / (t * y * x)) ** (1 / 3)
    sizes = [max(1, int(n * scale)) for n in grid]
    even = [n - n % 2 if n > 2 else n for n in sizes[1:]]  # some models split frames into pairs
    return TokenGrid(sizes[0], *even)
