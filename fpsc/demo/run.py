"""One clip twice from the same noise: dense, and with `backend="fpsattn"`.

Both sides get the same treatment: `torch.compile(model)` with Inductor, in float32 on the CPU. The
first forward of each, which compiles, is timed apart from the sampling.

Where there are weights that were tuned jointly with a policy, that policy is the one of the second
side, and a third one shows it with these weights: in the same compiled code, so it costs a sampling
and nothing more.
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
    tuned_weights,
    with_places,
)
from fpsc.policy import Policy, find
from fpsc.policy.load import BESIDE
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
    """One of the generations: the clip float32 [3, F, H, W] and its wall times in seconds."""

    clip: torch.Tensor
    compile_seconds: float
    sample_seconds: float


@dataclass(frozen=True)
class Start:
    """What all sides start from, and how many steps they take."""

    text: torch.Tensor
    noise: torch.Tensor
    steps: int
    on_step: OnStep


def generate(label: str, compiled: Callable[..., Any], start: Start, *, fresh: bool = True) -> Side:
    """Sample a clip with what `torch.compile` returned.

    fresh: nothing has called it yet, so that the first call compiles.
    """
    began = time.perf_counter()
    if fresh:
        start.on_step(f"{label}: compiling", 0, start.steps)
        with torch.no_grad():
            # int64 as the scheduler's timesteps are, or the first step would compile again.
            first = torch.tensor([TRAIN_TIMESTEPS - 1])
            compiled(with_places(start.noise), first, start.text[None], return_dict=False)
    compiled_at = time.perf_counter()
    clip = sample(
        compiled,
        start.text,
        start.noise,
        start.steps,
        on_step=lambda done: start.on_step(f"{label}: sampling", done, start.steps),
    )
    return Side(clip, compiled_at - began, time.perf_counter() - compiled_at)


@dataclass(frozen=True)
class Result:
    """What a run of the demo found.

    Attributes:
        policy: the name of that of `fast` and `tuned`.
        tuned: None where there are no tuned weights.
    """

    scene: Scene
    seed: int
    steps: int
    policy: str
    dense: Side
    fast: Side
    tuned: Side | None
    reports: list[Report]
    files: list[Path]

    def likeness(self, side: Side) -> tuple[float, float]:
        """PSNR in dB and SSIM between a side's clip and the dense one."""
        return psnr(self.dense.clip, side.clip), ssim(self.dense.clip, side.clip)

    @property
    def replaced(self) -> int:
        """Attentions that run as `fpsc::attention`, over all compiled graphs."""
        return sum(report.replaced for report in self.reports)

    @property
    def sides(self) -> dict[str, Side]:
        """All of them by name."""
        sides = {"dense": self.dense, "fpsattn": self.fast}
        return sides | ({"tuned": self.tuned} if self.tuned else {})

    @property
    def clips(self) -> dict[str, torch.Tensor]:
        """What the pictures show, under labels."""
        dense, fast = self.dense.clip, self.fast.clip
        if self.tuned is None:
            return {
                "dense": dense,
                "fpsattn": fast,
                "difference x 4": difference(fast, dense, 4),
            }
        return {
            "dense": dense,
            "sparse FP8, not trained for it": fast,
            "sparse FP8, jointly tuned": self.tuned.clip,
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `psnr_db` and `ssim` are to the dense clip; no number for equal ones."""
        return {
            "prompt": self.scene.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "policy": self.policy,
            "threads": torch.get_num_threads(),
            "reports": [report.to_dict() for report in self.reports],
            "seconds": {
                name: {
                    "compile": round(side.compile_seconds, 3),
                    "sample": round(side.sample_seconds, 3),
                }
                for name, side in self.sides.items()
            },
            **self._likeness(self.fast),
            "tuned": self._likeness(self.tuned) if self.tuned else None,
            "files": [str(path) for path in self.files],
        }

    def _likeness(self, side: Side) -> dict[str, float | None]:
        decibel, similarity = self.likeness(side)
        return {
            "psnr_db": None if math.isinf(decibel) else round(decibel, 2),
            "ssim": round(similarity, 4),
        }


def run(
    scene: Scene,
    seed: int,
    steps: int,
    out: Path,
    on_step: OnStep = lambda label, done, total: None,
    weights: Path | None = None,
    tuned: Path | None = None,
) -> Result:
    """Generate the clips and write `out/demo.gif`, `out/demo.png` and `out/demo.json`.

    Args:
        weights: a diffusers folder; without it those that ship.
        tuned: one of weights that were tuned from those, with their policy beside them; without it
            those that ship, if `weights` are theirs too.

    Raises:
        FileNotFoundError: there are no weights, or no policy beside the tuned ones.
        PolicyError: that policy is not valid.
        ValueError: the tuned weights are of another model.
        OSError: `out` cannot be written.
    """
    import fpsc

    if tuned is None and weights is None:
        tuned = tuned_weights()
    policy = find(POLICY) if tuned is None else _policy_beside(tuned)
    out.mkdir(parents=True, exist_ok=True)
    model = load_model(weights)
    after = None if tuned is None else _state_of(tuned, model)
    start = Start(encode_prompt(scene), start_noise(seed), steps, on_step)
    dense = generate("dense", torch.compile(model), start)
    torch.compiler.reset()
    fpsc.reports(clear=True)
    options: dict[str, Any] = {"policy": policy}
    compiled = torch.compile(model, backend="fpsattn", options=options)
    fast, then = generate("fpsattn", compiled, start), None
    if after is not None:
        model.load_state_dict(after)  # in place: the compiled code reads the new weights
        then = generate("tuned", compiled, start, fresh=False)
    result = Result(
        scene=scene,
        seed=seed,
        steps=steps,
        policy=policy.name,
        dense=dense,
        fast=fast,
        tuned=then,
        reports=list(fpsc.reports()),
        files=[out / "demo.gif", out / "demo.png", out / "demo.json"],
    )
    write_gif(result.clips, result.files[0], scene.prompt)
    write_sheet(result.clips, result.files[1], scene.prompt)
    result.files[2].write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    return result


def _policy_beside(folder: Path) -> Policy:
    if not (folder / BESIDE).is_file():
        raise FileNotFoundError(
            f"no {BESIDE} in {folder}; expected a folder of weights that `fpsc train` wrote, with "
            "the policy that they were tuned for"
        )
    return Policy.load(folder / BESIDE)


def _state_of(folder: Path, model: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """The weights of a folder, which must fit a model."""
    state: dict[str, torch.Tensor] = load_model(folder).state_dict()
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        there, here = _size(state.get(name)), _size(expected.get(name))
        if there != here:
            raise ValueError(
                f"{folder} holds another model than the demo's: {name} is {there}, expected "
                f"{here}. Train one from `model: demo`"
            )
    return state


def _size(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else "x".join(map(str, tensor.shape))
