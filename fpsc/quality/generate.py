"""One clip twice from the same noise: the pipeline dense, and with this backend.

Both sides are compiled, the dense one by Inductor, so that what differs is the attention and not
the rounding of fused operations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fpsc
from fpsc.quality.clips import Clip
from fpsc.report import Report

OnStep = Callable[[str, int], None]
"""Called with (`dense` or `fpsattn`, steps done)."""


@dataclass(frozen=True)
class Pair:
    """Two clips of one size, and what the backend replaced in each transformer."""

    dense: Clip
    fast: Clip
    reports: list[Report]

    @property
    def replaced(self) -> int:
        return sum(report.replaced for report in self.reports)


def pair(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    seed: int = 0,
    policy: str | None = None,
    on_step: OnStep = lambda side, done: None,
) -> Pair:
    """Sample a clip with a diffusers pipeline, dense and then accelerated.

    Args:
        pipe: a video pipeline; its transformers are compiled in place, and left as they came.
        arguments: of its call (prompt or prompt_embeds, num_frames, height ...).
        seed: of the noise, drawn on the CPU for both.
        policy: as for `fpsc.compile`.

    Raises:
        TypeError: the pipeline has no transformer.
    """
    models = transformers(pipe)
    given = dict(arguments)
    accepts = inspect.signature(type(pipe).__call__).parameters

    def draw(side: str) -> Clip:
        def after_step(_: Any, step: int, __: Any, kept: dict[str, Any]) -> dict[str, Any]:
            on_step(side, step + 1)
            return kept

        if "callback_on_step_end" in accepts:
            given["callback_on_step_end"] = after_step
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            frames = pipe(**given, generator=generator, output_type="pt").frames
        # [1, F, 3, H, W] in [0, 1]
        return Clip(frames[0].float().cpu().transpose(0, 1) * 2 - 1, None, side)

    before = [model._compiled_call_impl for model in models]
    fpsc.reports(clear=True)
    try:
        for model in models:
            model.compile()
        dense = draw("dense")
        torch.compiler.reset()
        for model in models:
            fpsc.compile(model, policy=policy)
        fast = draw("fpsattn")
    finally:
        for model, call in zip(models, before, strict=True):
            model._compiled_call_impl = call
    return Pair(dense, fast, list(fpsc.reports()))


def transformers(pipe: Any) -> list[nn.Module]:
    """The denoising models of a pipeline: its `transformer`, and `transformer_2` where there is
    one.

    Raises:
        TypeError: there is none.
    """
    found = [
        component
        for name, component in pipe.components.items()
        if name.startswith("transformer") and isinstance(component, nn.Module)
    ]
    if not found:
        raise TypeError(
            f"{type(pipe).__name__}: expected a pipeline with a transformer, found "
            + ", ".join(pipe.components)
        )
    return found
