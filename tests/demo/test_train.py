"""The recipe: what a step depends on, and that a stopped run goes on as if it had not stopped."""

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from fpsc.demo import train as recipes
from fpsc.demo.clips import TEXT_DIM, TEXT_TOKENS
from fpsc.demo.model import build_model, build_scheduler, load_model, with_places
from fpsc.demo.train import (
    MatmulAttention,
    Recipe,
    Stage,
    Trainer,
    losses,
    train,
    training_batch,
)

TINY = Recipe(
    stages=(Stage(frames=2, batch=2, steps=4), Stage(frames=4, batch=2, steps=2)),
    heads=1,
    layers=1,
    ffn_dim=32,
    warmup=2,
    validation_clips=1,
    validation_sigmas=(0.9, 0.3),
)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_clips_are_used_once_each_in_order() -> None:
    recipe = Recipe(stages=(Stage(2, 4, 3), Stage(4, 2, 5)))
    assert recipe.steps == 8
    assert [recipe.first_clip(step) for step in range(9)] == [0, 4, 8, 12, 14, 16, 18, 20, 22]
    assert [recipe.stage(step)[0].frames for step in range(8)] == [2, 2, 2, 4, 4, 4, 4, 4]
    assert [recipe.stage(step)[1] for step in range(8)] == [0, 1, 2, 0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        recipe.stage(8)


def test_learning_rate_rises_holds_and_falls_in_each_stage() -> None:
    recipe = Recipe(
        stages=(Stage(2, 4, 200), Stage(2, 4, 100, lr=(1, 0)), Stage(2, 4, 50, lr=(0.5, 0.1))),
        warmup=100,
    )
    scales = [recipe.lr_scale(step) for step in range(350)]
    assert scales[0] == pytest.approx(0.01)
    assert scales[99:201] == [1.0] * 102
    assert scales[200:300] == pytest.approx([1 - i / 100 for i in range(100)])
    assert scales[300] == 0.5 and scales[325] == pytest.approx(0.3)


def test_shift_moves_noise_levels() -> None:
    """The same normal draws: sigma / (1 - sigma) is `shift` times as large."""
    plain, shifted = (
        training_batch(Recipe(stages=(Stage(1, 8, 1, shift=shift),)), 0).sigma.double()
        for shift in (1.0, 6.0)
    )
    torch.testing.assert_close(shifted / (1 - shifted), 6 * plain / (1 - plain), rtol=1e-4, atol=0)


def test_uniform_levels_are_those_of_the_sampler() -> None:
    recipe = Recipe(stages=(Stage(1, 4, 250, shift=6.0, levels="uniform"),))
    sigma = torch.cat([training_batch(recipe, step).sigma for step in range(250)])
    scheduler = build_scheduler()
    scheduler.set_timesteps(1000)
    quantiles = torch.tensor([0.25, 0.5, 0.75])
    expected = torch.quantile(scheduler.timesteps.float() / 1000, quantiles)
    torch.testing.assert_close(torch.quantile(sigma, quantiles), expected, rtol=0.02, atol=0)
    order = sigma.view(250, 4).argsort(1)
    assert (order == torch.arange(4)).all()  # every batch has one of each quarter


def test_a_batch_is_a_function_of_its_step() -> None:
    recipe = Recipe()
    one, again, other = (training_batch(recipe, step) for step in (7, 7, 8))
    assert one.clean.shape == (8, 3, 4, 64, 64) and one.text.shape == (8, TEXT_TOKENS, TEXT_DIM)
    for name in ("clean", "noise", "text", "sigma"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert one.places == recipe.stages[0].places
    assert ((one.sigma > 0) & (one.sigma < 1)).all()
    assert training_batch(dataclasses.replace(recipe, seed=1), 7).sigma[0] != one.sigma[0]


def test_prompts_are_left_out_as_often_as_the_recipe_says() -> None:
    recipe = Recipe(stages=(Stage(1, 8, 60),), no_prompt=0.25)
    empty = [not row.any() for step in range(60) for row in training_batch(recipe, step).text]
    assert 0.15 < np.mean(empty) < 0.35


def test_noisy_is_on_the_line_from_clean_to_noise() -> None:
    batch = training_batch(TINY, 0)
    clean = dataclasses.replace(batch, sigma=torch.zeros(2))
    noise = dataclasses.replace(batch, sigma=torch.ones(2))
    assert torch.equal(clean.noisy, batch.clean)
    assert torch.equal(noise.noisy, batch.noise)
    assert torch.equal(batch.part(1, 2).noisy, batch.noisy[1:])


def test_training_attention_equals_that_of_diffusers() -> None:
    torch.manual_seed(0)
    model = build_model(heads=2, layers=1, ffn_dim=32)
    torch.nn.init.normal_(model.proj_out.weight)
    batch = training_batch(TINY, 0)

    def output() -> torch.Tensor:
        latent = with_places(batch.noisy)
        return model(latent, batch.sigma * 1000, batch.text, return_dict=False)[0]

    expected = output()
    model.set_attn_processor(MatmulAttention())
    torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-4)
    assert not isinstance(model.blocks[0].attn1.processor, WanAttnProcessor)


def test_places_reach_the_model_only_in_stages_that_say_so() -> None:
    torch.manual_seed(0)
    model = build_model(heads=1, layers=1, ffn_dim=32)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    stages = (Stage(2, 2, 1), Stage(2, 2, 1, places=True))
    told = [training_batch(dataclasses.replace(TINY, stages=(stage,)), 0) for stage in stages]
    before = [losses(model, batch, 0.1) for batch in told]
    assert torch.equal(before[0], before[1])  # their weights start at zero
    with torch.no_grad():
        torch.nn.init.normal_(model.patch_embedding.weight[:, 3:])
    after = [losses(model, batch, 0.1) for batch in told]
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])


