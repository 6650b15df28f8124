"""Sampling, both sides of a run, and the command."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from typer.testing import CliRunner

import fpsc
from fpsc.cli import app
from fpsc.demo.clips import (
    COLOURS,
    EXAMPLE,
    FRAMES,
    HEIGHT,
    WIDTH,
    encode_prompt,
    parse_prompt,
)
from fpsc.demo.model import (
    CODEC_MEAN,
    CODEC_STD,
    PLACE_CHANNELS,
    build_model,
    decode_clip,
    encode_clip,
    load_model,
    places,
    save_model,
    with_places,
)
from fpsc.demo.run import Start, generate, run, sample, start_noise
from fpsc.policy import Policy
from fpsc.policy.load import BESIDE

SCENE = parse_prompt(EXAMPLE)

# Of the 16 tiles, 2, at every noise level.
SPARSE = {
    "fpsc": 1,
    "name": "sparse",
    "modes": {"fast": {"pattern": "near", "keep": 0.125, "dtype": "fp8"}},
    "schedule": [{"noise": "1.00..0.00", "use": "fast"}],
    "limits": {"min_tokens": 0},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of untrained weights with one layer, whose output is not zero."""
    torch.manual_seed(0)
    model = build_model(heads=1, layers=1, ffn_dim=32)
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    folder = tmp_path_factory.mktemp("weights")
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shape, with a policy beside them."""
    torch.manual_seed(1)
    model = build_model(heads=1, layers=1, ffn_dim=32)
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    folder = tmp_path_factory.mktemp("tuned")
    save_model(model, folder)
    Policy.from_dict(SPARSE).save_beside(folder)
    return folder


def test_codec_is_exact_and_clamps() -> None:
    rgb = torch.rand(3, 2, 4, 4) * 2 - 1
    torch.testing.assert_close(decode_clip(encode_clip(rgb)), rgb)
    assert encode_clip(torch.tensor(CODEC_MEAN)).item() == pytest.approx(0)
    assert decode_clip(torch.tensor(10 / CODEC_STD)).item() == 1


def test_weights_are_stored_in_bfloat16_and_loaded_in_float32(weights: Path) -> None:
    model = load_model(weights)
    assert isinstance(model, WanTransformer3DModel) and not model.training
    for value in model.state_dict().values():
        assert value.dtype == torch.float32
        assert torch.equal(value, value.bfloat16().float())
    with pytest.raises(FileNotFoundError, match=r"fpsc\.demo\.train"):
        load_model(weights / "nowhere")


def test_a_model_that_knows_the_answer_samples_it() -> None:
    """The scheduler takes clean predictions: one that is right from the start is what comes out."""
    answer = torch.rand(1, 3, 2, 8, 8) * 1.6 - 0.8
    noise = torch.randn(answer.shape)
    clip = sample(
        lambda *args, **kwargs: (encode_clip(answer),), encode_prompt(SCENE), noise, steps=8
    )
    torch.testing.assert_close(clip, answer[0], rtol=0, atol=1e-3)


def test_the_first_latent_is_the_noise_and_levels_fall() -> None:
    seen: list[tuple[float, torch.Tensor]] = []

    def model(latent: torch.Tensor, timestep: torch.Tensor, *args: object, **kwargs: object):
        seen.append((float(timestep), latent))
        return (latent[:, :3] * 0,)

    noise, done = torch.randn(1, 3, 2, 4, 4), []
    sample(model, encode_prompt(SCENE), noise, steps=6, on_step=done.append)
    assert torch.equal(seen[0][1], with_places(noise))
    levels = [level for level, _ in seen]
    assert levels[0] == 999 and levels == sorted(levels, reverse=True) and levels[-1] > 0
    assert done == [1, 2, 3, 4, 5, 6]


def test_sampling_is_deterministic(weights: Path) -> None:
    model, text = load_model(weights), encode_prompt(SCENE)
    noise = start_noise(4)[:, :, :2, :16, :16]
    first, again = (sample(model, text, noise, 3) for _ in range(2))
    assert torch.equal(first, again)
    other = sample(model, text, start_noise(5)[:, :, :2, :16, :16], 3)
    assert not torch.equal(first, other)


def test_sampling_compiles_once(weights: Path) -> None:
    """The forward that is timed as compilation has the very types of those that follow."""
    compiled = 0

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal compiled
        compiled += 1
        return gm.forward

    labels = []
    torch.compiler.reset()
    noise = start_noise(0)[:, :, :2, :16, :16].contiguous()
    side = generate(
        "dense",
        torch.compile(load_model(weights), backend=backend),
        Start(encode_prompt(SCENE), noise, 4, lambda *told: labels.append(told)),
    )
    assert compiled == 1
    assert labels[0] == ("dense: compiling", 0, 4) and labels[-1] == ("dense: sampling", 4, 4)
    assert side.clip.shape == (3, 2, 16, 16)
    assert side.compile_seconds > 0 and side.sample_seconds > 0
    expected = sample(load_model(weights), encode_prompt(SCENE), noise, 4)
    torch.testing.assert_close(side.clip, expected, rtol=0, atol=1e-4)


def test_a_run_from_end_to_end(weights: Path, tmp_path: Path) -> None:
    """Both sides for real, with one layer: Inductor, the match and the policy's phases."""
    result = run(SCENE, 0, 4, tmp_path / "new" / "folder", weights=weights)
    assert result.replaced == 1
    (report,) = result.reports
    assert [site.role for site in report.sites if site.replaced] == ["video"]
    # 4 steps and the forward that compiled.
    assert sum(phase.forwards for phase in report.phases) == 5
    found = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text())
    assert found == json.loads(json.dumps(result.as_dict()))
    assert found["prompt"] == EXAMPLE and found["tuned"] is None
    decibel, _ = result.likeness(result.fast)
    assert found["psnr_db"] == pytest.approx(decibel, abs=0.01)
    # Sparse and FP8 differ from dense, and not by much.
    assert 15 < found["psnr_db"] < 80 and 0.5 < found["ssim"] <= 1
    assert not torch.equal(result.dense.clip, result.fast.clip)
    for path in result.files:
        assert path.stat().st_size > 0
    assert len(fpsc.reports()) == 1


