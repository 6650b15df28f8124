"""`index.json`: what the shards of a folder hold, and what encoded them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fpsc.errors import UserError
from fpsc.files import replacing

INDEX = "index.json"
SCHEMA = 1
SUFFIX = ".safetensors"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class TensorSpec(_Entry):
    """A tensor of one sample; in its shard it has a dimension of samples in front."""

    dtype: str = Field(pattern="^[a-z0-9_]+$")
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        name = str(tensor.dtype).removeprefix("torch.")
        return cls(dtype=name, shape=tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Shard(_Entry):
    """A safetensors file with samples of one shape.

    Attributes:
        file: its name; never a path.
        bytes: its size.
        held_out: whether its samples are for validation.
        tensors: of each sample: `latents`, `beside`, and `conditioning.` or `empty.` and the name
            of an argument.
        checksums: of each sample, as `checksum` returns it.
    """

    file: str = Field(pattern=r"^\w[\w.-]*\.safetensors$")
    bytes: int
    held_out: bool
    tensors: dict[str, TensorSpec]
    checksums: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.checksums)


class Index(_Entry):
    """What a folder of encoded clips holds.

    Attributes:
        version: of this format.
        encoded: the model, VAE and settings that wrote it.
        common: tensors that every sample has, written once: a shard of one sample.
        shards: in the order in which they were written.
    """

    version: Literal[1] = Field(default=SCHEMA, alias="fpsc-latents")
    encoded: dict[str, Any]
    common: Shard | None = None
    shards: tuple[Shard, ...] = ()


def read_index(path: Path, name: str) -> Index:
    """Read an index.

    Args:
        name: of it, for errors.

    Raises:
        UserError: it is not one, or of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{name}: expected the index that `fpsc encode` writes, found what cannot be read as "
            f"JSON: {error}"
        ) from error
    version = values.get("fpsc-latents") if isinstance(values, dict) else None
    if version != SCHEMA:
        raise UserError(
            f"{name}: expected fpsc-latents: {SCHEMA}, found {version!r}. Encode the clips again "
            "with `fpsc encode`, or use the fpsc that wrote it"
        )
    try:
        return Index.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{name}: {where}: {first['msg']}, found {first['input']!r}. Encode the clips again "
            "with `fpsc encode`"
        ) from None


def write_index(index: Index, path: Path) -> None:
    """Write an index, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(
            json.dumps(index.model_dump(mode="json", by_alias=True), indent=1) + "\n",
            encoding="utf-8",
        )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over the names and bytes of a sample's tensors, in the order of their names."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        found = crc32(name.encode(), found)
        found = crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
