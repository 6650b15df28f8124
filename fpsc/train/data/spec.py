"""The `data` section of a training configuration, and the sources that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fpsc.errors import UserError
from fpsc.train.data.demo import Demo
from fpsc.train.data.sample import Source
from fpsc.train.data.shards import check_names, open_shards

DEMO = "demo"
"""The name of the synthetic clips."""

PLACES = "demo, a folder of encoded clips, a list of its shards, or hf://datasets/owner/name"


class Data(BaseModel):
    """Where the clips of training and of validation are.

    One folder can be both: what was encoded as held out is for validation, the rest for training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    train: str | list[str] = Field(default=DEMO, description=PLACES)
    validation: str | list[str] = Field(default=DEMO, description=PLACES)
    leave_out: list[str] = Field(
        default=[],
        description="a list of shards and samples that are not read, as 00003.safetensors or "
        "00003.safetensors#17",
    )


def open_source(
    spec: Data | Mapping[str, Any] | str | Path | Sequence[str],
    *,
    held_out: bool,
    base: Path | None = None,
) -> Source:
    """The clips of training, or those that it never sees.

    Args:
        spec: a data section, or one of its places.
        held_out: the clips of `validation` instead of those of `train`.
        base: relative paths start here; the working directory without it.

    Raises:
        UserError: nothing of that name exists or can be read, or nothing is held out in a folder
            that is used for both.
    """
    data = _section(spec)
    place = data.validation if held_out else data.train
    base = base or Path()
    if data.leave_out:
        encoded = [each for each in (data.train, data.validation) if each != DEMO]
        check_names(data.leave_out, encoded, base)
    if place == DEMO:
        return Demo(held_out=held_out)
    shared = isinstance(spec, Data | Mapping) and data.train == data.validation
    return open_shards(
        place, held_out=held_out, shared=shared, leave_out=data.leave_out, base=base
    )


def _section(spec: Data | Mapping[str, Any] | str | Path | Sequence[str]) -> Data:
    if isinstance(spec, Data):
        return spec
    if isinstance(spec, Mapping):
        try:
            return Data.model_validate(dict(spec))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(("data", *map(str, first["loc"])))
            raise UserError(
                f"{where}: expected {PLACES}; {first['msg']}, found {first['input']!r}"
            ) from None
    place = str(spec) if isinstance(spec, str | Path) else [str(each) for each in spec]
    return Data(train=place, validation=place)
