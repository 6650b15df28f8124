"""Every family whose clips can be encoded trains: its latents, its text, its sense of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fpsc.grid import TokenGrid
from fpsc.models.build import find_model
from fpsc.policy import Policy
from fpsc.train.arrangement import FramesFirst, Packed
from fpsc.train.config import from_value
from fpsc.train.data.clips import Size
from fpsc.train.data.encode import PipelineEncoder
from fpsc.train.data.write import Encoded, writing
from fpsc.train.loop import Trainer, train
from tests.train.data.pipelines import FAMILIES, Tiny

POLICY = {
    "fpsc": 1,
    "tile": [1, 2, 2],
    "modes": {"near": {"pattern": "near", "keep": 0.5, "dtype": "fp8"}},
    "schedule": [{"noise": "1.00..0.00", "use": "near"}],
    "limits": {"min_tokens": 0},
}
PREDICTIONS = {"cogvideox": "v"}


def prepare(folder: Path, tiny: Tiny) -> None:
    """The pipeline, its policy, and three clips that it encoded."""
    pipe = tiny.pipe
    if type(pipe.scheduler).__name__ == "CogVideoXDDIMScheduler":
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(folder / "pipe")
    Policy.from_dict(POLICY).save(folder / "policy.yaml")
    spec = find_model(str(folder / "pipe"))
    encoder = PipelineEncoder(pipe, spec, model="tiny", sizes=[Size(*tiny.size)])
    with writing(folder / "latents", encoder.encoded, encoder.common(), size=4) as writer:
        for number in range(3):
            rgb = torch.rand(3, *tiny.size, generator=torch.Generator().manual_seed(number)) * 2 - 1
            tensors = {
                "latents": encoder.latents(rgb),
                **{f"conditioning.{k}": v for k, v in encoder.text(f"clip {number}").items()},
            }
            writer.add(Encoded(f"clip {number}", "", number == 2, tensors))


def configured(folder: Path, **values: Any) -> Any:
    return from_value(
        {
            "fpsc-train": 1,
            "model": str(folder / "pipe"),
            "policy": str(folder / "policy.yaml"),
            "output": str(folder / "run"),
            "data": {"train": str(folder / "latents"), "validation": str(folder / "latents")},
            "optimiser": {"lr": 1e-3, "steps": 1, "batch": 2},
            "precision": "fp32",
            "validation": {"clips": 1, "noise": [0.5]},
            "tensorboard": False,
            **values,
        }
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family(family: str, tmp_path: Path, no_inductor: None) -> None:
    prepare(tmp_path, FAMILIES[family])
    trainer = Trainer(configured(tmp_path))
    assert trainer.objective.prediction == PREDICTIONS.get(family, "velocity")
    assert trainer.objective.convention == ("reversed" if family == "mochi" else "flow")
    noisy = trainer._noisy(trainer._order.batch(0, 0, 1, 2), 0, 0)
    trainer._lead(0)
    assert trainer.subject.predict(noisy).shape == noisy.batch.latents.shape
    line = trainer._step(iter([trainer._order.batch(0, 0, 1, 2)]))
    assert 0 < line["loss"] < 10 and line["gradient"] > 0


def test_clips_of_a_pipeline(tmp_path: Path, no_inductor: None) -> None:
    tiny = FAMILIES["wan"]
    prepare(tmp_path, tiny)
    samples = {"prompts": ["a cat"], "steps": 2, "size": list(tiny.size)}
    assert train(configured(tmp_path, samples=samples)) is not None
    for step in (0, 1):
        with Image.open(tmp_path / "run" / "clips" / f"step-{step:06}" / "0.gif") as picture:
            assert getattr(picture, "n_frames", 1) == tiny.size[0]


def test_arrangements_are_undone() -> None:
    latents = torch.arange(2 * 3 * 4 * 6 * 8.0).view(2, 3, 4, 6, 8)
    size = latents.shape[2:]
    for arrangement in (FramesFirst(), Packed(TokenGrid(1, 1, 1)), Packed(TokenGrid(2, 3, 4))):
        assert torch.equal(arrangement.taken(arrangement.given(latents), size), latents)
    packed = Packed(TokenGrid(1, 1, 1)).given(latents)  # as LTXPipeline does
    assert torch.equal(packed, latents.flatten(2).transpose(1, 2))
    patched = Packed(TokenGrid(1, 2, 2)).given(latents)
    from diffusers import LTXPipeline

    assert torch.equal(patched, LTXPipeline._pack_latents(latents, 2, 1))
