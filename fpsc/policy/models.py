"""Sizes of published video transformers: what a policy is shown against where nobody gives sizes.

They are used to count, never to match: what runs is read from the model itself. Taken from the
configurations that are published with the weights, and the sampling from their pipelines' defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..grid import TokenGrid
from .schema import Sampling


@dataclass(frozen=True)
class ModelSize:
    """What the work of one forward follows from.

    Attributes:
        name: for people, with the resolution.
        layers, heads, head_dim: of the video self-attention.
        grid: the token grid of its usual clip.
        ffn: hidden units of the feed-forward; 0 leaves it and all else but attention uncounted.
        ffn_matrices: 2, or 3 where it is gated.
        text: text tokens, in the video's sequence where `joint`, else in a cross-attention.
        joint: whether text and video are one sequence.
        sampling: how it is usually sampled.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    grid: TokenGrid
    ffn: int = 0
    ffn_matrices: int = 2
    text: int = 0
    joint: bool = False
    sampling: Sampling = field(default_factory=lambda: _euler(50))

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def other_flops(self) -> int:
        """Work of one layer besides its self-attention's two products: projections,
        feed-forward, cross-attention. A product of [m, k] and [k, n] is 2 m k n."""
        if not self.ffn:
            return 0
        tokens = self.grid.tokens + (self.text if self.joint else 0)
        per_token = 4 * self.width**2 + self.ffn_matrices * self.width * self.ffn
        cross = 0
        if self.text and not self.joint:  # q and o; k and v of the text; the two products
            cross = 2 * tokens * self.width**2 + 2 * self.text * self.width**2
            cross += 2 * tokens * self.text * self.width
        return 2 * (tokens * per_token + cross)

    def with_(self, **changes: Any) -> ModelSize:
        """A copy with the values that are not None."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


def _wan(
    name: str, layers: int, heads: int, ffn: int, grid: TokenGrid, steps: int, shift: float
) -> ModelSize:
    sampling = Sampling(scheduler="UniPCMultistepScheduler", steps=steps, shift=shift)
    return ModelSize(name, layers, heads, 128, grid, ffn, text=512, sampling=sampling)


def _euler(steps: int, **more: Any) -> Sampling:
    return Sampling(scheduler="FlowMatchEulerDiscreteScheduler", steps=steps, **more)


MODELS: dict[str, ModelSize] = {
    "wan-2.1-1.3b": _wan(
        "Wan2.1-T2V-1.3B, 81 frames of 480 x 832", 30, 12, 8960, TokenGrid(21, 30, 52), 50, 3.0
    ),
    "wan-2.1-14b": _wan(
        "Wan2.1-T2V-14B, 81 frames of 720 x 1280", 40, 40, 13824, TokenGrid(21, 45, 80), 50, 5.0
    ),
    "wan-2.2": _wan(
        "Wan2.2-T2V-A14B, 81 frames of 720 x 1280", 40, 40, 13824, TokenGrid(21, 45, 80), 40, 12.0
    ),
    "hunyuan-video": ModelSize(
        "HunyuanVideo, 129 frames of 720 x 1280", 60, 24, 128, TokenGrid(33, 45, 80), 12288,
        text=256, joint=True, sampling=_euler(50, shift=7.0, sigmas="uniform"),
    ),
    "cogvideox": ModelSize(
        "CogVideoX-5B, 49 frames of 480 x 720", 42, 48, 64, TokenGrid(13, 30, 45), 12288,
        text=226, joint=True, sampling=Sampling(scheduler="CogVideoXDPMScheduler", steps=50),
    ),
    "ltx-video": ModelSize(
        "LTX-Video 2B, 161 frames of 512 x 704", 28, 32, 64, TokenGrid(21, 16, 22), 8192,
        text=128, sampling=_euler(50, shift=7.8, sigmas="uniform"),
    ),
    "mochi": ModelSize(
        "Mochi 1, 163 frames of 480 x 848", 48, 24, 128, TokenGrid(28, 30, 53), 8192, 3,
        text=256, joint=True, sampling=_euler(64, sigmas="linear-quadratic"),
    ),
}  # fmt: skip
"""By the name of the preset for it."""

DEFAULT = "wan-2.1-14b"


def size_for(preset: str) -> ModelSize:
    """The model that a preset is named after; for any other name the default."""
    return MODELS.get(preset.removesuffix("-tuned"), MODELS[DEFAULT])
