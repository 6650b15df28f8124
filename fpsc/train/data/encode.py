"""Encode clips through a pipeline's VAE and text encoders, as its transformer takes them."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fpsc.errors import UserError
from fpsc.models.build import ModelSpec
from fpsc.models.inputs import patch
from fpsc.quality.clips import ClipError
from fpsc.train.data.clips import ClipFile, Size, load
from fpsc.train.data.write import Encoded, Writer

TRANSFORMER_INPUTS = frozenset({"hidden_states", "timestep"})
"""Arguments of a forward that are a step's own."""

OF_THE_CALL = frozenset({"num_frames", "height", "width"})
"""Arguments of a forward that the shape of the latents says."""


class Encoder(Protocol):
    """Makes the tensors of a shard from clips."""

    @property
    def encoded(self) -> dict[str, Any]:
        """What encodes them, for the index."""

    def common(self) -> dict[str, Tensor]:
        """Tensors that every sample has."""


@dataclass(frozen=True)
class Job:
    """A clip that is to be encoded."""

    name: str
    caption: str
    held_out: bool
    tensors: Callable[[], dict[str, Tensor]]


@dataclass
class Result:
    """What a run did: clips that it encoded, found done, and left out with the reason."""

    encoded: int = 0
    done: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def encode(
    jobs: Sequence[Job],
    writer: Writer,
    *,
    skip_broken: bool = False,
    on_clip: Callable[[str], None] = lambda name: None,
) -> Result:
    """Encode the clips that are not yet in shards.

    Args:
        skip_broken: leave out clips that cannot be read, or whose latents are not finite, instead
            of stopping at the first.
        on_clip: called with the name of every clip that is dealt with.

    Raises:
        UserError: a clip cannot be encoded.
    """
    result = Result()
    for job in jobs:
        if job.name in writer.done:
            result.done += 1
        else:
            try:
                tensors = job.tensors()
                _finite(job.name, tensors)
                writer.add(Encoded(job.name, job.caption, job.held_out, tensors))
                result.encoded += 1
            except ClipError as error:
                if not skip_broken:
                    raise UserError(f"{error}. --skip-broken leaves such clips out") from error
                result.left_out[job.name] = str(error)
        on_clip(job.name)
    return result


