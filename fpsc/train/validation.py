"""Losses on held-out clips with fixed noise: dense, and as the policy says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpsc.policy import Policy
from fpsc.train import config
from fpsc.train.data import Source, collate
from fpsc.train.objective import Draw, Objective
from fpsc.train.processes import Processes
from fpsc.train.subject import Subject

SEED = 2**31
"""Of the noise: no training step has it."""


@dataclass(frozen=True)
class Found:
    """What a validation found.

    Attributes:
        noise: the levels.
        dense, sparse: mean loss at each of them, with dense attention and with the policy's.
    """

    noise: list[float]
    dense: list[float]
    sparse: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `gap` is how much larger the sparse mean is, as a share of the dense one."""
        dense, sparse = float(np.mean(self.dense)), float(np.mean(self.sparse))
        return {
            **asdict(self),
            "dense_mean": dense,
            "sparse_mean": sparse,
            "gap": sparse / dense - 1,
        }


class Validator:
    """Measures a model on the first clips of a held-out source.

    Args:
        size: clips in a forward: what the model is trained with, which fits.
    """

    def __init__(
        self,
        spec: config.Validation,
        source: Source,
        objective: Objective,
        processes: Processes,
        size: int,
    ) -> None:
        self._spec = spec
        self._source = source
        self._objective = objective
        self._processes = processes
        clips = min(spec.clips, len(source))
        pairs = [(clip, level) for clip in range(clips) for level in range(len(spec.noise))]
        # All processes run equally many forwards; what is added counts nothing.
        whole = size * processes.count
        missing = -len(pairs) % whole
        self._weights = [1.0] * len(pairs) + [0.0] * missing
        self._pairs = pairs + pairs[:1] * missing
        self._size = size
        self._clips = clips

    def measure(self, subject: Subject, dense: Policy, sparse: Policy) -> Found:
        """The losses of a model that has run; it is left with the sparse policy."""
        losses = {}
        for name, policy in (("dense", dense), ("sparse", sparse)):
            subject.set_policy(policy)
            losses[name] = (self._table(subject) / self._clips).tolist()
        return Found(list(self._spec.noise), **losses)

    @torch.no_grad()
    def _table(self, subject: Subject) -> Tensor:
        """float64 [levels]: the sum of losses over all clips."""
        total = torch.zeros(len(self._spec.noise), dtype=torch.float64)
        rank, size = self._processes.rank, self._size
        for first in range(rank * size, len(self._pairs), self._processes.count * size):
            pairs = self._pairs[first : first + size]
            batch = collate([self._source.sample(clip) for clip, _ in pairs])
            levels = torch.tensor([self._spec.noise[level] for _, level in pairs])
            noise = torch.stack([_noise(clip, tuple(batch.latents.shape[1:])) for clip, _ in pairs])
            draw = Draw(noise, levels, torch.zeros(len(pairs), dtype=torch.bool))
            noisy = self._objective.noisy(batch, draw).to(self._processes.device)
            losses = self._objective.losses(subject.predict(noisy), noisy).cpu()
            for offset, (_, level) in enumerate(pairs):
                total[level] += self._weights[first + offset] * losses[offset].double()
        device = self._processes.device
        return self._processes.sum(total.to(device)).cpu()


def _noise(clip: int, shape: tuple[int, ...]) -> Tensor:
    rng = np.random.RandomState(SEED + clip)
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
