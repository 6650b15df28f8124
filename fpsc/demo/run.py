"""One clip twice from the same noise: dense, and with `backend="fpsattn"`.

Both sides get the same treatment: `torch.compile(model)` with Inductor, in float32 on the CPU. The
first forward of each, which compiles, is timed apart from the sampling.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from fpsc.demo.clips import FRAMES, HEIGHT, WIDTH, Scene, encode_prompt
from fpsc.demo.model import (
    TRAIN_TIMESTEPS,
    build_scheduler,
    decode_clip,
    load_model,
    with_places,
)
from fpsc.quality.metrics import psnr, ssim
from fpsc.quality.pictures import difference, write_gif, write_sheet

if TYPE_CHECKING:
    from fpsc.report import Report

POLICY = "demo"
OnStep = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""


def start_noise(seed: int) -> torch.Tensor:
    """float32 [1, 3, FRAMES, HEIGHT, WIDTH], standard normal; the same on every machine."""
    drawn = np.random.RandomState(seed).standard_normal((1, 3, FRAMES, HEIGHT, WIDTH))
    return torch.from_numpy(drawn.astype(np.float32))


# Not inference_mode: what it makes differs from the first noise in a way that compiled code guards.
@torch.no_grad()
def sample(
    model: Callable[..., Any],
    text: torch.Tensor,
    noise: torch.Tensor,
    steps: int,
    *,
    on_step: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Sample one clip.

    Args:
        model: a (compiled) `WanTransformer3DModel` that predicts clean latents.
        text: float32 [tokens, dim], an encoded prompt.
        noise: float32 [1, 3, F, H, W], where to start.
        steps: forwards of the model.

    Returns:
        float32 [3, F, H, W] in [-1, 1].
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    latent = noise
    for done, timestep in enumerate(scheduler.timesteps):
        clean = model(with_places(latent), timestep[None], text[None], return_dict=False)[0]
        latent = scheduler.step(clean, timestep, latent, return_dict=False)[0]
        on_step(done + 1)
    return decode_clip(latent[0])


@dataclass(frozen=True)
class Side:
    """One of the two generations: the clip float32 [3, F, H, W] and its wall times in seconds."""

    clip: torch.Tensor
    compile_seconds: float
    sample_seconds: float


def generate(
    label: str,
    model: WanTransformer3DModel,
    text: torch.Tensor,
    noise: torch.Tensor,
    steps: int,
    on_step: OnStep,
    **compile_options: Any,
) -> Side:
    """`torch.compile(model, **compile_options)`, then sample a clip with what that gives."""
    compiled = torch.compile(model, **compile_options)
    on_step(f"{label}: compiling", 0, steps)
    began = time.perf_counter()
    with torch.no_grad():
        # int64 as the scheduler's timesteps are, or the first step would compile again.
        first = torch.tensor([TRAIN_TIMESTEPS - 1])
        compiled(with_places(noise), first, text[None], return_dict=False)
    compiled_at = time.perf_counter()
    clip = sample(
        compiled,
        text,
        noise,
        steps,
        on_step=lambda done: on_step(f"{label}: sampling", done, steps),
    )
    return Side(clip, compiled_at - began, time.perf_counter() - compiled_at)


@dataclass(frozen=True)
class Result:
    """What a run of the demo found."""

    scene: Scene
    seed: int
    steps: int
    dense: Side
    fast: Side
    reports: list[Report]
    files: list[Path]

    @property
    def psnr(self) -> float:
        """Between the two clips, in dB."""
        return psnr(self.dense.clip, self.fast.clip)

    @property
    def ssim(self) -> float:
        """Between the two clips."""
        return ssim(self.dense.clip, self.fast.clip)

    @property
    def replaced(self) -> int:
        """Attentions that run as `fpsc::attention`, over all compiled graphs."""
        return sum(report.replaced for report in self.reports)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `psnr_db` is null where the clips are equal."""
        decibel = self.psnr
        return {
            "prompt": self.scene.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "policy": POLICY,
            "threads": torch.get_num_threads(),
            "reports": [report.to_dict() for report in self.reports],
            "seconds": {
                name: {
                    "compile": round(side.compile_seconds, 3),
                    "sample": round(side.sample_seconds, 3),
                }
                for name, side in (("dense", self.dense), ("fpsattn", self.fast))
            },
            "psnr_db": None if math.isinf(decibel) else round(decibel, 2),
            "ssim": round(self.ssim, 4),
            "files": [str(path) for path in self.files],
        }


def run(
    scene: Scene,
    seed: int,
    steps: int,
    out: Path,
    on_step: OnStep = lambda label, done, total: None,
    weights: Path | None = None,
) -> Result:
    """Generate both clips and write `out/demo.gif`, `out/demo.png` and `out/demo.json`.

    Raises:
        FileNotFoundError: there are no weights.
        OSError: `out` cannot be written.
    """
    import fpsc

    out.mkdir(parents=True, exist_ok=True)
    model = load_model(weights)
    text, noise = encode_prompt(scene), start_noise(seed)
    dense = generate("dense", model, text, noise, steps, on_step)
    torch.compiler.reset()
    fpsc.reports(clear=True)
    fast = generate(
        "fpsattn",
        model,
        text,
        noise,
        steps,
        on_step,
        backend="fpsattn",
        options={"policy": POLICY},
    )
    result = Result(
        scene=scene,
        seed=seed,
        steps=steps,
        dense=dense,
        fast=fast,
        reports=list(fpsc.reports()),
        files=[out / "demo.gif", out / "demo.png", out / "demo.json"],
    )
    clips = {
        "dense": dense.clip,
        "fpsattn": fast.clip,
        "difference x 4": difference(fast.clip, dense.clip, 4),
    }
    write_gif(clips, result.files[0], scene.prompt)
    write_sheet(clips, result.files[1], scene.prompt)
    result.files[2].write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    return result
