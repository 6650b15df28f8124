"""One clip, a batch of them, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fpsc.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One clip, without a batch dimension.

    Attributes:
        key: names it in errors: `latents/00003.safetensors#17`, `demo#42`.
        latents: [C, F, H, W], normalised as the model takes them.
        conditioning: arguments of the model's forward beside latents and timestep, by name.
        beside: [C2, F, H, W], joined to the noisy latents along the channels: the first frame of
            an image-to-video model, the demo's places.
        empty: the arguments of `conditioning` that the empty prompt changes, to drop prompts;
            none where the source does not have them.
    """

    key: str
    latents: Tensor
    conditioning: dict[str, Tensor]
    beside: Tensor | None = None
    empty: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket: the fields of `Sample`, each with a batch dimension in front."""

    keys: tuple[str, ...]
    latents: Tensor
    conditioning: dict[str, Tensor]
    beside: Tensor | None = None
    empty: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return Batch(
            self.keys,
            self.latents.to(device),
            moved(self.conditioning),
            None if self.beside is None else self.beside.to(device),
            moved(self.empty),
        )


@runtime_checkable
class Source(Protocol):
    """Random access to samples."""

    def __len__(self) -> int:
        """Samples; a source that draws them has a large number."""

    def sample(self, index: int) -> Sample:
        """The same whenever it is asked for.

        Raises:
            UserError: it cannot be read.
        """


@dataclass(frozen=True)
class Bucket:
    """Samples of one shape: those from `first` on.

    Attributes:
        first: index of the first one in its source.
        shards: how many of them lie in each shard, in order.
        together: shards that are shuffled together; fewer than all where reading a shard is dear.
        name: in errors.
    """

    first: int
    shards: tuple[int, ...]
    together: int
    name: str

    def __len__(self) -> int:
        return sum(self.shards)


@runtime_checkable
class Bucketed(Source, Protocol):
    """A source that knows which of its samples have equal shapes."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Every sample is in exactly one."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal shapes and dtypes.

    Raises:
        UserError: two of them differ; names both, and in what.
        ValueError: there is none.
    """
    if not samples:
        raise ValueError("expected at least one sample, found none")
    first, *others = (dict(_tensors(sample)) for sample in samples)
    for sample, tensors in zip(samples[1:], others, strict=True):
        for name in sorted(first.keys() | tensors.keys()):
            a, b = _described(first.get(name)), _described(tensors.get(name))
            if a != b:
                raise UserError(
                    f"{samples[0].key} and {sample.key} cannot be in one batch: {name} is {a} in "
                    f"the first and {b} in the second. Encode them to one size, or train with "
                    "batch 1"
                )
    stacked = {name: torch.stack([t[name] for t in (first, *others)]) for name in first}
    return Batch(
        keys=tuple(sample.key for sample in samples),
        latents=stacked["latents"],
        conditioning=_part(stacked, "conditioning"),
        beside=stacked.get("beside"),
        empty=_part(stacked, "empty"),
    )


def _tensors(sample: Sample) -> Iterator[tuple[str, Tensor]]:
    yield "latents", sample.latents
    if sample.beside is not None:
        yield "beside", sample.beside
    for part, named in (("conditioning", sample.conditioning), ("empty", sample.empty)):
        for name, tensor in named.items():
            yield f"{part}.{name}", tensor


def _part(stacked: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in stacked.items()
        if name.startswith(f"{part}.")
    }


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "not there"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
