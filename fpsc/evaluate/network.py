"""The judge: a small network that reads from a clip of the demo what its prompt says.

What it answers is compared with the prompt; the last features before its answers are what the
distance between two sets of clips is taken on. `python -m fpsc.evaluate.judge` trains it.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fpsc.demo.clips import COLOURS, DIRECTIONS, GROUNDS, SHAPES, TEXTURES, Scene
from fpsc.files import replacing

FEATURES = 64
NAME = "judge.safetensors"

_WORDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "texture": TEXTURES,
    "ground": GROUNDS,
    "direction": tuple(DIRECTIONS),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    field.name: _WORDS[field.name.rsplit("_")[-1]] for field in fields(Scene)
}
"""What is asked of a clip: every field of a `Scene`, with the words that can answer it."""


def answers_of(scene: Scene) -> Tensor:
    """The right answers, by number: int64 [questions]."""
    return torch.tensor([words.index(getattr(scene, name)) for name, words in QUESTIONS.items()])


class Judge(nn.Module):
    """3D convolutions over the whole clip, pooled over all places: 221 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()

        def layer(
            inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
        ) -> nn.Sequential:
            padding = kernel[0] // 2, kernel[1] // 2, kernel[2] // 2
            convolution = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm3d(outputs), nn.ReLU())

        self.body = nn.Sequential(
            layer(3, 32, (3, 5, 5), (2, 2, 2)),
            layer(32, 32, (1, 3, 3), (1, 2, 2)),  # outlines, which want a finer picture
            layer(32, 40, (3, 3, 3), (1, 2, 2)),
            layer(40, 56, (3, 3, 3), (2, 2, 2)),
            layer(56, 64, (3, 3, 3), (1, 1, 1)),
        )
        # Normalised without a weight: every feature counts alike in a distance.
        self.features = nn.Sequential(
            nn.Linear(2 * 64, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES, affine=False),
            nn.ReLU(),
        )
        self.answers = nn.Linear(FEATURES, sum(map(len, QUESTIONS.values())))

    def read(self, clips_BCFHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features and answers of clips, float32 [B, 3, FRAMES, HEIGHT, WIDTH] in [-1, 1].

        Returns:
            float32 [B, FEATURES], and for every question logits [B, words].
        """
        seen = self.body(clips_BCFHW)
        # The maximum too: a corner is in one place.
        pooled = torch.cat([seen.mean((2, 3, 4)), seen.amax((2, 3, 4))], dim=1)
        features = self.features(pooled)
        return features, list(self.answers(features).split(list(map(len, QUESTIONS.values())), 1))

    def forward(self, clips_BCFHW: Tensor) -> list[Tensor]:
        return self.read(clips_BCFHW)[1]


@dataclass(frozen=True)
class Reading:
    """What the judge saw in some clips.

    features: float32 [clips, FEATURES]; answers: int64 [clips, questions].
    """

    features: Tensor
    answers: Tensor

    def accuracy(self, scenes: Iterable[Scene]) -> dict[str, float]:
        """How often each question was answered as the clip's prompt says, by question.

        Raises:
            ValueError: not as many scenes as clips.
        """
        told = torch.stack([answers_of(scene) for scene in scenes])
        if told.shape != self.answers.shape:
            raise ValueError(f"expected {len(self.answers)} scenes, one a clip; found {len(told)}")
        right = (self.answers == told).double().mean(0).tolist()
        return dict(zip(QUESTIONS, right, strict=True))


@torch.no_grad()
def read(judge: Judge, clips: Iterable[Tensor]) -> Reading:
    """Show clips, float [3, FRAMES, HEIGHT, WIDTH] in [-1, 1], to a judge, one by one."""
    features, answers = [], []
    for clip in clips:
        seen, logits = judge.read(clip.float()[None])
        features.append(seen[0])
        answers.append(torch.stack([each[0].argmax() for each in logits]))
    return Reading(torch.stack(features), torch.stack(answers))


def shipped_judge() -> Path:
    """The file of the weights that come with the package."""
    return Path(str(importlib.resources.files("fpsc.evaluate"))) / "weights" / NAME


def load_judge(path: Path | None = None) -> Judge:
    """A judge from its file (default: the one that ships), for reading, float32 on CPU.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = path or shipped_judge()
    if not path.is_file():
        raise FileNotFoundError(
            f"no judge at {path}; train one with `python -m fpsc.evaluate.judge --out DIR`"
        )
    judge = Judge()
    judge.load_state_dict(load_file(path))  # copies into float32
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, path: Path) -> None:
    """Write the weights in bfloat16, the counters of the normalisations as they are."""
    state = {
        name: (value.bfloat16() if value.is_floating_point() else value).contiguous()
        for name, value in judge.state_dict().items()
    }
    with replacing(path) as beside:
        beside.write_bytes(save(state))