def test_halves_of_a_batch_give_the_gradient_of_the_whole() -> None:
    recipe = dataclasses.replace(TINY, clip_gradient=1e9)
    trainer = Trainer(recipe)
    _, whole = trainer._gradients(training_batch(recipe, 0))
    with ThreadPoolExecutor(2) as pool:
        trainer.train_step(pool)
    for parameter, expected in zip(trainer.parameters, whole, strict=True):
        assert parameter.grad is not None
        error = (parameter.grad - expected).norm()
        assert error <= 0.02 * expected.norm() + 1e-6  # bfloat16 sums


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path) -> None:
    straight = train(TINY, tmp_path / "straight", show=False)
    assert train(TINY, tmp_path / "stopped", stop_at=3, show=False) is None
    assert not (tmp_path / "stopped" / "weights").exists()
    assert train(TINY, tmp_path / "stopped", stop_at=5, show=False) is None
    stopped = train(TINY, tmp_path / "stopped", show=False)
    assert straight is not None and stopped is not None
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("straight", "stopped")
    ]
    for part in ("model", "average"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    reports = [
        json.loads((folder / "validation.json").read_text()) for folder in (straight, stopped)
    ]
    assert reports[0] == reports[1]


def test_the_weights_folder_repeats_its_validation_loss(tmp_path: Path) -> None:
    folder = train(TINY, tmp_path, show=False)
    assert folder is not None
    report = json.loads((folder / "validation.json").read_text())
    table = recipes.validation_loss(load_model(folder), 1, (0.9, 0.3), TINY.sigma_floor)
    np.testing.assert_allclose(table, report["validation_table"], rtol=1e-4)
    assert report["validation_loss"] == pytest.approx(np.mean(table), rel=1e-4)
    assert report["recipe"]["layers"] == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "validation.json",
    ]
    assert isinstance(WanTransformer3DModel.from_pretrained(folder), WanTransformer3DModel)


def test_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(TINY)
    trainer.save(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    trainer.step = 5

    def half(save: Callable[..., None]) -> Callable[..., None]:
        def write(state: object, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

        return write

    monkeypatch.setattr(torch, "save", half(torch.save))
    with pytest.raises(OSError, match="disk full"):
        trainer.save(tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Trainer(TINY).save(tmp_path / "checkpoint.pt")
    other = dataclasses.replace(TINY, muon_lr=1e-3)
    with pytest.raises(ValueError, match=r"another recipe.*delete it"):
        train(other, tmp_path, show=False)


def test_the_recipe_learns() -> None:
    """Forty steps on the smallest clips halve the loss of the mean clip."""
    recipe = dataclasses.replace(TINY, stages=(Stage(2, 8, 40),), layers=1, heads=2)
    trainer = Trainer(recipe)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = [trainer.train_step(pool) for _ in range(40)]
    assert np.mean(found[-10:]) < 0.5 * np.mean(found[:4])
