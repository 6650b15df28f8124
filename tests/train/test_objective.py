"""The loss: against the demo's own, against diffusers' schedulers; and what is drawn when."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from fpsc.demo import train as demo
from fpsc.demo.model import build_model
from fpsc.errors import UserError
from fpsc.train.config import Config, from_value
from fpsc.train.data import Batch, open_source, order
from fpsc.train.objective import Draw, Objective, build

BASE = {"fpsc-train": 1, "model": "demo", "policy": "demo", "output": "run"}


def config(**objective: Any) -> Config:
    return from_value({**BASE, "objective": objective})


def objective(convention: str = "flow", scheduler: Any = None, **values: Any) -> Objective:
    return build(config(**values), convention, scheduler)


def batch(size: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(size, 3, 2, 4, 4, generator=generator)
    text, empty = torch.ones(size, 5, 8), torch.zeros(size, 5, 8)
    keys = tuple(f"clip {i}" for i in range(size))
    return Batch(keys, latents, {"text": text}, None, {"text": empty})


def drawn(level: list[float], clips: Batch) -> Draw:
    noise = torch.randn_like(clips.latents)
    return Draw(noise, torch.tensor(level), torch.zeros(len(level), dtype=torch.bool))


def test_the_demos_own_loss() -> None:
    """fpsc.demo.train.losses, of the same clips, noise and levels."""
    clips = order(open_source("demo", held_out=False), 0).batch(0, 0, 1, 2)
    clips = replace(clips, latents=clips.latents[:, :, :4])
    assert clips.beside is not None
    from fpsc.demo.model import places

    clips = replace(clips, beside=places(4).expand(2, -1, -1, -1, -1))
    ours = objective(prediction="sample", floor=0.1)
    noisy = ours.noisy(clips, drawn([0.9, 0.02], clips))
    text = clips.conditioning["encoder_hidden_states"]
    theirs = demo.Batch(clips.latents, noisy.noise, text, noisy.level)
    model = build_model(heads=1, head_dim=32, layers=1, ffn_dim=16)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    with torch.no_grad():
        predicted = model(noisy.latents, noisy.timestep, **noisy.conditioning, return_dict=False)[0]
        found, expected = ours.losses(predicted, noisy), demo.losses(model, theirs, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_velocity_points_from_clean_to_noise() -> None:
    ours, clips = objective(), batch()
    noisy = ours.noisy(clips, drawn([1.0, 0.5, 0.25], clips))
    velocity = noisy.noise - clips.latents
    assert ours.losses(velocity, noisy).max() == 0
    assert torch.equal(noisy.latents[0], noisy.noise[0])
    torch.testing.assert_close(
        noisy.latents - noisy.level.view(-1, 1, 1, 1, 1) * velocity, clips.latents
    )
    assert noisy.timestep.tolist() == [1000, 500, 250]


def test_an_error_of_the_sample_counts_as_one_of_the_velocity_it_implies() -> None:
    ours, clips = objective(prediction="sample", floor=0.05), batch()
    noisy = ours.noisy(clips, drawn([1.0, 0.5, 0.25], clips))
    predicted = clips.latents + 0.1 * torch.randn_like(clips.latents)
    level = noisy.level.view(-1, 1, 1, 1, 1)
    implied = (noisy.latents - predicted) / level
    flow = objective(prediction="velocity")
    torch.testing.assert_close(ours.losses(predicted, noisy), flow.losses(implied, noisy))


def test_time_that_runs_from_noise_to_clean() -> None:
    ours, clips = objective("reversed"), batch()
    noisy = ours.noisy(clips, drawn([1.0, 0.5, 0.25], clips))
    assert noisy.timestep.tolist() == [0, 500, 750]
    assert ours.losses(clips.latents - noisy.noise, noisy).max() == 0


def test_v_is_that_of_the_scheduler() -> None:
    scheduler: Any = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    saved = {**scheduler.config, "_class_name": type(scheduler).__name__}
    ours, clips = objective(scheduler=saved), batch()
    assert ours.prediction == "v"
    noisy = ours.noisy(clips, drawn([0.9, 0.5, 0.1], clips))
    steps = torch.tensor([900, 500, 100])
    expected: Tensor = scheduler.add_noise(clips.latents, noisy.noise, steps)
    torch.testing.assert_close(noisy.latents, expected, rtol=1e-5, atol=1e-5)
    v = scheduler.get_velocity(clips.latents, noisy.noise, steps)
    assert ours.losses(v, noisy).max() < 1e-9


@pytest.mark.parametrize(
    ("convention", "scheduler", "values", "message"),
    [
        ("log-sigma", None, {}, "objective.timestep: the model counts time by log-sigma"),
        (None, None, {}, "no known family: expected flow, reversed or unit"),
        ("flow", None, {"prediction": "v"}, "v needs the variance preserving schedule"),
        ("flow", {"prediction_type": "epsilon"}, {}, "says prediction_type 'epsilon'"),
    ],
)
def test_what_has_no_objective(convention: str, scheduler: Any, values: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        objective(convention, scheduler, **values)
    assert message in str(error.value)


def test_a_clip_draws_the_same_however_its_step_is_spread() -> None:
    ours, clips = objective(no_prompt=0.5), batch(4)
    whole = ours.draw(clips.latents, step=7, first=0, of=4)
    parts = [ours.draw(clips.latents[i : i + 2], step=7, first=i, of=4) for i in (0, 2)]
    for name in ("noise", "level", "dropped"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole, name))
    other = ours.draw(clips.latents, step=8, first=0, of=4)
    assert not torch.equal(other.noise, whole.noise)
    assert not torch.equal(other.level, whole.level)


def test_levels_are_shifted_quantiles_and_every_step_has_its_share() -> None:
    ours = objective(levels="logit-normal", mean=0.0, std=1.0, shift=3.0)
    assert ours.level(0.5) == pytest.approx(0.75)  # 3 x 0.5 / (1 + 2 x 0.5)
    one = 1 / (1 + math.exp(-1))  # one deviation up
    assert ours.level(0.841344746) == pytest.approx(3 * one / (1 + 2 * one))
    uniform = objective(levels="uniform", shift=1.0)
    assert uniform.level(0.3) == pytest.approx(0.3)
    latents = torch.zeros(4, 1, 1, 1, 1)
    for step in range(20):
        level = uniform.draw(latents, step, 0, 4).level
        assert (level * 4).floor().tolist() == [0, 1, 2, 3]


def test_prompts_are_dropped_as_often_as_asked() -> None:
    ours = objective(no_prompt=0.25)
    latents = torch.zeros(8, 1, 1, 1, 1)
    share = torch.stack([ours.draw(latents, step, 0, 8).dropped for step in range(100)])
    assert 0.2 < share.float().mean() < 0.3
    clips = batch()
    draw = replace(drawn([0.5] * 3, clips), dropped=torch.tensor([False, True, False]))
    noisy = ours.noisy(clips, draw)
    assert noisy.conditioning["text"].mean((1, 2)).tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"clip 1: its prompt is to be dropped"):
        ours.noisy(replace(clips, empty={}), draw)
