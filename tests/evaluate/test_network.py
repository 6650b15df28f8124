"""The judge: its questions, its file, and what the one that ships can do."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fpsc.demo.clips import EXAMPLE, Scene, clip, parse_prompt, random_scene, render
from fpsc.evaluate.distance import kernel_distance
from fpsc.evaluate.judge import HELD_OUT, Recipe
from fpsc.evaluate.network import (
    FEATURES,
    QUESTIONS,
    Judge,
    answers_of,
    load_judge,
    read,
    save_judge,
    shipped_judge,
)


def test_every_field_of_a_scene_is_a_question() -> None:
    assert list(QUESTIONS) == [field.name for field in dataclasses.fields(Scene)]
    scene = parse_prompt(EXAMPLE)
    pairs = zip(QUESTIONS.values(), answers_of(scene), strict=True)
    words = [words[answer] for words, answer in pairs]
    assert words == list(vars(scene).values())


def test_reading_is_of_each_clip_alone() -> None:
    judge = Judge().eval()
    clips = [torch.rand(3, 16, 64, 64) * 2 - 1 for _ in range(3)]
    together, last = read(judge, clips), read(judge, clips[2:])
    assert together.features.shape == (3, FEATURES) and together.answers.shape == (3, 9)
    torch.testing.assert_close(together.features[2:], last.features)


def test_accuracy_counts_by_question() -> None:
    scene = parse_prompt(EXAMPLE)
    other = dataclasses.replace(scene, front_colour="green", ground="stripes")
    reading = dataclasses.replace(
        read(Judge().eval(), [torch.zeros(3, 16, 64, 64)]),
        answers=torch.stack([answers_of(scene), answers_of(other)]),
    )
    found = reading.accuracy([scene, scene])
    assert found["front_colour"] == found["ground"] == 0.5
    assert sum(found.values()) == 7 + 2 * 0.5
    with pytest.raises(ValueError, match="expected 2 scenes"):
        reading.accuracy([scene])


def test_a_file_gives_the_same_judge(tmp_path: Path) -> None:
    judge = Judge().eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    clips = [torch.rand(3, 16, 64, 64)]
    found = read(load_judge(tmp_path / "judge.safetensors"), clips)
    torch.testing.assert_close(found.features, read(judge, clips).features, rtol=0.05, atol=0.05)
    with pytest.raises(FileNotFoundError, match=r"fpsc\.evaluate\.judge"):
        load_judge(tmp_path / "none.safetensors")


# The judge that ships.


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def test_it_is_small_and_of_this_recipe() -> None:
    assert shipped_judge().stat().st_size < 500_000
    with safe_open(shipped_judge(), "pt") as file:
        names = list(file.keys())
    assert names == sorted(Judge().state_dict())
    report = json.loads(shipped_judge().with_suffix(".json").read_text())
    assert report["recipe"] == dataclasses.asdict(Recipe())
    assert report["command"].startswith("python -m fpsc.evaluate.judge --out")
    assert report["accuracy"] == pytest.approx(np.mean(list(report["by_question"].values())))


def test_its_accuracy_is_repeated(judge: Judge) -> None:
    """On a part of the clips: within what so many answers may differ."""
    report = json.loads(shipped_judge().with_suffix(".json").read_text())
    seeds = range(HELD_OUT, HELD_OUT + 64)
    reading = read(judge, (clip(seed)[0] for seed in seeds))
    found = reading.accuracy(random_scene(np.random.RandomState(seed)) for seed in seeds)
    for question, accuracy in report["by_question"].items():
        error = (accuracy * (1 - accuracy) / 64) ** 0.5
        assert abs(found[question] - accuracy) <= 4 * error + 0.02, question


def clips_of(seeds: range, **said: str) -> Iterator[torch.Tensor]:
    """Clips of the seeds' scenes, or of what is said in their place."""
    for seed in seeds:
        rng = np.random.RandomState(seed)
        yield render(dataclasses.replace(random_scene(rng), **said), rng)


def test_its_distance_sees_what_clips_show(judge: Judge) -> None:
    here, there = range(HELD_OUT, HELD_OUT + 64), range(HELD_OUT + 100, HELD_OUT + 164)
    first = read(judge, clips_of(here)).features
    same = kernel_distance(first, read(judge, clips_of(there)).features)
    left = kernel_distance(first, read(judge, clips_of(here, front_direction="left")).features)
    still = (clip[:, :1].expand_as(clip) for clip in clips_of(here))
    frozen = kernel_distance(first, read(judge, still).features)
    assert abs(same.value) < 4 * same.error
    assert left.value > 4 * same.error and frozen.value > 4 * same.error
