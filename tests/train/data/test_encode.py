"""What `fpsc encode` stores is what the pipeline itself gives its transformer and its VAE."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from fpsc.cli import app
from fpsc.errors import UserError
from fpsc.models.build import find_model
from fpsc.quality.clips import Clip, write_tensor
from fpsc.train.data import check_fits, open_source
from fpsc.train.data.clips import ClipFile, Size, load
from fpsc.train.data.encode import PipelineEncoder, fingerprint, held_out_names
from fpsc.train.data.index import INDEX
from tests.train.data.pipelines import CAPTION, FAMILIES, spec_of


def clip(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """float32 [3, F, H, W]: waves, smooth as pictures are."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(3, 1, 1, 1, generator=generator) * 6
    t = torch.arange(frames).view(-1, 1, 1) * 0.4
    y, x = torch.arange(height).view(1, -1, 1) * 0.2, torch.arange(width).view(1, 1, -1) * 0.3
    return torch.sin(t + y + x + phase)


def encoder_of(pipe: Any, size: tuple[int, int, int], **given: Any) -> PipelineEncoder:
    return PipelineEncoder(pipe, spec_of(pipe), model="tiny", sizes=[Size(*size)], **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_pipeline_does(family: str) -> None:
    """Its own call, with the stored latents put in after the last step: its transformer is given
    the arguments that are stored, and its decoded clip is that of the VAE's own latents."""
    tiny = FAMILIES[family]
    pipe, (frames, height, width) = tiny.pipe, tiny.size
    encoder = encoder_of(pipe, tiny.size)
    rgb = clip(*tiny.size)
    latents, text = encoder.latents(rgb), encoder.text(CAPTION)
    assert latents.shape == tiny.latents
    with torch.no_grad():
        raw = pipe.vae.encode(rgb[None]).latent_dist.mode()
        expected = pipe.vae.decode(raw).sample[0].transpose(0, 1) / 2 + 0.5
    put = latents[None]
    if family == "ltx":
        put = pipe._pack_latents(put)
    elif family == "cogvideox":
        put = put.transpose(1, 2)
    calls: list[dict[str, Any]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        calls.append(kwargs)

    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    sizes = {"num_frames": frames, "height": height, "width": width}
    scale = {} if family == "hunyuan" else {"guidance_scale": 1.0}
    decoded = pipe(
        prompt=CAPTION,
        num_inference_steps=2,
        callback_on_step_end=lambda *_: {"latents": put},
        output_type="pt",
        **sizes,
        **scale,
    ).frames[0]
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded, expected.clamp(0, 1), atol=1e-4, rtol=0)
    common = {
        name.removeprefix("conditioning."): tensor
        for name, tensor in encoder.common().items()
        if name.startswith("conditioning.")
    }
    stored = {**text, **common}
    given = {k: v for k, v in calls[0].items() if isinstance(v, Tensor)}
    given.pop("hidden_states"), given.pop("timestep")
    assert stored.keys() == given.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor[None].float(), given[name].float())
    other = encoder.text("another clip")
    assert all(not torch.equal(other[name], tensor) for name, tensor in text.items())
    assert {f"empty.{name}" for name in text} <= encoder.common().keys()