def _finite(clip: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ClipError(
                f"{clip}: {name}: expected finite numbers, found NaN or infinite ones; a --dtype "
                "of a larger range may help"
            )


def held_out_names(names: Sequence[str], fraction: float) -> frozenset[str]:
    """Which of the clips are held out: chosen by their names, so that every run agrees.

    At least one where the fraction is above 0, and never all.
    """
    count = round(len(names) * fraction)
    if fraction > 0:
        count = min(max(1, count), len(names) - 1)
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return frozenset(ordered[:count])


class DemoEncoder:
    """The demo's synthetic clips, through its codec: what the source `demo` draws, on disk."""

    encoded: dict[str, Any] = {
        "pipeline": "demo",
        "model": "demo",
        "vae": {"class": "fpsc.demo.model.encode_clip"},
        "transformer": "WanTransformer3DModel",
        "dtype": "float32",
    }

    def common(self) -> dict[str, Tensor]:
        from fpsc.train.data.demo import Demo

        sample = Demo().sample(0)
        assert sample.beside is not None
        return {"beside": sample.beside, **_prefixed("empty.", sample.empty)}

    def jobs(self, clips: int, held_out: float) -> Iterator[Job]:
        """The first clips of either side."""
        from fpsc.demo.clips import clip
        from fpsc.train.data.demo import Demo

        aside = len(held_out_names([str(i) for i in range(clips)], held_out))
        for held, count in ((False, clips - aside), (True, aside)):
            source = Demo(held_out=held)
            for index in range(count):
                _, scene = clip(source.first + index, frames=1)
                name = f"demo#{source.first + index}"
                yield Job(name, scene.prompt, held, partial(_demo_tensors, source, index))


def _demo_tensors(source: Any, index: int) -> dict[str, Tensor]:
    sample = source.sample(index)
    return {"latents": sample.latents, **_prefixed("conditioning.", sample.conditioning)}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# Latents are (z - mean) * scaling_factor / std. Checked for these classes against what their
# pipelines undo before they decode; the tests do so with the installed diffusers.
VAES = (
    "AutoencoderKLWan",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLMochi",
)


def normalised(vae: Any, latents: Tensor) -> Tensor:
    """A VAE's latents [1, C, F, H, W] as the transformer takes them."""

    def channels(name: str) -> Tensor | None:
        values = getattr(vae, name, None)  # LTX: buffers
        if values is None:
            values = vae.config.get(name)
        if values is None:
            return None
        return torch.as_tensor(values, dtype=latents.dtype, device=latents.device).view(
            1, -1, 1, 1, 1
        )

    mean, std = channels("latents_mean"), channels("latents_std")
    scaled = latents if mean is None else latents - mean
    scaled = scaled * (vae.config.get("scaling_factor") or 1.0)
    return scaled if std is None else scaled / std


class PipelineEncoder:
    """A diffusers text-to-video pipeline's VAE and text encoders.

    Args:
        pipe: the pipeline; its transformer is not needed.
        transformer: the class and configuration of its transformer.
        model: its name, for the index.
        sizes: of the clips.
        fps: as for `fpsc.train.data.clips.load`.
        dtype: of what is stored; the VAE computes in its own.
        guidance: what a model with distilled guidance is told; None for the pipeline's default.
        max_length: tokens of text; None for the pipeline's default.

    Raises:
        UserError: the pipeline's VAE or transformer is not known, or a size does not fit it.
    """

    def __init__(
        self,
        pipe: Any,
        transformer: ModelSpec,
        *,
        model: str,
        sizes: Sequence[Size],
        fps: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        guidance: float | None = None,
        max_length: int | None = None,
    ) -> None:
        self.pipe, self.device, self.dtype = pipe, device, dtype
        self.sizes, self.fps = tuple(sizes), fps
        self.name = type(pipe).__name__
        vae = type(getattr(pipe, "vae", None)).__name__
        if vae not in VAES:
            raise UserError(
                f"{self.name}: expected one of the VAEs whose latents are known "
                f"({', '.join(VAES)}), found {vae}"
            )
        if not hasattr(pipe, "encode_prompt"):
            raise UserError(f"{self.name}: expected a pipeline with encode_prompt, found none")
        self.vae = pipe.vae.eval().requires_grad_(False)
        self.transformer = transformer
        self.accepts = _arguments(transformer)
        for size in self.sizes:
            self._fits(size)
        self.max_length = max_length or _default(type(pipe).__call__, "max_sequence_length")
        self.guidance: float | None = None
        if "guidance" in self.accepts and transformer.config.get("guidance_embeds"):
            self.guidance = guidance or _default(type(pipe).__call__, "guidance_scale")
        elif guidance is not None:
            raise UserError(f"--guidance: {transformer.class_name} is not told its guidance")
        self.encoded: dict[str, Any] = {
            "pipeline": self.name,
            "model": model,
            "vae": {"class": vae, "weights": fingerprint(self.vae)},
            "transformer": transformer.class_name,
            "dtype": str(dtype).removeprefix("torch."),
            "sizes": [str(size) for size in self.sizes],
            "fps": fps,
            "guidance": self.guidance,
            "max_length": self.max_length,
        }

    def _fits(self, size: Size) -> None:
        frames, pixels = _strides(self.pipe)
        steps = patch(self.transformer.config)
        down, across = pixels * steps.y, pixels * steps.x
        latent_frames = 1 + (size.frames - 1) // frames
        if (size.frames - 1) % frames or latent_frames % steps.t:
            near = [n for n in range(1, 2 + size.frames + 2 * frames * steps.t, frames)
                    if (1 + (n - 1) // frames) % steps.t == 0]  # fmt: skip
            best = min(near, key=lambda n: abs(n - size.frames))
            raise UserError(
                f"--size {size}: {self.name} takes {frames} n + 1 frames"
                + (f", with n + 1 a multiple of {steps.t}" if steps.t > 1 else "")
                + f"; the nearest is {best}, found {size.frames}"
            )
        if size.height % down or size.width % across:
            raise UserError(
                f"--size {size}: {self.name} takes heights that are multiples of {down} and widths "
                f"that are multiples of {across}, found {size.height} and {size.width}"
            )

    def common(self) -> dict[str, Tensor]:
        """The empty prompt's arguments; guidance, where the model is told."""
        found = _prefixed("empty.", self.text(""))
        if self.guidance is not None:
            # As HunyuanVideo's pipeline scales it.
            found["conditioning.guidance"] = torch.tensor(1000.0 * self.guidance)
        return found

    def jobs(self, clips: Sequence[ClipFile], held_out: float) -> Iterator[Job]:
        """The clips of a list."""
        aside = held_out_names([clip.name for clip in clips], held_out)
        for clip in clips:
            yield Job(clip.name, clip.caption, clip.name in aside, partial(self._tensors, clip))

    def _tensors(self, clip: ClipFile) -> dict[str, Tensor]:
        frames = load(clip, self.sizes, self.fps)
        return {
            "latents": self.latents(frames),
            **_prefixed("conditioning.", self.text(clip.caption)),
        }

    @torch.no_grad()
    def latents(self, frames: Tensor) -> Tensor:
        """The latents of a clip: the most likely ones, not a draw.

        Args:
            frames: [3, F, H, W] in [-1, 1].

        Returns:
            [C, F, H, W].

        Raises:
            UserError: the transformer takes more channels than the VAE makes.
        """
        given = frames[None].to(self.device, self.vae.dtype)
        found = normalised(self.vae, self.vae.encode(given).latent_dist.mode().float())[0]
        takes = self.transformer.config.get("in_channels", len(found))
        steps = patch(self.transformer.config)
        packed = steps.tokens if OF_THE_CALL <= self.accepts.keys() else 1
        if takes != len(found) * packed:
            raise UserError(
                f"{self.transformer.class_name} takes {takes} channels, the VAE makes {len(found)} "
                "latent ones: expected a text-to-video model; what others take beside the latents "
                "is not encoded"
            )
        return found.to("cpu", self.dtype)

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, Tensor]:
        """The arguments of the transformer's forward that a caption decides.

        `encode_prompt` returns them without names. Embeddings of tokens are the ones with three
        dimensions, a mask of them has the two that they begin with, and what is left over with two
        are the pooled ones; a second text encoder's come later.

        Raises:
            UserError: it returns what the forward does not take, or not all that it needs.
        """
        accepts = inspect.signature(self.pipe.encode_prompt).parameters
        wishes = {
            "prompt": caption,
            "device": self.device,
            "do_classifier_free_guidance": False,
            "max_sequence_length": self.max_length,
        }
        given = {k: v for k, v in wishes.items() if k in accepts and v is not None}
        found = self.pipe.encode_prompt(**given)
        named = _named(found if isinstance(found, tuple) else (found,))
        unknown = sorted(named.keys() - self.accepts.keys())
        missing = sorted(
            name
            for name, parameter in self.accepts.items()
            if parameter.default is inspect.Parameter.empty
            and name not in named
            and name not in TRANSFORMER_INPUTS | OF_THE_CALL
        )
        if unknown or missing:
            raise UserError(
                f"{self.name}.encode_prompt: expected the arguments of "
                f"{self.transformer.class_name}.forward, found {', '.join(named)}"
                + (f"; it does not take {', '.join(unknown)}" if unknown else "")
                + (f"; it needs {', '.join(missing)}" if missing else "")
            )
        return {name: self._stored(tensor[0]) for name, tensor in named.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu().contiguous()
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _named(found: Sequence[Any]) -> dict[str, Tensor]:
    """The returned tensors by the names that diffusers' models give them."""
    named: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        named[name if name not in named else f"{name}_2"] = tensor

    tokens: Tensor | None = None
    for tensor in found:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.ndim == 3:
            tokens = tensor
            put("encoder_hidden_states", tensor)
        elif tensor.ndim == 2 and tokens is not None and _masks(tensor, tokens):
            put("encoder_attention_mask", tensor)
        elif tensor.ndim == 2:
            put("pooled_projections", tensor)
        else:
            raise UserError(
                "encode_prompt: expected tensors with two or three dimensions, found "
                f"{list(tensor.shape)}"
            )
    return named


def _masks(tensor: Tensor, tokens: Tensor) -> bool:
    return tensor.shape == tokens.shape[:2] and bool(((tensor == 0) | (tensor == 1)).all())


def _arguments(transformer: ModelSpec) -> dict[str, inspect.Parameter]:
    import diffusers

    model: Any = getattr(diffusers, transformer.class_name, None)
    if model is None:
        raise UserError(
            f"diffusers {diffusers.__version__} has no class {transformer.class_name} "
            f"({transformer.origin})"
        )
    parameters = inspect.signature(model.forward).parameters
    return {name: parameter for name, parameter in parameters.items() if name != "self"}


def _default(function: Any, name: str) -> Any:
    """The default of an argument, None where there is none."""
    parameter = inspect.signature(function).parameters.get(name)
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    return parameter.default


def _strides(pipe: Any) -> tuple[int, int]:
    """Video frames per latent frame after the first, and pixels per latent pixel."""
    found = []
    for kind in ("temporal", "spatial"):
        names = (f"vae_scale_factor_{kind}", f"vae_{kind}_compression_ratio")
        values = [getattr(pipe, name, None) for name in (*names, f"vae_{kind}_scale_factor")]
        stride = next((value for value in values if value), None)
        if stride is None:
            raise UserError(f"{type(pipe).__name__}: how its VAE compresses a clip is not known")
        found.append(int(stride))
    return found[0], found[1]


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of a model's configuration and weights; the first 16 digits."""
    digest = hashlib.sha256()
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if k[:1] != "_"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
