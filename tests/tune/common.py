"""A tiny model to tune, and calibrations that nothing was measured for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpsc.tune import modes
from fpsc.tune.calibrate import Settings
from fpsc.tune.cost import Cost, counted
from fpsc.tune.record import Calibration, Facts, Run
from fpsc.tune.subjects import Subject, latents
from tests.wan import TEXT, small_wan

GRID, TILE = (3, 8, 10), (1, 4, 5)  # 12 tiles
CANDIDATES = modes.product(("near", "frame"), (0.25, 0.5))


def samples(n: int) -> list[dict[str, torch.Tensor]]:
    """Clips of noise with text of noise: every one another."""
    generator = torch.Generator().manual_seed(5)
    t, y, x = GRID
    return [
        {
            "latents": torch.randn(1, 4, t, 2 * y, 2 * x, generator=generator),
            "encoder_hidden_states": torch.randn(1, TEXT, 32, generator=generator),
        }
        for _ in range(n)
    ]


def subject(prompts: int = 4, **changes: Any) -> Subject:
    """A Wan of two layers with two heads, on 240 tokens."""
    return latents(small_wan(**changes), samples(prompts), levels=4)


def settings(**changes: Any) -> Settings:
    """Two prompts, two bins, costs counted: everything is the same on every machine."""
    given: dict[str, Any] = {
        "candidates": CANDIDATES,
        "prompts": 2,
        "carried": 1,
        "bins": 2,
        "cost": "pairs",
        "tile": TILE,
    }
    return Settings(**{**given, **changes})


class Stop(Exception):
    """An interruption, as Ctrl-C is one."""


def stopping(after: int) -> Callable[..., None]:
    """Listens to progress, and stops it at some message."""
    told = 0

    def tell(what: str, done: int = 0, total: int = 0) -> None:
        nonlocal told
        told += 1
        if told > after:
            raise Stop(what)

    return tell


def made(
    bins: int = 3,
    layers: int = 4,
    heads: int = 3,
    seed: int = 0,
    cost: Cost | None = None,
    candidates: modes.Candidates = CANDIDATES,
) -> Calibration:
    """A calibration of made-up numbers: what keeps less loses more, in every cell differently."""
    rng = np.random.default_rng(seed)
    policy = modes.policy(candidates, tile=TILE)
    keep = np.array([1.0 if m.keep is None else m.keep for m in policy.modes.values()])
    fp8 = np.array([m.dtype == "fp8" for m in policy.modes.values()])
    shape = (2, bins, layers, heads, len(keep))
    matters = 10 ** rng.uniform(-6, -3, (1, bins, layers, heads, 1))
    taste = rng.uniform(0.5, 2, (1, 1, layers, heads, len(keep)))
    damage = matters * ((1 - keep) * taste + 0.02 * fp8) * rng.uniform(0.9, 1.1, shape)
    edges = tuple(round(1 - i / bins, 5) for i in range(bins + 1))
    steps = tuple(round(1 - i / (2 * bins), 6) for i in range(2 * bins))
    run = Run(
        steps=steps,
        edges=edges,
        levels=steps[1::2],
        layers=layers,
        heads=heads,
        head_dim=64,
        grid=GRID,
        tile=TILE,
        prefix=0,
        suffix=0,
        references=("near-0_5", "near-0_25"),
        keep=tuple(keep.tolist()),
        pairs=tuple(keep.tolist()),
        cost=cost or counted(policy, keep.tolist()),
    )
    strengths = [list(candidates).index(name) for name in run.references]
    reference = damage[..., strengths].sum(axis=(2, 3))  # [prompts, bins, 2]
    left = np.linspace(2, 0.5, bins)[:, None] * np.array([1.0, 0.8])
    facts = Facts(
        model="made up",
        origin="",
        model_class="WanTransformer3DModel",
        device="cpu",
        dtype="float32",
        tile=TILE,
        modes=candidates,
        run=run,
        prompts=2,
        probes=1,
        seed=seed,
        queries=1.0,
        versions={"fpsc": "0"},
    )
    return Calibration(
        facts=facts,
        damage=damage.astype(np.float32),
        attention=damage.astype(np.float32),
        carried=(reference * left).astype(np.float32),
        maps=rng.random((bins, layers, heads, 12)).astype(np.float32),
    )


def saved(calibration: Calibration, folder: Path) -> Path:
    path = folder / "made.safetensors"
    calibration.save(path)
    return path
