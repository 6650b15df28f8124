"""A tiny model, compiled as users compile it, through noise levels and changes of resolution.

What Dynamo compiles is counted. Without Inductor the rewritten graphs run as they are, with the
CPU kernel.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx

import fpsc
from fpsc import backend
from fpsc.grid import TokenGrid
from fpsc.passes.graph import example
from fpsc.passes.manager import Analysis
from fpsc.passes.thread import argument_name
from fpsc.report import Site
from fpsc.runtime import ModelState, Span
from tests.families import MODELS, Model
from tests.thresholds import relative_rms

GRIDS = ((3, 4, 5), (5, 6, 4), (4, 3, 7), (3, 4, 5))
"""Every size changes, so that Dynamo takes every size for dynamic; then the first grid again."""
NOISE = (0.999, 0.75, 0.5, 0.25, 0.001)
BY_KEY = {model.key: model for model in MODELS}


@dataclass
class Stage:
    """What happened on one grid.

    Attributes:
        compiles: graphs that Dynamo compiled in the first call.
        later: and in the calls with other timesteps.
        sites: attentions of the graphs that were compiled.
        spans: grids, with prefix and suffix, that the kernels were given.
    """

    grid: tuple[int, int, int]
    compiles: int = 0
    later: int = 0
    sites: list[Site] = field(default_factory=list)
    spans: set[Span] = field(default_factory=set)

    @property
    def replaced(self) -> int:
        return sum(site.replaced for site in self.sites)


@dataclass
class Run:
    """Attributes:
    stages: one for each of `GRIDS`.
    error: largest relative RMS against eager, everything dense.
    timestep: the input that holds it, and its number of axes; "" where no graph has it.
    """

    stages: list[Stage]
    error: float
    timestep: str


@functools.cache
def run(key: str, *, inductor: bool = False) -> Run:
    """Run one model of `tests.families` through `GRIDS`; `NOISE` on the first, one on the others.

    Args:
        key: of the model.
        inductor: compile the rewritten graphs; else they run as they are.
    """
    model = BY_KEY[key]
    built = model.build(GRIDS[0])
    options = {"policy": "dense", "mode": "lite", **model.options(TokenGrid(*GRIDS[0]))}
    stages, errors, timesteps = [], [0.0], [""]
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(**model.flags), _watched(inductor) as seen:
        compiled = torch.compile(built, backend="fpsattn", options=options)
        for place, grid in enumerate(_grids(model)):
            stage = Stage(grid)
            inputs = model.inputs(grid)
            for step, noise in enumerate(NOISE if place == 0 else NOISE[1:2]):
                seen.clear()
                fpsc.reports(clear=True)
                given = at_noise(inputs, 2 * noise)
                expected = built(**copy.deepcopy(given))
                found = compiled(**copy.deepcopy(given))
                errors.append(relative_rms(first(found), first(expected)))
                stage.later += len(seen.graphs) if step else 0
                stage.compiles += 0 if step else len(seen.graphs)
                stage.sites += [s for report in fpsc.reports() for s in report.sites]
                stage.spans |= seen.spans
                timesteps += seen.timesteps
            stages.append(stage)
    return Run(stages, max(errors), max(timesteps))


def _grids(model: Model) -> Sequence[tuple[int, int, int]]:
    """`GRIDS`, with the frames of the first one where a model is built for a number of frames."""
    frames = GRIDS[0][0]
    fixed = model.sized(TokenGrid(*GRIDS[0])) != {}
    return [(frames, y, x) if fixed else (t, y, x) for t, y, x in GRIDS]


def at_noise(inputs: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The arguments with every timestep multiplied by `share`."""

    def moved(name: str, value: Any) -> Any:
        is_timestep = "timestep" in name and "indices" not in name and isinstance(value, Tensor)
        return (value * share).to(value.dtype) if is_timestep else value

    return {name: moved(name, value) for name, value in inputs.items()}


@dataclass
class _Seen:
    graphs: list[fx.GraphModule] = field(default_factory=list)
    spans: set[Span] = field(default_factory=set)
    timesteps: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.graphs, self.spans, self.timesteps = [], set(), []


@contextmanager
def _watched(inductor: bool) -> Iterator[_Seen]:
    """Note the graphs that are compiled, and the spans that calls of them look up."""
    seen = _Seen()
    compile_fx, plan, analyse = backend.inductor, ModelState.plan, backend.manager.analyse

    def compiling(gm: fx.GraphModule, example_inputs: Any, config_patches: Any = None) -> Any:
        seen.graphs.append(gm)
        if inductor:
            return compile_fx(gm, example_inputs, config_patches=config_patches)
        return gm.forward

    def planning(state: ModelState, span: Span, *args: Any) -> Any:
        seen.spans.add(span)
        return plan(state, span, *args)

    def analysing(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        analysis = analyse(gm, *args, **kwargs)
        if analysis.timestep is not None:
            seen.timesteps.append(timestep_of(analysis, args[2]))
        return analysis

    with (
        patch.object(backend, "inductor", compiling),
        patch.object(ModelState, "plan", planning),
        patch.object(backend.manager, "analyse", analysing),
    ):
        yield seen


def timestep_of(analysis: Analysis, names: Sequence[str]) -> str:
    """The input of a graph that holds the timestep, for people."""
    value = example(analysis.timestep)
    assert isinstance(value, Tensor)
    return f"{argument_name(analysis.timestep, names)}, {value.ndim} axes"


def first(output: Any) -> Tensor:
    """The first tensor of what a model returns."""
    if isinstance(output, Tensor):
        return output
    return first(output[0] if isinstance(output, tuple | list) else output.sample)
