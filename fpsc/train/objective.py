"""What a step minimises: clean clips are made noisy, the model predicts, and its error is weighed.

Every random number belongs to one clip of one step: a function of (seed, step, place in the step's
whole batch), drawn on the CPU. So it does not matter how often a run was stopped, nor over how many
processes a step is spread.

Noise levels are stratified: of B clips in a step, one has its level in each of B equally likely
parts of the distribution, which makes losses of small batches less noisy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fpsc.errors import UserError
from fpsc.train import config
from fpsc.train.data import Batch

Prediction = Literal["velocity", "sample", "v"]
Convention = Literal["flow", "reversed", "unit"]

CONVENTIONS: dict[str | None, Convention] = {
    "flow": "flow",
    "reversed": "reversed",
    "unit": "unit",
}
"""Those of `fpsc.kernels.rows` that there is an objective for."""

TIMESTEPS = 1000
"""Of a schedule, as `fpsc.kernels.rows` counts them."""

EDGE = 1e-6
"""Levels of probability 0 and 1 do not exist."""


@dataclass(frozen=True)
class Draw:
    """The random numbers of a batch.

    Attributes:
        noise: float32, like the latents.
        level: float32 [B], noise in (0, 1].
        dropped: bool [B], whose prompt is dropped.
    """

    noise: Tensor
    level: Tensor
    dropped: Tensor


@dataclass(frozen=True)
class Noisy:
    """A batch as the model gets it.

    Attributes:
        batch: the clean one.
        noise, level: of `Draw`.
        latents: float32 [B, C, F, H, W], noisy, with `Batch.beside` behind their channels.
        timestep: float32 [B], as the model counts.
        conditioning: further arguments of the model.
    """

    batch: Batch
    noise: Tensor
    level: Tensor
    latents: Tensor
    timestep: Tensor
    conditioning: dict[str, Tensor]

    def to(self, device: torch.device) -> Noisy:
        """All of it on a device."""
        moved = {name: value.to(device) for name, value in self.conditioning.items()}
        clean = replace(self.batch, latents=self.batch.latents.to(device), beside=None)
        return Noisy(
            clean,
            self.noise.to(device),
            self.level.to(device),
            self.latents.to(device),
            self.timestep.to(device),
            moved,
        )


class Path(Protocol):
    """How noise and clip are mixed."""

    def mix(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The noisy latents; level broadcasts against them."""

    def target(self, prediction: Prediction, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the model should predict."""


class Straight:
    """Flow matching: (1 - level) clean + level noise.

    Args:
        reversed: the model counts time from noise to clean, and so its velocity does.
    """

    def __init__(self, *, reversed: bool = False) -> None:
        self._sign = -1.0 if reversed else 1.0

    def mix(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return torch.lerp(clean, noise, level)

    def target(self, prediction: Prediction, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return clean if prediction == "sample" else self._sign * (noise - clean)


class Preserving:
    """Diffusion that keeps the variance: a clean + b noise, a^2 + b^2 = 1 (Ho et al. 2020).

    Args:
        alphas_cumprod: float [TIMESTEPS], a^2 by timestep, as the schedulers of diffusers have it.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self._alphas = alphas_cumprod.float()

    def mix(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        a, b = self._factors(level)
        return a * clean + b * noise

    def target(self, prediction: Prediction, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """v: Salimans and Ho 2022, "Progressive Distillation"."""
        a, b = self._factors(level)
        return clean if prediction == "sample" else a * noise - b * clean

    def _factors(self, level: Tensor) -> tuple[Tensor, Tensor]:
        index = (level * len(self._alphas)).long().clamp(0, len(self._alphas) - 1)
        squared = self._alphas.to(level.device)[index]
        return squared.sqrt(), (1 - squared).sqrt()


class Objective:
    """The loss of a run.

    Args:
        spec: of the configuration.
        seed: of the run.
        prediction: what the model predicts.
        convention: how it counts time.
        path: how noise and clip are mixed.
    """

    def __init__(
        self,
        spec: config.Objective,
        seed: int,
        prediction: Prediction,
        convention: Convention,
        path: Path,
    ) -> None:
        self.spec = spec
        self.prediction = prediction
        self.convention = convention
        self._seed = seed
        self._path = path

    def draw(self, latents: Tensor, step: int, first: int, of: int) -> Draw:
        """The random numbers of a part of a step's batch.

        Args:
            latents: [B, ...] of this part.
            first: place of its first clip in the whole batch of `of` clips.
        """
        noise, levels, dropped = [], [], []
        for place in range(first, first + len(latents)):
            stream = np.random.SeedSequence([self._seed, step, place]).generate_state(8)
            rng = np.random.RandomState(stream)
            levels.append(self.level((place + rng.uniform()) / of))
            dropped.append(rng.uniform() < self.spec.no_prompt)
            noise.append(_normal(rng, latents.shape[1:]))
        return Draw(torch.stack(noise), torch.tensor(levels), torch.tensor(dropped))

    def level(self, quantile: float) -> float:
        """The noise level below which a share `quantile` of all levels lies.

        logit-normal: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1; the
        shift: section 5.3.2.
        """
        spec, level = self.spec, min(max(quantile, EDGE), 1 - EDGE)
        if spec.levels == "logit-normal":
            level = 1 / (1 + np.exp(-NormalDist(spec.mean, spec.std).inv_cdf(level)))
        return float(spec.shift * level / (1 + (spec.shift - 1) * level))

    def noisy(self, batch: Batch, draw: Draw) -> Noisy:
        """What the model gets.

        Raises:
            UserError: a prompt is to be dropped, and the clips do not say what replaces it.
        """
        latents = self._path.mix(batch.latents.float(), draw.noise, _like(draw.level, draw.noise))
        if batch.beside is not None:
            latents = torch.cat([latents, batch.beside.to(latents.dtype)], dim=1)
        return Noisy(
            batch=batch,
            noise=draw.noise,
            level=draw.level,
            latents=latents,
            timestep=self.timestep(draw.level),
            conditioning=_without_prompt(batch, draw.dropped),
        )

    def timestep(self, level: Tensor) -> Tensor:
        """float32 [B]: a noise level as the model is told it."""
        match self.convention:
            case "flow":
                return level * TIMESTEPS
            case "reversed":
                return TIMESTEPS - level * TIMESTEPS
            case "unit":
                return level

    def losses(self, predicted: Tensor, noisy: Noisy) -> Tensor:
        """float32 [B]: mean squared errors, those of clean samples as errors of the velocity that
        they imply, (noisy - sample) / level."""
        clean = noisy.batch.latents.float()
        level = _like(noisy.level, clean)
        target = self._path.target(self.prediction, clean, noisy.noise, level)
        return self.weights(noisy.level) * _mean((predicted.float() - target).square())

    def distances(self, predicted: Tensor, other: Tensor, level: Tensor) -> Tensor:
        """float32 [B]: the same measure, between two predictions."""
        return self.weights(level) * _mean((predicted.float() - other.float()).square())

    def weights(self, level: Tensor) -> Tensor:
        """float32 [B]: what a squared error of a prediction counts."""
        if self.prediction != "sample":
            return torch.ones_like(level)
        return 1 / level.clamp(min=self.spec.floor).square()


def build(
    loaded: config.Config, convention: str | None, scheduler: Mapping[str, Any] | None
) -> Objective:
    """The objective for a model.

    Args:
        convention: of the model's family; None where the family is not known.
        scheduler: the configuration of the scheduler beside the model, where there is one.

    Raises:
        UserError: what the model predicts, or how it counts time, is not known or not supported.
    """
    spec = loaded.spec.objective
    counted = convention if spec.timestep == "auto" else spec.timestep
    if counted not in CONVENTIONS:
        found = f"{counted}, which has no objective here" if counted else "no known family"
        raise loaded.error(
            ("objective", "timestep"),
            f"the model counts time by {found}: expected flow, reversed or unit; where it is one "
            "of them, say which",
        )
    known: Convention = CONVENTIONS[counted]
    prediction = spec.prediction
    if prediction == "auto":
        prediction = _predicted(loaded, scheduler)
    if prediction == "v":
        alphas = _alphas(scheduler)
        if alphas is None:
            raise loaded.error(
                ("objective", "prediction"),
                "v needs the variance preserving schedule of a scheduler beside the model; name "
                "the folder of its pipeline as model",
            )
        return Objective(spec, loaded.spec.seed, "v", known, Preserving(alphas))
    path = Straight(reversed=known == "reversed")
    return Objective(spec, loaded.spec.seed, prediction, known, path)


def _predicted(loaded: config.Config, scheduler: Mapping[str, Any] | None) -> Prediction:
    """What a scheduler takes the model's output for."""
    kinds: dict[str, Prediction] = {
        "flow_prediction": "velocity",
        "sample": "sample",
        "v_prediction": "v",
    }
    if scheduler is None or "prediction_type" not in scheduler:
        return "velocity"
    kind = scheduler["prediction_type"]
    if kind not in kinds:
        raise loaded.error(
            ("objective", "prediction"),
            f"the scheduler beside the model says prediction_type {kind!r}; expected one of "
            f"{', '.join(kinds)}",
        )
    return kinds[kind]


def _alphas(scheduler: Mapping[str, Any] | None) -> Tensor | None:
    """float [TIMESTEPS]: `alphas_cumprod` of a scheduler of diffusers."""
    import diffusers

    kind: Any = getattr(diffusers, str((scheduler or {}).get("_class_name")), None)
    if not isinstance(kind, type) or not hasattr(kind, "from_config"):
        return None
    return getattr(kind.from_config(dict(scheduler or {})), "alphas_cumprod", None)


def _normal(rng: np.random.RandomState, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))


def _like(level: Tensor, latents: Tensor) -> Tensor:
    return level.view(-1, *(1,) * (latents.ndim - 1))


def _mean(errors: Tensor) -> Tensor:
    return errors.flatten(1).mean(1)


def _without_prompt(batch: Batch, dropped: Tensor) -> dict[str, Tensor]:
    if not dropped.any():
        return batch.conditioning
    if not batch.empty:
        key = batch.keys[int(dropped.nonzero()[0])]
        raise UserError(
            f"{key}: its prompt is to be dropped (objective.no_prompt), and it has no empty one; "
            "encode the clips with an empty prompt, or set objective.no_prompt: 0"
        )
    conditioning = dict(batch.conditioning)
    for name, empty in batch.empty.items():
        given = conditioning[name]
        conditioning[name] = torch.where(_like(dropped, given), empty.to(given.dtype), given)
    return conditioning
