"""The moving average of the weights in training, which is what a run writes at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fpsc.train.sharding import local


class Average:
    """An exponential moving average of parameters.

    Young averages forget faster: decay is (1 + step) / (10 + step) where that is less, so that a
    short run is not stuck to where it began.

    Args:
        parameters: by name.
        decay: 0 for none: the average is then the parameters themselves.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in parameters.items() if decay
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step number `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, average in self.tensors.items():
            local(average).lerp_(local(self.parameters[name].detach()), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the parameters, for as long as this lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            parameter = local(self.parameters[name].detach())
            kept = parameter.clone()
            parameter.copy_(local(average))
            local(average).copy_(kept)