def test_tuned_weights_are_a_third_clip_under_their_own_policy(
    weights: Path, tuned: Path, tmp_path: Path
) -> None:
    result = run(SCENE, 0, 3, tmp_path, weights=weights, tuned=tuned)
    assert result.tuned is not None and result.policy == "sparse"
    # What was compiled for the first weights now computes with the second, and compiled once.
    model = torch.compile(
        load_model(tuned), backend="fpsattn", options={"policy": Policy.from_dict(SPARSE)}
    )
    expected = sample(model, encode_prompt(SCENE), start_noise(0), 3)
    torch.testing.assert_close(result.tuned.clip, expected, rtol=0, atol=1e-3)
    assert (result.tuned.clip - result.fast.clip).abs().max() > 0.05
    (report,) = result.reports
    assert [phase.keep for phase in report.phases] == [0.125]
    assert sum(phase.forwards for phase in report.phases) == 3 + 1 + 3
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["tuned"]["ssim"] == pytest.approx(result.likeness(result.tuned)[1], abs=1e-4)
    assert list(found["seconds"]) == ["dense", "fpsattn", "tuned"]
    assert list(result.clips) == [
        "dense",
        "sparse FP8, not trained for it",
        "sparse FP8, jointly tuned",
    ]


def test_tuned_weights_that_cannot_be_used(weights: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=BESIDE):
        run(SCENE, 0, 2, tmp_path, weights=weights, tuned=weights)
    other = tmp_path / "other"
    save_model(build_model(heads=1, layers=2, ffn_dim=32), other)
    Policy.from_dict(SPARSE).save_beside(other)
    with pytest.raises(ValueError, match=r"another model.*blocks\.1.*absent.*model: demo"):
        run(SCENE, 0, 2, tmp_path, weights=weights, tuned=other)
    done = CliRunner().invoke(
        app, ["demo", "--tuned", str(other), "--out", str(tmp_path), "--json"]
    )
    assert done.exit_code == 2
    assert "another model" in json.loads(done.stdout)["error"]


def test_a_prompt_outside_the_language_names_the_vocabulary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["demo", "--prompt", "a cat", "--out", str(out)])
    assert done.exit_code == 2
    assert "'cat'" in done.stderr
    for word in COLOURS:
        assert word in done.stderr
    assert not out.exists()
    done = CliRunner().invoke(app, ["demo", "--prompt", "a cat", "--out", str(out), "--json"])
    assert done.exit_code == 2
    assert "'cat'" in json.loads(done.stdout)["error"]


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "below")])
    assert done.exit_code == 2
    assert "--out" in done.stderr


@pytest.mark.parametrize("bad", [["--steps", "0"], ["--seed", "-1"]])
def test_numbers_out_of_range(bad: list[str]) -> None:
    assert CliRunner().invoke(app, ["demo", *bad]).exit_code == 2


def test_places_tell_every_pixel_apart() -> None:
    place = places()
    assert place.shape == (1, PLACE_CHANNELS, FRAMES, HEIGHT, WIDTH)
    flat = place[0].flatten(1).T
    assert len(torch.unique((flat * 1e4).round(), dim=0)) == FRAMES * HEIGHT * WIDTH
    # Channels 0 to 3 follow time, 4 to 7 rows, 8 to 11 columns; the first of each rises along it.
    for axis, channel in enumerate((0, 4, 8)):
        assert (place[0, channel].diff(dim=axis) > 0).all()
    assert torch.equal(place[:, 8:, :1, :1], places(2, 8, WIDTH)[:, 8:, :1, :1])


def test_places_stand_beside_the_latent() -> None:
    latent = torch.randn(2, 3, 2, 8, 8)
    told, untold = with_places(latent), with_places(latent, told=False)
    assert torch.equal(told[:, :3], latent) and torch.equal(untold[:, :3], latent)
    assert torch.equal(told[1, 3:], places(2, 8, 8)[0]) and not untold[:, 3:].any()
    assert told.shape[1] == build_model(heads=1, layers=1, ffn_dim=8).config.in_channels
