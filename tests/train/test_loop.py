"""Whole runs of a small model: what they compute, what they leave, and where they stop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import fpsc
from fpsc.errors import UserError
from fpsc.policy import Policy
from fpsc.policy.lookup import beside
from fpsc.train.export import LORA_FILE
from fpsc.train.failure import TrainingFailed
from fpsc.train.loop import Trainer, train
from tests.thresholds import relative_rms
from tests.train.common import configured, losses
from tests.wan import PHASES, reference_forward, small_inputs

LORA = {"method": "lora", "lora": {"rank": 4, "alpha": 8.0, "targets": ["to_q", "to_v"]}}
LEVELS = (950.0, 600.0, 100.0)  # timesteps, one of each phase


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the first step's batch, with the policy of step 0."""
    trainer._lead(0)
    batch = trainer._order.batch(0, 0, 1, trainer._size)
    loss = trainer._losses(trainer._noisy(batch, 0, 0))["loss"]
    loss.backward()
    return {n: p.grad for n, p in trainer.subject.parameters.items() if p.grad is not None}


def test_a_run_learns_and_leaves_what_diffusers_loads(folder: Path, no_inductor: None) -> None:
    config = configured(folder, {"optimiser.steps": 8, "tensorboard": True})
    result = train(config)
    assert result is not None
    before, after = result.values["before"], result.values["after"]
    assert after["sparse_mean"] < before["sparse_mean"]
    assert after["dense"] != after["sparse"] and len(after["dense"]) == 2
    assert json.loads(result.file.read_text()) == result.values
    assert [v["step"] for v in result.values["validations"]] == [0, 2, 4, 6, 8]
    lines = [line for line in losses(folder / "run") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert list((folder / "run" / "tensorboard").iterdir())
    assert (folder / "run" / "config.yaml").read_text() == config.document.text

    loaded = WanTransformer3DModel.from_pretrained(result.weights)
    plain = WanTransformer3DModel.from_pretrained(folder / "model")
    inputs = small_inputs((500.0,))
    with torch.no_grad():
        assert relative_rms(loaded(**inputs)[0], plain(**inputs)[0]) > 1e-3
    found = beside(loaded)
    assert found == result.weights / "fpsc-policy.yaml"
    policy = Policy.load(found)
    assert policy.tuned_on.weights == "jointly-tuned"
    assert policy.modes == Policy.from_dict(PHASES).modes
    fpsc.reports(clear=True)
    compiled = torch.compile(loaded, backend="fpsattn")
    with torch.no_grad():
        out = compiled(**inputs)[0]
        assert relative_rms(out, reference_forward(loaded, inputs, policy)) < 1e-4
    (report,) = fpsc.reports()
    assert report.policy == "phases" and "saved beside the weights" in report.policy_source


def test_every_noise_level_gets_the_row_that_it_has_at_sampling(
    folder: Path, no_inductor: None
) -> None:
    """One batch of three levels, against the reference with the policy as it is written."""
    trainer = Trainer(configured(folder, {"optimiser.batch": 3}))
    batch = trainer._order.batch(0, 0, 1, 3)
    noisy = trainer._noisy(batch, 0, 0)
    noisy.timestep.copy_(torch.tensor(LEVELS))
    trainer._lead(0)
    with torch.no_grad():
        found = trainer.subject.predict(noisy)
        with trainer.subject.plain():
            expected = reference_forward(
                trainer.subject.model,
                {
                    "hidden_states": noisy.latents,
                    "timestep": noisy.timestep,
                    **noisy.conditioning,
                    "return_dict": False,
                },
                Policy.from_dict(PHASES),
            )
    assert relative_rms(found, expected) < 1e-4


def test_lora_leaves_adapters_that_diffusers_loads(folder: Path, no_inductor: None) -> None:
    config = configured(folder, **LORA)
    result = train(config)
    assert result is not None
    state = load_file(result.weights / LORA_FILE)
    assert all(name.startswith("transformer.blocks.") for name in state)
    assert {name.split(".")[4] for name in state} == {"to_q", "to_v"}
    trainer = Trainer(config)
    path = trainer.checkpoints.found()[-1]
    trainer.checkpoints.load(path, trainer.subject, trainer.average, trainer.optimiser)
    inputs = small_inputs((500.0,))
    with torch.no_grad(), trainer.average.applied(), trainer.subject.plain():
        expected = trainer.subject.model(**inputs)[0]
    loaded = WanTransformer3DModel.from_pretrained(folder / "model")
    with torch.no_grad():
        plain = loaded(**inputs)[0]
        loaded.load_lora_adapter(str(result.weights), use_safetensors=True)
        found = loaded(**inputs)[0]
    assert relative_rms(found, expected) < 1e-6 < 1e-4 < relative_rms(plain, expected)
    names = {n for n, p in trainer.subject.model.named_parameters() if p.requires_grad}
    assert names == set(trainer.subject.parameters) and all("lora_" in name for name in names)


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_checkpointing_gives_the_same_gradients(
    method: dict[str, Any], folder: Path, no_inductor: None
) -> None:
    found = [
        gradients(Trainer(configured(folder, {"checkpointing": on}, **method)))
        for on in (False, True)
    ]
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_parts_of_a_step_add_up_to_it(folder: Path, no_inductor: None) -> None:
    """The same clips and levels, in one forward and in two; the order of clips may differ."""
    rows = []
    for parts in (1, 2):
        changes = {"optimiser.accumulate": parts, "optimiser.batch": 4, "optimiser.lr": 1e-9}
        trainer = Trainer(configured(folder, {**changes, "objective.no_prompt": 0.0}))
        whole = trainer._order.batch(0, 0, 1, 4)
        batches = iter([_part(whole, i, parts) for i in range(parts)])
        rows.append(trainer._step(batches))
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["gradient"] == pytest.approx(rows[1]["gradient"], rel=1e-4)


def _part(batch: Any, index: int, parts: int) -> Any:
    size = len(batch) // parts
    cut = slice(index * size, (index + 1) * size)
    conditioning = {name: value[cut] for name, value in batch.conditioning.items()}
    return type(batch)(batch.keys[cut], batch.latents[cut], conditioning)


def test_a_ramp_recompiles_nothing(folder: Path, no_inductor: None) -> None:
    ramp = {"keep": "0..4", "fp8": 3}
    changes = {"optimiser.steps": 6, "validation.every": 6, "checkpoints.every": 6}
    counters.clear()
    result = train(configured(folder, changes, ramp=ramp))
    assert result is not None
    lines = [line for line in losses(folder / "run") if "loss" in line]
    keep = [line["keep"] for line in lines]
    assert keep[0] == 1 and keep == sorted(keep, reverse=True) and keep[4] == keep[5] == 0.0833
    assert [line["fp8"] for line in lines] == [False] * 3 + [True] * 3
    # One graph of the block with gradients and one without, as in a run without a ramp.
    assert counters["stats"]["unique_graphs"] == 2


def test_a_baseline_trains_dense_and_is_validated_sparse(folder: Path, no_inductor: None) -> None:
    result = train(configured(folder, baseline=True))
    assert result is not None
    assert {line["keep"] for line in losses(folder / "run") if "loss" in line} == {1}
    assert result.values["after"]["dense"] != result.values["after"]["sparse"]


def test_what_is_learned_from_the_teacher(folder: Path, no_inductor: None) -> None:
    """At first the student is the teacher but for its attention: dense, both distances are 0."""
    distil = {"output": 0.5, "attention": 0.25}
    for method in ({}, LORA):
        dense = Trainer(configured(folder, baseline=True, distil=distil, **method))
        sparse = Trainer(configured(folder, distil=distil, **method))
        found = []
        for trainer in (dense, sparse):
            trainer._lead(0)
            noisy = trainer._noisy(trainer._order.batch(0, 0, 1, 2), 0, 0)
            assert trainer.teacher is not None
            assert trainer.teacher.taps == ["blocks.0.attn1", "blocks.1.attn1"]
            found.append({k: v.item() for k, v in trainer._losses(noisy).items()})
        assert found[0]["output"] < 1e-9 and found[0]["attention"] < 1e-9
        assert found[1]["output"] > 1e-6 and found[1]["attention"] > 1e-6
        for losses_ in found:
            whole = losses_["data"] + 0.5 * losses_["output"] + 0.25 * losses_["attention"]
            assert losses_["loss"] == pytest.approx(whole)
        for target in ("output", "attention"):
            sparse.subject.model.zero_grad()
            sparse._losses(noisy)[target].backward()
            touched = [p.grad is not None for p in sparse.subject.parameters.values()]
            assert any(touched)


def test_a_loss_that_is_no_number_stops_the_run(folder: Path, no_inductor: None) -> None:
    config = configured(folder)
    assert train(config, stop_at=2) is None
    kept = list((folder / "run" / "checkpoints").iterdir())
    trainer = Trainer(config)
    with torch.no_grad():
        trainer.subject.model.blocks[1].ffn.net[2].bias[0] = 3e38
        trainer.subject.model.blocks[1].ffn.net[2].weight[0] = 3e38
    with pytest.raises(TrainingFailed) as error:
        trainer._step(iter([trainer._order.batch(0, 0, 1, 2)]))
    message = str(error.value)
    assert "the loss is nan at step 0" in message or "the loss is inf at step 0" in message
    assert "blocks.1.ffn.net.2 (Linear)" in message
    assert message.count(" at noise ") == 2 and "timestep" in message
    assert f"{kept[0]} is the last good checkpoint" in message


def test_clips_that_are_no_numbers_are_named(folder: Path, no_inductor: None) -> None:
    trainer = Trainer(configured(folder))
    batch = trainer._order.batch(0, 0, 1, 2)
    batch.latents[1, 0, 0, 0, 0] = math.nan
    with pytest.raises(TrainingFailed, match=rf"the latents of {batch.keys[1]} are not finite"):
        trainer._step(iter([batch]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "dense"}, "dense is dense in the input's dtype at every noise level"),
        ({"policy": "generic"}, r"less than 4096 tokens dense \(limits.min_tokens\)"),
        ({"policy": "nothing"}, "policy: nothing: no such policy"),
        ({"model": "nowhere/"}, "nowhere/ is not a file, a folder"),
        ({"model": "WanTransformer3DModel"}, "is a class without weights"),
        ({"data.train": "demo"}, "expected latents of 4 channels for WanTransformer3DModel"),
        ({"optimiser.batch": 30}, "expected at least 30 samples of this shape"),
        ({"samples.prompts": ["a cat"]}, "expected the local folder of a whole pipeline"),
        ({"method": "lora", "lora": {"targets": ["to_x"]}}, "lora.targets.0.: no module of Wan"),
    ],
)
def test_what_cannot_be_trained(
    changes: dict[str, Any], message: str, folder: Path, no_inductor: None
) -> None:
    with pytest.raises(UserError, match=message):
        train(configured(folder, changes))


def test_a_model_without_video_attention(folder: Path, no_inductor: None) -> None:
    """A role that the policy does not cover leaves every video attention dense."""
    text = (folder / "policy.yaml").read_text()
    (folder / "policy.yaml").write_text(text + "roles: [joint]\n")
    with pytest.raises(UserError, match=r"left dense: .*attn1"):
        train(configured(folder))


def test_a_run_of_the_command(folder: Path) -> None:
    """With Inductor, in the process of a user: the short run of CI."""
    from typer.testing import CliRunner

    from fpsc.cli import app

    config = configured(folder, {"optimiser.steps": 2})
    path = folder / "short.yaml"
    path.write_text(config.document.text)
    done = CliRunner().invoke(app, ["train", str(path), "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["steps"] == 2 and Path(values["weights"], "config.json").is_file()
    assert math.isfinite(values["after"]["gap"])
