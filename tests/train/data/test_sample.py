"""Samples, batches, the demo's clips, and whether they fit a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fpsc.demo.clips import clip
from fpsc.demo.model import build_model, decode_clip, places, with_places
from fpsc.demo.train import HELD_OUT, Recipe, training_batch, validation_loss
from fpsc.errors import UserError
from fpsc.train.data import Batch, Sample, check_fits, collate, open_source
from fpsc.train.data.demo import Demo
from tests.families import COGVIDEOX, HUNYUAN
from tests.wan import small_wan


def sample(key: str = "a", **changes: Any) -> Sample:
    made = Sample(
        key,
        torch.randn(4, 2, 4, 6),
        {"encoder_hidden_states": torch.randn(7, 32)},
        empty={"encoder_hidden_states": torch.zeros(7, 32)},
    )
    return replace(made, **changes)


class Some:
    """A source of given samples, with no buckets."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]


def test_collate_stacks() -> None:
    samples = [sample(key, beside=torch.randn(2, 2, 4, 6)) for key in "abc"]
    batch = collate(samples)
    assert isinstance(batch, Batch) and batch.keys == ("a", "b", "c") and len(batch) == 3
    for i, one in enumerate(samples):
        assert torch.equal(batch.latents[i], one.latents)
        assert batch.beside is not None and torch.equal(batch.beside[i], one.beside)
        for whole, part in ((batch.conditioning, one.conditioning), (batch.empty, one.empty)):
            assert whole.keys() == part.keys()
            assert all(torch.equal(whole[name][i], part[name]) for name in part)
    assert collate([sample()]).beside is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(4, 2, 4, 8)}, r"latents is float32 \[4, 2, 4, 6\] in the first"),
        ({"latents": torch.zeros(4, 2, 4, 6).half()}, r"and float16 \[4, 2, 4, 6\] in the second"),
        ({"beside": torch.zeros(1, 2, 4, 6)}, "beside is not there in the first"),
        ({"conditioning": {}}, "conditioning.encoder_hidden_states is .* not there in the second"),
        ({"empty": {}}, "empty.encoder_hidden_states"),
    ],
)
def test_samples_that_differ_are_both_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        collate([sample("first"), sample("other", **changes)])
    assert "first and other cannot be in one batch" in str(caught.value)


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="found none"):
        collate([])


# ---- the demo's clips


def test_the_demos_clips_are_those_of_its_recipe() -> None:
    """Training: the clips, prompts and input of `fpsc.demo.train`, without the empty prompts."""
    recipe = Recipe(no_prompt=0.0)
    last = recipe.steps - 1
    theirs = training_batch(recipe, last)
    source = open_source("demo", held_out=False)
    first = recipe.first_clip(last)
    ours = collate([source.sample(first + i) for i in range(len(theirs.clean))])
    assert torch.equal(ours.latents, theirs.clean)
    assert torch.equal(ours.conditioning["encoder_hidden_states"], theirs.text)
    assert ours.beside is not None
    assert torch.equal(torch.cat([ours.latents, ours.beside], 1), with_places(theirs.clean))
    assert not ours.empty["encoder_hidden_states"].any()


def test_the_demos_held_out_clips_are_those_of_its_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "fpsc.demo.train.losses",
        lambda model, batch, floor: seen.append(batch.clean[0]) or torch.zeros(1),
    )
    validation_loss(build_model(layers=1), 3, [0.5], 0.1)
    source = open_source("demo", held_out=True)
    assert [source.sample(i).key for i in range(3)] == [f"demo#{HELD_OUT + i}" for i in range(3)]
    for i, theirs in enumerate(seen):
        assert torch.equal(source.sample(i).latents, theirs)
    rgb, _ = clip(HELD_OUT)
    torch.testing.assert_close(decode_clip(source.sample(0).latents), rgb.clamp(-1, 1))


def test_the_two_sides_share_no_clip() -> None:
    train, held = Demo(), Demo(held_out=True)
    assert len(train) == len(held) == HELD_OUT
    assert train.sample(len(train) - 1).key == f"demo#{HELD_OUT - 1}"
    assert held.sample(0).key == f"demo#{HELD_OUT}"
    with pytest.raises(IndexError):
        train.sample(len(train))


def test_shorter_clips() -> None:
    found = Demo(frames=4).sample(2)
    assert found.latents.shape == (3, 4, 64, 64)
    assert found.beside is not None and torch.equal(found.beside, places(4)[0])


# ---- what fits


def test_the_demos_clips_fit_its_model() -> None:
    check_fits(Demo(), build_model(layers=1))


def test_clips_that_fit() -> None:
    check_fits(Some(sample()), small_wan(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(3, 2, 4, 6)}, "expected latents of 4 channels .* found 3$|found 3"),
        ({"beside": torch.zeros(2, 2, 4, 6)}, "of 4 channels .* found 4 and 2 beside them"),
        ({"latents": torch.zeros(4, 2, 3, 6)}, "height is a multiple of 2, .* found 3"),
        ({"latents": torch.zeros(4, 2, 4, 5)}, "width is a multiple of 2, .* found 5"),
        (
            {"conditioning": {"encoder_hidden_states": torch.zeros(7, 16)}},
            "encoder_hidden_states of width 32 for WanTransformer3DModel, found 16",
        ),
        ({"conditioning": {}}, "forward needs encoder_hidden_states, which the sample has not"),
        (
            {"conditioning": {**sample().conditioning, "guidance": torch.ones(())}},
            "forward takes no guidance, which the sample has",
        ),
    ],
)
def test_clips_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_fits(Some(sample("shard#3", **changes)), small_wan(1))
    assert str(caught.value).startswith("shard#3: ") and "fpsc encode" in str(caught.value)


def test_pooled_embeddings_of_another_width() -> None:
    from diffusers import HunyuanVideoTransformer3DModel

    text = {
        "encoder_hidden_states": torch.zeros(7, 16),
        "encoder_attention_mask": torch.ones(7),
        "pooled_projections": torch.zeros(9),
    }
    with pytest.raises(UserError, match="pooled_projections of width 8 .* found 9"):
        check_fits(Some(sample(conditioning=text)), HunyuanVideoTransformer3DModel(**HUNYUAN))


def test_every_bucket_is_looked_at() -> None:
    from fpsc.train.data.sample import Bucket

    class Two(Some):
        buckets = (Bucket(0, (1,), 1, "a"), Bucket(1, (1,), 1, "b"))

    with pytest.raises(UserError, match="second: .* height"):
        check_fits(
            Two(sample("first"), sample("second", latents=torch.zeros(4, 2, 3, 6))), small_wan(1)
        )


def test_clips_of_another_models_pipeline() -> None:
    source = Some(sample())
    source.encoded = {"transformer": "MochiTransformer3DModel"}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="encoded for MochiTransformer3DModel, the model is Wan"):
        check_fits(source, small_wan(1))


def test_rotary_embeddings_are_not_left_out_silently() -> None:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**COGVIDEOX, use_rotary_positional_embeddings=True)
    with pytest.raises(UserError, match="image_rotary_emb"):
        check_fits(Some(sample()), model)
