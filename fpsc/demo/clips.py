"""Synthesised clips with a text prompt each: what the demo model is trained on.

A clip is 16 frames of 64x64 RGB. A plain shape passes in front of a textured one, over a textured
ground that drifts. Everything that a sentence does not name (sizes, speeds, places, phases) is
drawn from a seed, so a clip is a function of `(sentence, seed)` and nothing else.

The generator is numpy's `RandomState`, whose streams numpy promises never to change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

FRAMES, HEIGHT, WIDTH = 16, 64, 64
TEXT_TOKENS, TEXT_DIM = 24, 64

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
}
SHAPES = ("disc", "square", "triangle")
TEXTURES = ("striped", "checked")
GROUNDS = ("stripes", "checks")
# (dy, dx) in image coordinates: y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}

# The one sentence of this language; words in capitals are slots.
TEMPLATE: tuple[str, ...] = (
    *("a", "COLOUR", "SHAPE", "moves", "DIRECTION", "in", "front", "of"),
    *("a", "TEXTURE", "COLOUR", "SHAPE", "moving", "DIRECTION"),
    *("over", "GROUND", "drifting", "DIRECTION"),
)
SLOTS: dict[str, tuple[str, ...]] = {
    "COLOUR": tuple(COLOURS),
    "SHAPE": SHAPES,
    "TEXTURE": TEXTURES,
    "GROUND": GROUNDS,
    "DIRECTION": tuple(DIRECTIONS),
}
VOCABULARY: tuple[str, ...] = (
    *("a", "moves", "moving", "in", "front", "of", "over", "drifting"),
    *(word for words in SLOTS.values() for word in words),
)
EXAMPLE = (
    "a red disc moves right in front of a striped blue square moving left over checks drifting up"
)


class PromptError(ValueError):
    """A prompt that is not a sentence of this language."""


@dataclass(frozen=True)
class Scene:
    """What a sentence says. Every field is a word of the slot of that kind."""

    front_colour: str
    front_shape: str
    front_direction: str
    back_texture: str
    back_colour: str
    back_shape: str
    back_direction: str
    ground: str
    ground_direction: str

    @property
    def prompt(self) -> str:
        """The sentence: `EXAMPLE` is one."""
        words = iter(self._words())
        return " ".join(next(words) if word in SLOTS else word for word in TEMPLATE)

    def _words(self) -> tuple[str, ...]:
        return (
            *(self.front_colour, self.front_shape, self.front_direction),
            *(self.back_texture, self.back_colour, self.back_shape, self.back_direction),
            *(self.ground, self.ground_direction),
        )


def parse_prompt(prompt: str) -> Scene:
    """Read a sentence of the language of `TEMPLATE`.

    Raises:
        PromptError: names the first word that does not fit, what fits there, and an example.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    found: list[str] = []
    for position, expected in enumerate(TEMPLATE):
        allowed = SLOTS.get(expected, (expected,))
        if position >= len(words):
            raise PromptError(
                f"the prompt ends after {len(words)} words; expected one of "
                f"{', '.join(allowed)} next. {_grammar()}"
            )
        if words[position] not in allowed:
            raise PromptError(
                f"word {position + 1} of the prompt is {words[position]!r}; expected one of "
                f"{', '.join(allowed)}. {_grammar()}"
            )
        if expected in SLOTS:
            found.append(words[position])
    if len(words) > len(TEMPLATE):
        raise PromptError(
            f"the prompt goes on after word {len(TEMPLATE)} with {words[len(TEMPLATE)]!r}; "
            f"expected its end. {_grammar()}"
        )
    return Scene(*found)


def _grammar() -> str:
    slots = "; ".join(f"{name}: {', '.join(words)}" for name, words in SLOTS.items())
    return f"The sentence is: {' '.join(TEMPLATE)}. {slots}. Example: {EXAMPLE!r}"


def random_scene(rng: np.random.RandomState) -> Scene:
    """A scene with every slot drawn uniformly, except that the two shapes differ in colour."""
    colours = list(COLOURS)
    first, second = rng.choice(len(colours), 2, replace=False)
    return Scene(
        front_colour=colours[first],
        front_shape=_pick(rng, SHAPES),
        front_direction=_pick(rng, tuple(DIRECTIONS)),
        back_texture=_pick(rng, TEXTURES),
        back_colour=colours[second],
        back_shape=_pick(rng, SHAPES),
        back_direction=_pick(rng, tuple(DIRECTIONS)),
        ground=_pick(rng, GROUNDS),
        ground_direction=_pick(rng, tuple(DIRECTIONS)),
    )


def _pick(rng: np.random.RandomState, words: tuple[str, ...]) -> str:
    return words[rng.randint(len(words))]


