"""Losses on held-out clips with fixed noise: dense, and as the policy says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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


class Forward(NamedTuple):
    """A clip at some of the noise levels, by their places in the list."""

    clip: int
    levels: tuple[int, ...]


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
        self._clips = min(spec.clips, len(source))
        self._forwards = [
            Forward(clip, tuple(range(first, min(first + size, len(spec.noise)))))
            for clip in range(self._clips)
            for first in range(0, len(spec.noise), size)
        ]
        # All processes run equally many; what is added counts nothing.
        self._forwards += [Forward(0, ())] * (-len(self._forwards) % processes.count)
        self._size = size

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
        for clip, counted in self._forwards[self._processes.rank :: self._processes.count]:
            # All forwards have the batch size that the model is compiled for.
            which = list(counted) + [0] * (self._size - len(counted))
            levels = torch.tensor([self._spec.noise[level] for level in which])
            batch = collate([self._source.sample(clip)] * self._size)
            noise = _noise(clip, batch.latents.shape[1:]).expand_as(batch.latents)
            draw = Draw(noise, levels, torch.zeros(self._size, dtype=torch.bool))
            noisy = self._objective.noisy(batch, draw).to(self._processes.device)
            losses = self._objective.losses(subject.predict(noisy), noisy).double().cpu()
            for level, loss in zip(counted, losses, strict=False):
                total[level] += loss
        device = self._processes.device
        return self._processes.sum(total.to(device)).cpu()


def _noise(clip: int, shape: Sequence[int]) -> Tensor:
    rng = np.random.RandomState(SEED + clip)
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))
