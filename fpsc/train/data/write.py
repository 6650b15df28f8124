"""Write encoded clips in shards, so that a run that is stopped goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsc.errors import UserError
from fpsc.files import replacing
from fpsc.train.data.index import (
    INDEX,
    SUFFIX,
    Index,
    Shard,
    TensorSpec,
    checksum,
    read_index,
    write_index,
)

COMMON = "common" + SUFFIX
CLIPS = "clips"
"""Key in a shard's metadata: a JSON list of the `name` and `caption` of each sample."""


@dataclass(frozen=True)
class Encoded:
    """A sample to write: its tensors by their names in a shard, without a dimension of samples."""

    name: str
    caption: str
    held_out: bool
    tensors: dict[str, Tensor]


@contextmanager
def writing(
    folder: Path, encoded: Mapping[str, Any], common: Mapping[str, Tensor], *, size: int
) -> Iterator[Writer]:
    """A writer of a folder's shards; at the end, what is not yet a whole shard is written too.

    After an error only whole shards are there; the rest is encoded again by the next run.

    Args:
        encoded: what encodes the clips, for the index; `versions` in it may change between runs.
        common: tensors that every sample has.
        size: samples of a shard.

    Raises:
        UserError: another process writes the folder, or it was written with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another `fpsc encode` is writing there. Wait for its end, or choose "
                "another folder; training takes a list of folders"
            ) from None
        for left in folder.glob(".*.tmp.*"):  # of a run that was killed
            left.unlink()
        writer = Writer(folder, encoded, common, size)
        yield writer
        writer.flush()
    finally:
        os.close(held)


class Writer:
    """Collects samples of one shape until they fill a shard. Made by `writing`.

    Attributes:
        done: names of the clips that are in shards.
        index: as it is on disk.
    """

    def __init__(
        self, folder: Path, encoded: Mapping[str, Any], common: Mapping[str, Tensor], size: int
    ) -> None:
        self.folder, self.size = folder, size
        self.done: set[str] = set()
        self._waiting: dict[tuple[Any, ...], list[Encoded]] = {}
        self.index = Index(encoded=json.loads(json.dumps(encoded)))
        if (folder / INDEX).is_file():
            self.index = self._resumed(read_index(folder / INDEX, str(folder / INDEX)))
        if common and self.index.common is None:
            sample = Encoded("common", "", False, dict(common))
            self.index = self.index.model_copy(update={"common": self._write(COMMON, [sample])})
        write_index(self.index, folder / INDEX)

    def _resumed(self, found: Index) -> Index:
        """The index of what is there: shards that are missing or cut short are written again."""
        for name in sorted(self.index.encoded.keys() | found.encoded.keys()):
            ours, theirs = self.index.encoded.get(name), found.encoded.get(name)
            if ours != theirs and name != "versions":
                raise UserError(
                    f"{self.folder} was encoded with {name}: {json.dumps(theirs)}, and this run "
                    f"has {json.dumps(ours)}. Choose another folder, or delete this one"
                )
        shards = []
        for shard in found.shards:
            names = self._names(shard)
            if names is not None:
                shards.append(shard)
                self.done.update(names)
        common = found.common
        if common is not None and self._names(common) is None:
            common = None
        return found.model_copy(update={"shards": tuple(shards), "common": common})

    def _names(self, shard: Shard) -> list[str] | None:
        """Names of the clips of a shard; None where its file is not what the index says."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / shard.file
        try:
            if path.stat().st_size != shard.bytes:
                return None
            with safe_open(path, framework="pt") as file:
                clips = json.loads((file.metadata() or {})[CLIPS])
            return [clip["name"] for clip in clips]
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            return None

    def add(self, sample: Encoded) -> None:
        """Take a sample; its shard is written once it is full."""
        shapes = tuple(
            (name, str(TensorSpec.of(tensor))) for name, tensor in sorted(sample.tensors.items())
        )
        waiting = self._waiting.setdefault((sample.held_out, shapes), [])
        waiting.append(sample)
        if len(waiting) == self.size:
            self._close(waiting)

    def flush(self) -> None:
        """Write what is not yet a whole shard."""
        for waiting in self._waiting.values():
            if waiting:
                self._close(waiting)

    def _close(self, samples: list[Encoded]) -> None:
        taken = {shard.file for shard in self.index.shards}
        file = next(f for n in count() if (f := f"{n:05}{SUFFIX}") not in taken)
        shard = self._write(file, samples)
        shards = sorted((*self.index.shards, shard), key=lambda each: each.file)
        self.index = self.index.model_copy(update={"shards": tuple(shards)})
        write_index(self.index, self.folder / INDEX)
        self.done.update(sample.name for sample in samples)
        samples.clear()

    def _write(self, file: str, samples: Sequence[Encoded]) -> Shard:
        from safetensors.torch import save_file

        first = samples[0]
        stacked = {
            name: torch.stack([sample.tensors[name] for sample in samples])
            for name in first.tensors
        }
        clips = [{"name": sample.name, "caption": sample.caption} for sample in samples]
        with replacing(self.folder / file) as beside:
            save_file(stacked, beside, {CLIPS: json.dumps(clips, ensure_ascii=False)})
            size = beside.stat().st_size
        return Shard(
            file=file,
            bytes=size,
            held_out=first.held_out,
            tensors={name: TensorSpec.of(tensor) for name, tensor in first.tensors.items()},
            checksums=tuple(checksum(sample.tensors) for sample in samples),
        )
