"""Encoded clips in safetensors shards as a source, with random access to every sample."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from fpsc.errors import UserError
from fpsc.train.data.index import INDEX, Index, Shard, checksum, read_index
from fpsc.train.data.places import AbsentError, Dataset, Place, place_of
from fpsc.train.data.sample import Bucket, Sample

OPEN_FILES = 64
TOGETHER = 8
"""Shards of a hub's dataset that are shuffled together: so many are fetched before the first
samples of a group are used up, and no more. Shards of a folder are all shuffled together."""


@dataclass(frozen=True)
class Part:
    """The samples of a shard that are used: their rows in it."""

    place: Place
    index: Index
    shard: Shard
    rows: Sequence[int]

    @property
    def name(self) -> str:
        return f"{self.place.name}/{self.shard.file}"

    @property
    def shapes(self) -> tuple[tuple[str, str], ...]:
        """Equal for samples that can be in one batch."""
        common = self.index.common.tensors if self.index.common else {}
        tensors = {**common, **self.shard.tensors}
        return tuple((name, str(spec)) for name, spec in sorted(tensors.items()))


class Shards:
    """Samples of shards. Every one is checked when it is read: size, shapes, checksum, NaN."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = sorted(parts, key=lambda part: part.shapes)
        self._ends = list(accumulate(len(part.rows) for part in self.parts))
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._common: dict[str, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def encoded(self) -> dict[str, Any]:
        """What encoded the clips, as the index has it."""
        return self.parts[0].index.encoded

    @property
    def buckets(self) -> list[Bucket]:
        found, first = [], 0
        for _, group in groupby(self.parts, key=lambda part: part.shapes):
            parts = list(group)
            sizes = tuple(len(part.rows) for part in parts)
            remote = any(part.place.remote for part in parts)
            latents = list(parts[0].shard.tensors["latents"].shape)
            files = ", ".join(part.shard.file for part in parts[:3])
            name = f"{parts[0].place.name}, latents {latents} ({files}{', ...' * (len(parts) > 3)})"
            found.append(Bucket(first, sizes, TOGETHER if remote else len(sizes), name))
            first += sum(sizes)
        return found

    def sample(self, index: int) -> Sample:
        """The sample of an index.

        Raises:
            UserError: its shard is missing, truncated or corrupt, or it is not finite.
        """
        index = range(len(self))[index]
        which = bisect_right(self._ends, index)
        part = self.parts[which]
        row = part.rows[index - (self._ends[which] - len(part.rows))]
        key = f"{part.name}#{row}"
        with self._lock:
            tensors = {**self._shared(part), **self._row(part, row, key)}
        return Sample(
            key=key,
            latents=tensors["latents"],
            conditioning=_named(tensors, "conditioning."),
            beside=tensors.get("beside"),
            empty=_named(tensors, "empty."),
        )

    def _shared(self, part: Part) -> dict[str, Tensor]:
        common = part.index.common
        if common is None:
            return {}
        if part.place.name not in self._common:
            whole = Part(part.place, part.index, common, range(1))
            self._common[part.place.name] = self._row(whole, 0, whole.name)
        return self._common[part.place.name]

    def _row(self, part: Part, row: int, key: str) -> dict[str, Tensor]:
        """The tensors of one sample, checked."""
        from safetensors import SafetensorError

        file = self._file(part)
        try:
            tensors = {
                name: file.get_slice(name)[row : row + 1][0] for name in sorted(part.shard.tensors)
            }
        except (SafetensorError, OSError) as error:
            raise _broken(part, f"{key} cannot be read: {error}") from error
        found = checksum(tensors)
        if found != part.shard.checksums[row]:
            expected = part.shard.checksums[row]
            raise _broken(part, f"{key} is corrupt: expected checksum {expected}, found {found}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
                wrong = int((~finite).sum())
                raise UserError(
                    f"{key}: {name}: expected finite numbers, found {wrong} of {tensor.numel()} "
                    f"that are NaN or infinite. Leave it out with data.leave_out: "
                    f'["{part.shard.file}#{row}"], or encode its clip again'
                )
        return tensors

    def _file(self, part: Part) -> Any:
        """The opened shard; few stay open."""
        if part.name in self._files:
            self._files.move_to_end(part.name)
        else:
            self._files[part.name] = _opened(part)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return self._files[part.name]


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _broken(part: Part, what: str) -> UserError:
    if part.place.remote:
        again = "Delete it from the hub's cache to fetch it again"
    else:
        again = "Delete it and run its `fpsc encode` again, which encodes what is missing"
    return UserError(f"{what}. {again}, or leave it out with data.leave_out: [{part.shard.file}]")


def _opened(part: Part) -> Any:
    """The file of a shard, if it is what its index says.

    Raises:
        UserError: it is missing, or of another size, or holds other tensors.
    """
    from safetensors import SafetensorError, safe_open

    shard = part.shard
    try:
        path = part.place.fetch(shard.file)
    except AbsentError as error:
        raise _broken(
            part, f"{part.name}: expected a shard of {shard.bytes} bytes: {error}"
        ) from error
    if (size := path.stat().st_size) != shard.bytes:
        raise _broken(part, f"{part.name}: expected {shard.bytes} bytes, found {size}")
    try:
        file = safe_open(path, framework="pt")
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(piece.get_shape()) for name, piece in found.items()}
    except (SafetensorError, OSError) as error:
        raise _broken(part, f"{part.name} cannot be read as safetensors: {error}") from error
    expected = {name: (len(shard), *spec.shape) for name, spec in shard.tensors.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise _broken(
                part,
                f"{part.name}: {name}: expected {_shape(expected.get(name))}, found "
                f"{_shape(shapes.get(name))}",
            )
    return file


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(list(shape))


def open_shards(
    location: str | Sequence[str],
    *,
    held_out: bool,
    shared: bool,
    leave_out: Sequence[str] = (),
    base: Path,
) -> Shards:
    """Open a folder of encoded clips, some of its shards, or several folders.

    Args:
        held_out: the samples of validation. Where the index marks none, that is all of them.
        shared: the location serves training too, so some have to be marked.
        leave_out: names of shards, or of samples as `00003.safetensors#17`.

    Raises:
        UserError: there is no such place or shard, nothing is left, or another VAE encoded a part.
    """
    parts = [part for place in _grouped(location, base) for part in _parts(*place)]
    where = location if isinstance(location, str) else ", ".join(location)
    if not parts:
        raise UserError(f"{where}: expected encoded clips, found none. Encode some: fpsc encode")
    _one_vae(parts)
    marked = any(part.shard.held_out for part in parts)
    if held_out and shared and not marked:
        raise UserError(
            f"{where} is for training and for validation, and none of its clips is held out. "
            "Encode them with --held-out 0.05, or name another folder as data.validation"
        )
    chosen = [part for part in parts if part.shard.held_out == held_out or not marked]
    left = [part for part in _without(chosen, leave_out) if len(part.rows)]
    if not left:
        kind = "for validation" if held_out else "for training"
        raise UserError(
            f"{where}: expected clips {kind}, found none: {sum(map(_count, parts))} are encoded, "
            f"{sum(_count(p) for p in parts if p.shard.held_out)} of them held out, and "
            f"data.leave_out names {len(leave_out)}"
        )
    return Shards(left)


def check_names(names: Sequence[str], locations: Sequence[str | Sequence[str]], base: Path) -> None:
    """Check that everything to leave out is in one of the locations.

    Raises:
        UserError: the first name that is no shard and no sample of these locations.
    """
    parts = [
        part
        for location in locations
        for place in _grouped(location, base)
        for part in _parts(*place)
    ]
    for name in names:
        if not any(_leaves(name, part, row) for part in parts for row in part.rows):
            near = get_close_matches(name, [part.shard.file for part in parts], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"data.leave_out: {name} is no shard and no sample of "
                f"{', '.join(map(str, locations)) or 'demo'}{hint}"
            )


def _grouped(
    location: str | Sequence[str], base: Path
) -> Iterator[tuple[Place, frozenset[str] | None]]:
    """Every place once, with the files of it that are named; None for all."""
    places: dict[str, Place] = {}
    files: dict[str, set[str] | None] = {}
    for each in [location] if isinstance(location, str) else location:
        place, file = place_of(each, base)
        places[place.name] = place
        named = files.setdefault(place.name, set())
        if file is None:
            files[place.name] = None
        elif named is not None:
            named.add(file)
    for name, place in places.items():
        named = files[name]
        yield place, None if named is None else frozenset(named)


def _parts(place: Place, files: frozenset[str] | None) -> list[Part]:
    try:
        if isinstance(place, Dataset):
            place = place.pinned()
        index = read_index(place.fetch(INDEX), f"{place.name}/{INDEX}")
    except AbsentError as error:
        raise UserError(
            f"{place.name}: expected {INDEX}, which `fpsc encode` writes: {error}"
        ) from error
    have = {shard.file for shard in index.shards}
    if files is not None and (missing := sorted(files - have)):
        near = get_close_matches(missing[0], have, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{place.name}/{missing[0]} is not in {place.name}/{INDEX}{hint}")
    return [
        Part(place, index, shard, range(len(shard)))
        for shard in index.shards
        if files is None or shard.file in files
    ]


def _without(parts: Sequence[Part], leave_out: Sequence[str]) -> Iterator[Part]:
    for part in parts:
        rows = [row for row in part.rows if not any(_leaves(n, part, row) for n in leave_out)]
        yield part if len(rows) == len(part.rows) else Part(
            part.place, part.index, part.shard, rows
        )


def _leaves(name: str, part: Part, row: int) -> bool:
    """Whether a name to leave out means this sample: by its file, with or without the folder."""
    file, _, only = name.partition("#")
    return file in (part.shard.file, part.name) and only in ("", str(row))


def _count(part: Part) -> int:
    return len(part.rows)


def _one_vae(parts: Sequence[Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        a, b = first.index.encoded.get("vae"), part.index.encoded.get("vae")
        if a != b:
            raise UserError(
                f"{first.place.name} and {part.place.name} were encoded by different VAEs: {a} and "
                f"{b}. Train on one of them, or encode them with one model"
            )