@cache
def _word_vectors() -> torch.Tensor:
    table = np.random.RandomState(20_251).standard_normal((len(VOCABULARY), TEXT_DIM // 2))
    return torch.from_numpy(table).float()


def encode_prompt(scene: Scene | None) -> torch.Tensor:
    """The fixed encoding of a sentence, in the place of a text encoder's output.

    Each word is [a fixed random vector of the word | sin and cos of its position], zeros pad to
    the fixed length. The position is there because cross-attention has none of its own and
    "red" means something else as word 2 than as word 11. `None` is the empty prompt: all zeros.

    Returns:
        float32 [TEXT_TOKENS, TEXT_DIM].
    """
    encoding = torch.zeros(TEXT_TOKENS, TEXT_DIM)
    if scene is None:
        return encoding
    words = scene.prompt.split()
    half = TEXT_DIM // 2
    position = torch.arange(len(words), dtype=torch.float32)[:, None]
    # Wavelengths from 2.5 words to 40: the longest is longer than any sentence.
    wavelength = 2.5 * 16 ** torch.linspace(0, 1, half // 2)
    angle = 2 * math.pi * position / wavelength
    encoding[: len(words), :half] = _word_vectors()[[VOCABULARY.index(word) for word in words]]
    encoding[: len(words), half:] = torch.cat([angle.sin(), angle.cos()], dim=-1)
    return encoding


def render(
    scene: Scene,
    rng: np.random.RandomState,
    frames: int = FRAMES,
    first: int | None = None,
) -> torch.Tensor:
    """Draw one clip.

    Args:
        scene: what to draw.
        rng: draws sizes, speeds, places and phases. Always the same number of draws.
        frames: how many frames of the 16 to draw, 1..16.
        first: the first of them; None draws it too, uniformly.

    Returns:
        float32 [3, frames, HEIGHT, WIDTH] in [-1, 1], antialiased by the signed distance to each
        edge: coverage = clamp(0.5 - distance, 0, 1), distance in pixels.
    """
    if not 1 <= frames <= FRAMES:
        raise ValueError(f"frames is {frames}; expected 1..{FRAMES}")
    draw = rng.uniform(size=16).astype(np.float32)
    start = int(draw[0] * (FRAMES - frames + 1)) if first is None else first
    time = np.arange(start, start + frames, dtype=np.float32)[:, None, None]
    y = np.arange(HEIGHT, dtype=np.float32)[None, :, None] + np.float32(0.5)
    x = np.arange(WIDTH, dtype=np.float32)[None, None, :] + np.float32(0.5)

    # The shapes meet near the middle of the clip and of the picture, so one always hides the other.
    meet = (0.35 + 0.3 * draw[1]) * FRAMES
    centre_y, centre_x = HEIGHT / 2 + 12 * (draw[2] - 0.5), WIDTH / 2 + 12 * (draw[3] - 0.5)
    off_y, off_x = 10 * (draw[4] - 0.5), 10 * (draw[5] - 0.5)

    period = 16.0
    dy, dx = DIRECTIONS[scene.ground_direction]
    speed = 0.75 + 0.75 * draw[6]
    ground_y = y - dy * speed * time + period * draw[7]
    ground_x = x - dx * speed * time + period * draw[8]
    if scene.ground == "checks":
        ground = _checks(ground_y, ground_x, period)
    else:  # bars across the drift: along it nothing would be seen to move
        ground = _wave(ground_x if dx else ground_y, period)
    picture = np.empty((3, frames, HEIGHT, WIDTH), dtype=np.float32)
    picture[:] = 0.30 + 0.25 * ground

    dy, dx = DIRECTIONS[scene.back_direction]
    speed = 0.6 + 0.6 * draw[9]
    local_y = y - (centre_y + off_y + dy * speed * (time - meet))
    local_x = x - (centre_x + off_x + dx * speed * (time - meet))
    cover = _cover(scene.back_shape, local_y, local_x, 13 + 3 * draw[10])
    if scene.back_texture == "checked":
        texture = _checks(local_y, local_x, 12.0)
    else:
        texture = _wave((local_y + local_x) * math.sqrt(0.5), 8.0)
    _paint(picture, COLOURS[scene.back_colour], 0.35 + 0.65 * texture, cover)

    dy, dx = DIRECTIONS[scene.front_direction]
    speed = 1.8 + 0.8 * draw[11]
    local_y = y - (centre_y + dy * speed * (time - meet))
    local_x = x - (centre_x + dx * speed * (time - meet))
    cover = _cover(scene.front_shape, local_y, local_x, 8 + 3 * draw[12])
    _paint(picture, COLOURS[scene.front_colour], 1.0, cover)
    return torch.from_numpy(picture * 2 - 1)


def _paint(
    picture: np.ndarray,
    colour: tuple[float, float, float],
    shade: np.ndarray | float,
    cover: np.ndarray,
) -> None:
    """Lay colour x shade over the picture where `cover` is 1; in place."""
    for channel, level in zip(picture, colour, strict=True):
        channel += cover * (level * shade - channel)


def _wave(position: np.ndarray, period: float) -> np.ndarray:
    """Antialiased square wave of `position` (pixels), in [0, 1]: half the period on, half off."""
    turns = position * np.float32(1 / period)
    distance = (np.abs(turns - np.floor(turns) - 0.5) - 0.25) * np.float32(period)
    return np.clip(0.5 - distance, 0, 1)


def _checks(y: np.ndarray, x: np.ndarray, period: float) -> np.ndarray:
    """Chessboard whose squares are half a period wide, in [0, 1]."""
    a, b = _wave(y, period), _wave(x, period)
    return (1 - a) + (2 * a - 1) * b


def _cover(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers; y and x are pixels from its centre."""
    if shape == "disc":
        distance = np.sqrt(y * y + x * x) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(y), np.abs(x)) - radius * 0.88
    else:  # upright triangle: the base and two sides, each a half-plane at `inner` from the centre
        inner = radius * 0.6
        side = math.sqrt(0.75) * np.abs(x) - 0.5 * y
        distance = np.maximum(y, side) - inner
    return np.clip(0.5 - distance, 0, 1)


def clip(seed: int, frames: int = FRAMES) -> tuple[torch.Tensor, Scene]:
    """The clip of a seed: ([3, frames, HEIGHT, WIDTH] in [-1, 1], its scene)."""
    rng = np.random.RandomState(seed)
    scene = random_scene(rng)
    return render(scene, rng, frames), scene
