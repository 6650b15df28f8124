"""Sets of clips that a demo model draws: the same prompts always, from noise by number of the set.

Two models that draw one set start from the same noise, clip by clip. A set is drawn clip by clip
into a folder, and a run that was stopped goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fpsc.demo.clips import Scene, encode_prompt, random_scene
from fpsc.demo.run import sample, start_noise
from fpsc.quality.clips import Clip, read, write_tensor

PROMPTS = 2**31 + 2**20
"""Seed of the first prompt: held out, and behind the clips of the validation loss."""

MOST = 10_000
"""Clips of a set: seeds of noise count on from it."""


@dataclass(frozen=True)
class ClipSet:
    """Which clips: number of the set, how many, and the sampling steps of each."""

    number: int
    clips: int
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.clips <= MOST:
            raise ValueError(f"a set has 1 to {MOST} clips; found {self.clips}")

    @property
    def scenes(self) -> list[Scene]:
        """What the prompts say."""
        seeds = range(PROMPTS, PROMPTS + self.clips)
        return [random_scene(np.random.RandomState(seed)) for seed in seeds]

    def noise(self, index: int) -> Tensor:
        """float32 [1, 3, FRAMES, HEIGHT, WIDTH], where clip `index` starts."""
        return start_noise((self.number + 1) * MOST + index)

    def file(self, folder: Path, index: int) -> Path:
        return folder / f"{index:04d}.safetensors"

    def missing(self, folder: Path) -> list[int]:
        """The clips that are not in the folder yet."""
        return [i for i in range(self.clips) if not self.file(folder, i).is_file()]

    def draw(
        self,
        model: Callable[..., Any],
        folder: Path,
        on_clip: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Draw what is missing with a (compiled) demo model, in 8 bits."""
        scenes, missing = self.scenes, self.missing(folder)
        for position, index in enumerate(missing):
            on_clip(self.clips - len(missing) + position)
            clip = sample(model, encode_prompt(scenes[index]), self.noise(index), self.steps)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensor(Clip(clip, None, ""), self.file(folder, index))
        on_clip(self.clips)

    def read(self, folder: Path) -> Iterator[Tensor]:
        """The clips, float32 [3, FRAMES, HEIGHT, WIDTH] in [-1, 1].

        Raises:
            ClipError: one is not there, or cannot be read.
        """
        for index in range(self.clips):
            yield self.clip(folder, index)

    def clip(self, folder: Path, index: int) -> Tensor:
        """One of them."""
        return read(self.file(folder, index)).frames
