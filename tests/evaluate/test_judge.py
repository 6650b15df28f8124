"""The recipe of the judge: what a step depends on, and that a stopped run goes on."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fpsc.demo.clips import clip
from fpsc.evaluate import judge as recipes
from fpsc.evaluate.judge import TRAINING, Recipe, Trainer, train, training_batch
from fpsc.evaluate.network import answers_of

TINY = Recipe(steps=4, batch=3, held_out=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_batch_is_a_function_of_its_step() -> None:
    one, again, other = (training_batch(TINY, step) for step in (5, 5, 6))
    assert one[0].shape == (3, 3, 16, 64, 64) and one[1].shape == (3, 9)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1][0], answers_of(clip(TRAINING + 15)[1]))


def test_a_third_of_the_clips_is_blurred_and_a_third_gets_noise() -> None:
    recipe = dataclasses.replace(TINY, batch=30)
    clips, _ = training_batch(recipe, 0)
    plain = blurred = noisy = 0
    for index, worn in enumerate(clips):
        sharp, _ = clip(TRAINING + index)
        change = (worn - sharp).std()
        rough = (worn.diff(dim=3).abs().mean() / sharp.diff(dim=3).abs().mean()).item()
        plain += change == 0
        blurred += bool(change > 0 and rough <= 1)  # by next to nothing, some
        noisy += bool(change > 0 and rough > 1)
        assert change < 0.3
    assert plain + blurred + noisy == 30 and min(plain, blurred, noisy) >= 4


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path) -> None:
    straight = train(TINY, tmp_path / "straight", show=False)
    assert train(TINY, tmp_path / "stopped", stop_at=2, show=False) is None
    assert not (tmp_path / "stopped" / "judge.safetensors").exists()
    stopped = train(TINY, tmp_path / "stopped", show=False)
    assert straight is not None and stopped is not None
    a, b = load_file(straight), load_file(stopped)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    reports = [json.loads(path.with_suffix(".json").read_text()) for path in (straight, stopped)]
    assert reports[0] == reports[1] and reports[0]["held_out_clips"] == 4
    again = recipes.held_out_accuracy(recipes.load_judge(straight), 4)
    assert reports[0]["by_question"] == again
    assert reports[0]["accuracy"] == pytest.approx(np.mean(list(again.values())))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Trainer(TINY).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"another recipe.*delete it"):
        train(dataclasses.replace(TINY, lr=1e-3), tmp_path, show=False)


def test_it_learns() -> None:
    """Two dozen steps on one batch."""
    batch = training_batch(dataclasses.replace(TINY, batch=8), 0)
    trainer = Trainer(dataclasses.replace(TINY, steps=24))
    found = [trainer.train_step(*batch) for _ in range(24)]
    assert found[-1] < 0.3 * found[0]
