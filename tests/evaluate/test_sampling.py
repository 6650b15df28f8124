"""Sets of clips: the same prompts, other noise; drawn once, and gone on with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fpsc.demo.clips import clip as drawn
from fpsc.demo.train import HELD_OUT, Recipe
from fpsc.evaluate.sampling import MOST, PROMPTS, ClipSet
from fpsc.quality.clips import ClipError


class Counting:
    """A model whose clean latent is the mean of the text, and that counts its forwards."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        self.calls += 1
        return (0.1 * latent[:, :3] + text.mean(),)


def test_sets_share_prompts_and_not_noise() -> None:
    first, second = ClipSet(0, 4, 2), ClipSet(1, 4, 2)
    assert first.scenes == second.scenes and len(set(first.scenes)) == 4
    noise = [sets.noise(index) for sets in (first, second) for index in range(4)]
    assert noise[0].shape == (1, 3, 16, 64, 64)
    assert len({float(each.sum()) for each in noise}) == 8
    assert torch.equal(first.noise(2), ClipSet(0, 9, 7).noise(2))


def test_prompts_are_held_out() -> None:
    assert HELD_OUT + Recipe().validation_clips <= PROMPTS
    assert ClipSet(0, 1, 1).scenes[0] == drawn(PROMPTS)[1]


def test_a_set_goes_on_after_its_last_clip(tmp_path: Path) -> None:
    sets, model = ClipSet(3, 3, 2), Counting()
    told: list[int] = []

    class Killed(Exception):
        pass

    def stop(done: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        sets.draw(model, tmp_path / "clips", stop)
    assert sets.missing(tmp_path / "clips") == [2] and model.calls == 4
    sets.draw(model, tmp_path / "clips", told.append)
    assert model.calls == 6 and told == [2, 3]
    sets.draw(model, tmp_path / "clips")
    assert model.calls == 6  # nothing is missing
    straight = tmp_path / "straight"
    sets.draw(model, straight)
    pairs = zip(sets.read(tmp_path / "clips"), sets.read(straight), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    clips = list(sets.read(straight))
    assert clips[0].shape == (3, 16, 64, 64) and not torch.equal(clips[0], clips[1])


def test_a_clip_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"0000\.safetensors"):
        list(ClipSet(0, 1, 1).read(tmp_path))


@pytest.mark.parametrize("clips", [0, MOST + 1])
def test_sizes_of_a_set(clips: int) -> None:
    with pytest.raises(ValueError, match="1 to"):
        ClipSet(0, clips, 2)