def test_the_mask_of_a_caption_of_the_same_length_is_the_same() -> None:
    encoder = encoder_of(FAMILIES["mochi"].pipe, FAMILIES["mochi"].size)
    a, b = encoder.text("one clip"), encoder.text("two clip")
    assert torch.equal(a["encoder_attention_mask"], b["encoder_attention_mask"])
    assert not torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("wan", (6, 32, 48), r"WanPipeline takes 4 n \+ 1 frames; the nearest is 5, found 6"),
        ("wan", (5, 24, 48), "heights that are multiples of 16 and widths .* found 24 and 48"),
        ("mochi", (5, 32, 48), r"MochiPipeline takes 6 n \+ 1 frames; the nearest is 7, found 5"),
    ],
)
def test_sizes_that_do_not_fit(family: str, size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_of(FAMILIES[family].pipe, size)


def test_patches_in_time_need_even_latent_frames() -> None:
    """As CogVideoX 1.5."""
    pipe = FAMILIES["cogvideox"].pipe
    spec = spec_of(pipe)
    paired = replace(spec, config={**spec.config, "patch_size_t": 2})
    with pytest.raises(UserError, match="n \\+ 1 a multiple of 2; the nearest is 13, found 9"):
        PipelineEncoder(pipe, paired, model="tiny", sizes=[Size(9, 32, 48)])
    PipelineEncoder(pipe, paired, model="tiny", sizes=[Size(13, 32, 48)])


def test_what_else_a_model_takes_is_said() -> None:
    tiny = FAMILIES["wan"]
    pipe = tiny.pipe
    spec = spec_of(pipe)
    with pytest.raises(UserError, match="--guidance: WanTransformer3DModel is not told"):
        encoder_of(pipe, tiny.size, guidance=3.0)
    image = replace(spec, config={**spec.config, "in_channels": 36})
    with pytest.raises(UserError, match=r"takes 36 channels, the VAE makes 16 .* text-to-video"):
        PipelineEncoder(pipe, image, model="tiny", sizes=[Size(*tiny.size)]).latents(
            clip(*tiny.size)
        )
    other = replace(spec, class_name="MochiTransformer3DModel")
    with pytest.raises(UserError, match=r"encode_prompt: .* needs encoder_attention_mask"):
        PipelineEncoder(pipe, other, model="tiny", sizes=[Size(*tiny.size)]).text("a")
    pipe.vae = nn.Linear(1, 1)
    with pytest.raises(UserError, match="found Linear"):
        encoder_of(pipe, tiny.size)


def test_guidance_is_that_of_the_pipeline_or_the_users() -> None:
    tiny = FAMILIES["hunyuan"]
    pipe = tiny.pipe
    assert encoder_of(pipe, tiny.size).common()["conditioning.guidance"] == 6000
    assert encoder_of(pipe, tiny.size, guidance=1.0).common()["conditioning.guidance"] == 1000


def test_another_weight_is_another_fingerprint() -> None:
    vae = FAMILIES["wan"].pipe.vae
    before = fingerprint(vae)
    assert before == fingerprint(vae)
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    assert before != fingerprint(vae)


def test_held_out_by_name() -> None:
    names = [f"{i}.mp4" for i in range(40)]
    held = held_out_names(names, 0.1)
    assert len(held) == 4 and held == held_out_names(names[::-1], 0.1)
    assert held != frozenset(names[:4])
    assert len(held_out_names(names, 0.001)) == 1
    assert held_out_names(names, 0.0) == frozenset()
    assert len(held_out_names(names[:2], 0.9)) == 1


# ---- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Wan pipeline."""
    folder = tmp_path_factory.mktemp("pipeline") / "wan"
    FAMILIES["wan"].pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven clips with captions: five wide, two tall."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "clips"
    for i in range(7):
        size = (5, 40, 60) if i < 5 else (6, 64, 32)
        write_tensor(Clip(clip(*size, seed=i), 8.0, ""), folder / f"{i}.safetensors")
        (folder / f"{i}.txt").write_text(f"clip number {i}\n")
    return folder


SHORT = ("--max-length", "16")  # text, for time
SIZES = ("--size", "5x32x48", "--size", "5x48x32", *SHORT)


def encode(*arguments: str | Path, expect: int = 0) -> Any:
    done = CliRunner().invoke(app, ["encode", *map(str, arguments)])
    assert done.exit_code == expect, done.output
    return done


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_of_clips(model: Path, clips: Path) -> None:
    done = encode(
        *(clips, "out", "--model", model, *SIZES, "--per-shard", "2", "--held-out", "0.2", "--json")
    )
    told = json.loads(done.stdout)
    assert told["encoded"] == 7 and told["held_out"] == 1 and told["left_out"] == {}
    assert told["shapes"] == [[16, 2, 4, 6], [16, 2, 6, 4]]
    source = open_source("out", held_out=False)
    both = {"train": "out", "validation": "out"}
    held = open_source(both, held_out=True)
    assert len(source) == 6 and len(held) == 1
    pipe = FAMILIES["wan"].pipe
    check_fits(source, pipe.transformer)
    about = {}
    for path in Path("out").glob("0*.safetensors"):
        with safe_open(path, "pt") as file:
            for row, each in enumerate(json.loads(file.metadata()["clips"])):
                about[f"out/{path.name}#{row}"] = each
    assert len(about) == 7
    encoder = encoder_of(pipe, (5, 32, 48), max_length=16)
    empty = encoder.text("")["encoder_hidden_states"]
    for sample in (*map(source.sample, range(6)), held.sample(0)):
        name, caption = about[sample.key]["name"], about[sample.key]["caption"]
        assert caption == f"clip number {name[0]}"
        rgb = load(ClipFile(name, clips / name, ""), [Size(5, 32, 48), Size(5, 48, 32)], None)
        assert torch.equal(sample.latents, encoder.latents(rgb))
        assert sample.conditioning.keys() == {"encoder_hidden_states"} == sample.empty.keys()
        text = encoder.text(caption)["encoder_hidden_states"]
        assert torch.equal(sample.conditioning["encoder_hidden_states"], text)
        assert torch.equal(sample.empty["encoder_hidden_states"], empty)
        assert not torch.equal(text, empty)


def test_stopped_and_run_again_it_is_as_unbroken(
    model: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--model", model, *SIZES, "--per-shard", "2", "--held-out", "0.2")
    encode(clips, "whole", *given)
    original, seen = PipelineEncoder.latents, 0

    def stops(self: PipelineEncoder, frames: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt
        return original(self, frames)

    monkeypatch.setattr(PipelineEncoder, "latents", stops)
    assert CliRunner().invoke(app, ["encode", str(clips), "parts", *map(str, given)]).exit_code
    assert seen == 5
    before = files(Path("parts"))
    assert INDEX in before and 1 <= sum(name[:1] == "0" for name in before) < 4
    monkeypatch.setattr(PipelineEncoder, "latents", original)
    told = json.loads(encode(clips, "parts", *given, "--json").stdout)
    assert told["done_before"] > 0 and told["encoded"] + told["done_before"] == 7
    assert files(Path("parts")) == files(Path("whole"))
    again = json.loads(encode(clips, "parts", *given, "--json").stdout)
    assert again["encoded"] == 0 and again["done_before"] == 7


def test_a_lost_shard_is_encoded_again(model: Path, clips: Path) -> None:
    given = ("--model", model, "--size", "5x32x48", "--per-shard", "3", *SHORT)
    encode(clips, "out", *given)
    before = files(Path("out"))
    Path("out/00001.safetensors").unlink()
    cut = Path("out/00000.safetensors")
    cut.write_bytes(cut.read_bytes()[:-10])
    told = json.loads(encode(clips, "out", *given, "--json").stdout)
    assert told["encoded"] == 6 and told["done_before"] == 1
    assert files(Path("out")) == before


def test_other_settings_in_the_same_folder(model: Path, clips: Path) -> None:
    encode(clips, "out", "--model", model, "--size", "5x32x48", *SHORT)
    done = encode(clips, "out", "--model", model, "--size", "5x48x32", *SHORT, expect=2)
    assert 'encoded with sizes: ["5x32x48"], and this run has ["5x48x32"]' in done.stderr


def test_another_run_in_the_same_folder(model: Path, clips: Path) -> None:
    from fpsc.train.data.write import writing

    with writing(Path("out"), {}, {}, size=2):
        done = encode("demo", "out", expect=2)
    assert "another `fpsc encode` is writing there" in done.stderr


def test_broken_clips(model: Path, clips: Path) -> None:
    (clips / "3.safetensors").write_bytes(b"no")
    write_tensor(Clip(clip(4, 40, 60), 8.0, ""), clips / "4.safetensors")
    given = (clips, "out", "--model", model, "--size", "5x32x48", *SHORT)
    done = encode(*given, expect=2)
    assert "3.safetensors cannot be read as safetensors" in done.stderr
    assert "--skip-broken" in done.stderr
    done = encode(*given, "--skip-broken", "--json", expect=1)
    told = json.loads(done.stdout)
    assert told["encoded"] == 5 and sorted(told["left_out"]) == ["3.safetensors", "4.safetensors"]
    assert "expected at least 5 frames, found 4" in told["left_out"]["4.safetensors"]


def test_latents_that_are_not_finite(
    model: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        PipelineEncoder, "latents", lambda self, frames: torch.full((16, 2, 4, 6), torch.nan)
    )
    done = encode(clips, "out", "--model", model, "--size", "5x32x48", *SHORT, expect=2)
    assert "0.safetensors: latents: expected finite numbers" in done.stderr


def test_a_full_disk(model: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    done = encode("demo", "out", "--clips", "2", expect=2)
    assert "No space left on device" in done.stderr and "goes on from there" in done.stderr
    assert not list(Path("out").glob("*.safetensors"))


def test_the_demo_on_disk_is_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = json.loads(
        encode(
            "demo", "out", "--clips", "5", "--held-out", "0.4", "--per-shard", "2", "--json"
        ).stdout
    )
    assert told["clips"] == 5 and told["held_out"] == 2 and told["shards"] == 3
    both = {"train": "out", "validation": "out"}
    for held_out in (False, True):
        stored, drawn = open_source(both, held_out=held_out), open_source("demo", held_out=held_out)
        for i in range(len(stored)):
            a, b = stored.sample(i), drawn.sample(i)
            assert torch.equal(a.latents, b.latents)
            assert a.beside is not None and b.beside is not None
            assert torch.equal(a.beside, b.beside)
            for x, y in ((a.conditioning, b.conditioning), (a.empty, b.empty)):
                assert x.keys() == y.keys()
                assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clips", "out"], "expected --model, found none"),
        (["clips", "out", "--model", "m"], "expected --size, found none"),
        (["clips", "out", "--model", "m", "--size", "5x32"], "--size 5x32: expected frames"),
        (["clips", "out", "--model", "nowhere/m", "--size", "5x32x48"], "hf download nowhere/m"),
        (["clips", "out", "--clips", "3"], "--clips is for demo"),
        (["demo", "out", "--size", "5x32x48"], "--size is for clips of files"),
        (
            ["nowhere", "out", "--model", "m", "--size", "5x32x48"],
            "there is no such file or folder",
        ),
    ],
)
def test_bad_arguments(clips: Path, arguments: list[str], message: str) -> None:
    assert message in encode(*arguments, expect=2).stderr
    assert not Path("out").exists()


def test_errors_as_json(clips: Path) -> None:
    done = encode("nowhere", "out", "--json", expect=2)
    assert "error" in json.loads(done.stdout)


def test_spec_of_is_what_is_found_on_disk(model: Path) -> None:
    """The other tests' short cut."""
    found, made = find_model(str(model)), spec_of(FAMILIES["wan"].pipe)
    assert found.class_name == made.class_name

    def public(spec: Any) -> dict[str, Any]:
        values = json.loads(json.dumps(spec.config))
        return {key: value for key, value in values.items() if key[:1] != "_"}

    assert public(found) == public(made)
