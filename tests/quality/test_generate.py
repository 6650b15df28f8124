"""A pipeline draws the same clip twice: dense, and with the backend."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fpsc.cli import app
from fpsc.quality.clips import read
from fpsc.quality.generate import pair, transformers
from fpsc.quality.metrics import psnr
from fpsc.quality.pictures import h264
from tests.pages.reading import Page, check_alone
from tests.wan import PHASES, small_wan

ARGUMENTS = {"height": 64, "width": 80, "num_frames": 5, "guidance_scale": 1.0}


def small_pipeline() -> Any:
    torch.manual_seed(0)  # of the VAE; small_wan has its own
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=small_wan(1, in_channels=16, out_channels=16),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline, a policy and embeddings of a prompt."""
    root = tmp_path_factory.mktemp("pipeline")
    small_pipeline().save_pretrained(root / "model")
    policy = {key: value for key, value in PHASES.items() if key != "except"}  # of two layers
    (root / "policy.yaml").write_text(json.dumps(policy))
    generator = torch.Generator().manual_seed(1)
    save_file(
        {"prompt_embeds": torch.randn(1, 7, 32, generator=generator)}, root / "in.safetensors"
    )
    return root


def test_both_sides_start_from_one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler both are the pipeline's own clip, to the last bit."""
    compiled: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(("dense", None)))
    monkeypatch.setattr(
        "fpsc.compile", lambda model, policy: compiled.append(("fpsattn", policy)), raising=False
    )
    pipe = small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    done: list[tuple[str, int]] = []
    given = {
        **ARGUMENTS,
        "prompt_embeds": torch.randn(1, 7, 32),
        "num_inference_steps": 2,
        "max_sequence_length": 7,
    }
    made = pair(
        pipe, given, seed=3, policy="p", on_step=lambda side, step: done.append((side, step))
    )
    assert compiled == [("dense", None), ("fpsattn", "p")] and made.replaced == 0
    assert done == [("dense", 1), ("dense", 2), ("fpsattn", 1), ("fpsattn", 2)]
    assert made.dense.frames.shape == (3, 5, 64, 80)
    assert torch.equal(made.dense.frames, made.fast.frames)
    assert made.dense.frames.min() < -0.01 and made.dense.frames.max() <= 1
    other = pair(pipe, given, seed=4, policy="p")
    assert not torch.equal(made.dense.frames, other.dense.frames)


def test_the_model_is_left_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small_pipeline()
    (model,) = transformers(pipe)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(type(pipe), "__call__", fail)
    with pytest.raises(ValueError, match="no"):
        pair(pipe, {})
    assert model._compiled_call_impl is None


def test_a_pipeline_without_a_transformer() -> None:
    pipe = SimpleNamespace(components={"unet": torch.nn.Linear(1, 1), "vae": None})
    with pytest.raises(TypeError, match="found unet, vae"):
        transformers(pipe)


def compare(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_draws_both(folder: Path, tmp_path: Path) -> None:
    """For real, both compiled: the dense clip is the pipeline's, and the other is near it."""
    out = tmp_path / "out"
    sizes = [x for name in ("height", "width") for x in (f"--{name}", str(ARGUMENTS[name]))]
    done = compare(
        *(folder / "model", "--inputs", folder / "in.safetensors", "--steps", "2", "--frames", "5"),
        *(*sizes, "--guidance", "1", "--policy", folder / "policy.yaml", "--seed", "3"),
        *("--out", out, "--json"),
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["replaced"] == 1 and told["policy"] == "phases" and told["seed"] == 3
    assert sum(phase["forwards"] for phase in told["reports"][0]["phases"]) == 2
    assert told["names"] == ["dense", "fpsattn"] and told["class"] == "WanPipeline"
    found = told["measures"]["PSNR"]["value"]
    assert found is not None and 20 < found < 90

    dense, fast = (read(out / f"{name}.safetensors").frames for name in ("dense", "fpsattn"))
    assert psnr(dense, fast) == pytest.approx(found, abs=3)  # files have 8 bits
    if h264():
        film = read(out / "dense.mp4")
        assert film.fps == 16 and film.frames.shape == dense.shape and psnr(film.frames, dense) > 30
    pipe = WanPipeline.from_pretrained(folder / "model", text_encoder=None, tokenizer=None)
    plain = pipe(
        **ARGUMENTS,
        **load_file(folder / "in.safetensors"),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).frames[0]
    assert psnr(dense, plain.transpose(0, 1) * 2 - 1) > 50
    page = Page((out / "compare.html").read_text(encoding="utf-8"))
    check_alone(page)
    assert "WanPipeline" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "--prompt"),
        (["model", "policy.yaml"], "is a pipeline"),
        (["policy.yaml", "--prompt", "x"], "no diffusers pipeline"),
        (["model", "--inputs", "policy.yaml"], "safetensors"),
        (["model", "--inputs", "in.safetensors", "--policy", "nonsense"], "nonsense"),
        (["model", "--inputs", "in.safetensors", "--height", "7"], "divisible"),
        (["model", "--inputs", "in.safetensors", "--device", "nowhere"], "--device nowhere"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    arguments: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    done = compare(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "fpsc-compare").exists()


def test_a_hub_id_is_never_fetched() -> None:
    done = compare("somebody/some-model", "--prompt", "x")
    assert done.exit_code == 2 and "hf download somebody/some-model" in done.stderr
