"""The synthetic clips of `fpsc demo` as a source: no files, no download."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from fpsc.demo.clips import FRAMES, clip, encode_prompt
from fpsc.demo.model import encode_clip, places
from fpsc.train.data.sample import Bucket, Sample

CLIPS = 2**31
"""Clips on either side: training has seeds from 0, validation from here, as in the recipe of the
demo's weights (`fpsc.demo.train.HELD_OUT`)."""


class Demo:
    """Clips of 16 frames of 64x64, drawn as they are asked for.

    Args:
        held_out: those that no training sees.
        frames: of each, 1 to 16.
    """

    def __init__(self, *, held_out: bool = False, frames: int = FRAMES) -> None:
        self.first = CLIPS if held_out else 0
        self.frames = frames

    def __len__(self) -> int:
        return CLIPS

    @property
    def buckets(self) -> list[Bucket]:
        return [Bucket(first=0, shards=(CLIPS,), together=1, name="demo")]

    def sample(self, index: int) -> Sample:
        seed = self.first + range(CLIPS)[index]
        rgb, scene = clip(seed, self.frames)
        return Sample(
            key=f"demo#{seed}",
            latents=encode_clip(rgb),
            conditioning={"encoder_hidden_states": encode_prompt(scene)},
            beside=places(self.frames)[0],
            empty={"encoder_hidden_states": _empty()},
        )


@cache
def _empty() -> Tensor:
    return encode_prompt(None)
