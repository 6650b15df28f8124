"""How a model wants its latents: [B, C, F, H, W], frames first, or packed as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from fpsc.grid import TokenGrid
from fpsc.models.build import ModelSpec
from fpsc.models.inputs import family, patch
from fpsc.roots import argument_names


class Arrangement(Protocol):
    """Between latents [B, C, F, H, W] and what a model is given and gives."""

    def given(self, latents: Tensor) -> Tensor:
        """As the model takes them."""

    def taken(self, output: Tensor, size: Sequence[int]) -> Tensor:
        """Its output as [B, C, F, H, W]; size: (F, H, W) of its input."""

    def arguments(self, size: Sequence[int]) -> dict[str, int]:
        """What it must be told besides."""

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """(T, Y, X) of latents [B, C, F, H, W], where the model's input does not show it."""


class ChannelsFirst:
    """As they are."""

    def given(self, latents: Tensor) -> Tensor:
        return latents

    def taken(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output

    def arguments(self, size: Sequence[int]) -> dict[str, int]:
        return {}

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        return None


class FramesFirst(ChannelsFirst):
    """[B, F, C, H, W], as CogVideoX has them."""

    def given(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)

    def taken(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output.transpose(1, 2)


class Packed(ChannelsFirst):
    """[B, N, C t y x], a token for each patch (t, y, x), as LTX has them; sizes are arguments."""

    def __init__(self, patch: TokenGrid) -> None:
        self._patch = patch

    def given(self, latents: Tensor) -> Tensor:
        t, y, x = self._patch
        split = latents.unflatten(4, (-1, x)).unflatten(3, (-1, y)).unflatten(2, (-1, t))
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def taken(self, output: Tensor, size: Sequence[int]) -> Tensor:
        split = output.unflatten(1, self._grid(size)).unflatten(4, (-1, *self._patch))
        return split.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)

    def arguments(self, size: Sequence[int]) -> dict[str, int]:
        return dict(zip(("num_frames", "height", "width"), self._grid(size), strict=True))

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        return self._grid(shape[2:])

    def _grid(self, size: Sequence[int]) -> tuple[int, int, int]:
        t, y, x = (n // p for n, p in zip(size, self._patch, strict=True))
        return t, y, x


def arrangement_of(spec: ModelSpec, model: nn.Module) -> Arrangement:
    """The arrangement of a model of diffusers."""
    known = family(spec.class_name, spec.config)
    if {"num_frames", "height", "width"} <= set(argument_names(model)):
        return Packed(patch(spec.config))
    return FramesFirst() if known is not None and known.frames_first else ChannelsFirst()
