"""The weights that ship: size, format, and the validation loss that is written beside them."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from fpsc.demo.clips import EXAMPLE, encode_prompt, parse_prompt
from fpsc.demo.model import GRID, load_model, shipped_weights, tuned_weights, with_places
from fpsc.demo.train import Recipe, validation_loss
from fpsc.policy import Policy
from fpsc.policy.load import BESIDE

FOLDER = shipped_weights()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the training command wrote beside the weights."""
    return json.loads((FOLDER / "validation.json").read_text())


def test_size_and_shape() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6
    t, y, x = GRID
    assert t * y * x >= 2048
    config = WanTransformer3DModel.load_config(FOLDER)
    assert config["attention_head_dim"] >= 64
    assert config["num_layers"] == Recipe().layers


def test_they_come_from_the_recipe_of_this_code(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(vars(Recipe()), default=vars)) == report["recipe"]
    assert report["command"].startswith("python -m fpsc.demo.train --out")


def test_validation_loss_is_repeated(report: dict[str, Any]) -> None:
    recipe = Recipe()
    table = validation_loss(load_model(), 1, recipe.validation_sigmas, recipe.sigma_floor)
    np.testing.assert_allclose(table, report["validation_table"][:1], rtol=0.01)
    assert report["validation_loss"] == pytest.approx(np.mean(report["validation_table"]))
    assert len(report["validation_table"]) == recipe.validation_clips


def test_the_prompt_matters() -> None:
    """On pure noise the model draws the colours of the sentence: red in front, or green."""
    model = load_model()
    noise = torch.randn(1, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    latent = with_places(noise)
    greenish = []
    for colour in ("red", "green"):
        scene = parse_prompt(EXAMPLE.replace("red", colour))
        text = encode_prompt(scene)[None]
        with torch.no_grad():
            clean = model(latent, torch.tensor([999.0]), text, return_dict=False)[0]
        greenish.append((clean[:, 1] - clean[:, 0]).mean())
    assert greenish[1] > greenish[0] + 0.02


def test_tuned_weights_lose_less_under_their_policy_than_the_others() -> None:
    """The policy is sparse and FP8 at all noise levels, and the loss all but that of dense."""
    folder = tuned_weights()
    assert folder is not None
    policy = Policy.load(folder / BESIDE)
    modes = policy.modes.values()
    assert all(mode.dtype == "fp8" and mode.keep <= 0.25 for mode in modes)
    dense, tuned = load_model(), load_model(folder)
    levels, floor = (0.98, 0.9, 0.75), Recipe().sigma_floor
    assert dense.config.keys() == tuned.config.keys()

    def loss(model: torch.nn.Module) -> float:
        return float(np.mean(validation_loss(model, 4, levels, floor)))

    before = loss(dense)
    model = torch.compile(load_model(), backend="fpsattn", options={"policy": policy})
    untrained = loss(model) / before - 1
    model.load_state_dict({f"_orig_mod.{k}": v for k, v in tuned.state_dict().items()})
    gap = loss(model) / before - 1
    assert untrained > 0.03 and abs(gap) < untrained / 3
