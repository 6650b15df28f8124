"""Shards as a source: what is read, and what is said of everything that is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpsc.errors import UserError
from fpsc.train.data import Batch, Data, Source, open_source, order
from fpsc.train.data.index import INDEX, checksum, read_index
from fpsc.train.data.places import AbsentError, Dataset, place_of
from fpsc.train.data.shards import Shards
from fpsc.train.data.write import Encoded, writing

WIDE, TALL = (4, 2, 3, 5), (4, 2, 5, 3)


def sample(number: int, shape: tuple[int, ...] = WIDE, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(shape, generator=generator).to(dtype),
        "conditioning.encoder_hidden_states": torch.randn(7, 8, generator=generator).to(dtype),
        "conditioning.encoder_attention_mask": torch.arange(7) < 1 + number % 7,
    }


COMMON = {"empty.encoder_hidden_states": torch.ones(7, 8), "conditioning.guidance": torch.tensor(6.0)}


def write(
    folder: Path,
    numbers: range = range(10),
    *,
    tall: Callable[[int], bool] = lambda n: n % 3 == 0,
    held: Callable[[int], bool] = lambda n: False,
    vae: str = "a",
    dtype: torch.dtype = torch.float32,
) -> Path:
    with writing(folder, {"vae": vae, "model": "m"}, COMMON, size=3) as writer:
        for n in numbers:
            tensors = sample(n, TALL if tall(n) else WIDE, dtype)
            writer.add(Encoded(f"clip {n}", f"caption {n}", held(n), tensors))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten samples: four tall ones in shards of 3 and 1, six wide ones in two of 3."""
    monkeypatch.chdir(tmp_path)
    return write(Path("latents"))


def numbers(source: Source) -> list[int]:
    """Which samples of `sample` these are, by their latents."""
    known = {
        sample(n, shape)["latents"].numpy().tobytes(): n for n in range(30) for shape in (WIDE, TALL)
    }
    return [known[source.sample(i).latents.numpy().tobytes()] for i in range(len(source))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path / "a", dtype=dtype)
    source = open_source(str(tmp_path / "a"), held_out=False)
    assert isinstance(source, Shards) and len(source) == 10
    assert sorted(numbers(source)) == list(range(10)) if dtype is torch.float32 else True
    for i in range(10):
        found = source.sample(i)
        n = next(n for n in range(10) if torch.equal(_latents(n, dtype), found.latents))
        expected = sample(n, TALL if n % 3 == 0 else WIDE, dtype)
        assert found.latents.dtype == dtype
        assert found.conditioning.keys() == {
            "encoder_hidden_states",
            "encoder_attention_mask",
            "guidance",
        }
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            assert torch.equal(found.conditioning[name], expected[f"conditioning.{name}"])
        assert found.conditioning["guidance"] == 6 and found.beside is None
        assert torch.equal(found.empty["encoder_hidden_states"], torch.ones(7, 8))


def _latents(n: int, dtype: torch.dtype) -> Tensor:
    return sample(n, TALL if n % 3 == 0 else WIDE, dtype)["latents"]


def test_batches_are_of_one_bucket(folder: Path) -> None:
    found = order(open_source("latents", held_out=False), seed=0)
    batches = [found.batch(step, 0, 1, 2) for step in range(10)]
    shapes = {tuple(batch.latents.shape[1:]) for batch in batches}
    assert shapes == {WIDE, TALL}
    for batch in batches:
        assert isinstance(batch, Batch) and len(batch) == 2 == len(batch.latents)
        assert batch.conditioning["guidance"].shape == (2,)
        assert batch.conditioning["encoder_attention_mask"].shape == (2, 7)
        assert all(key.startswith("latents/0000") and "#" in key for key in batch.keys)
    assert {key for batch in batches[:5] for key in batch.keys} == {
        f"latents/{shard.file}#{row}"
        for shard in read_index(Path("latents", INDEX), "i").shards
        for row in range(len(shard))
    }


@pytest.mark.parametrize("spell", [str, lambda p: [str(p)], Path, lambda p: {"train": str(p)}])
def test_spellings_of_a_place(folder: Path, spell: Callable[[Path], Any]) -> None:
    assert len(open_source(spell(folder), held_out=False)) == 10


def test_relative_to_the_configuration(folder: Path, tmp_path: Path) -> None:
    assert len(open_source("latents", held_out=False, base=tmp_path)) == 10
    with pytest.raises(UserError, match="expected demo, a folder"):
        open_source("latents", held_out=False, base=tmp_path / "other")


def test_some_shards(folder: Path) -> None:
    every = {f.name for f in folder.glob("0*")}
    assert every == {f"0000{i}.safetensors" for i in range(4)}
    two = open_source(["latents/00000.safetensors", "latents/00001.safetensors"], held_out=False)
    one = open_source("latents/00000.safetensors", held_out=False)
    assert len(two) == 6 and len(one) == 3
    assert set(numbers(one)) < set(numbers(two))
    with pytest.raises(UserError, match=r"00009.safetensors is not in latents/index.json; did you"):
        open_source("latents/00009.safetensors", held_out=False)


def test_several_folders_are_one_source(folder: Path) -> None:
    write(Path("more"), range(10, 14))
    source = open_source(["latents", "more"], held_out=False)
    assert sorted(numbers(source)) == list(range(14))
    assert len(source.buckets) == 2  # type: ignore[attr-defined]
    write(Path("other"), range(2), vae="b")
    with pytest.raises(UserError, match="latents and other were encoded by different VAEs: a and b"):
        open_source(["latents", "other"], held_out=False)


# ---- held out


def test_one_folder_for_both(tmp_path: Path) -> None:
    place = str(write(tmp_path / "a", held=lambda n: n in (2, 5)))
    data = Data(train=place, validation=place)
    train, held = (open_source(data, held_out=held) for held in (False, True))
    assert sorted(numbers(held)) == [2, 5]
    assert sorted(numbers(train)) == [n for n in range(10) if n not in (2, 5)]


def test_one_folder_for_both_with_nothing_held_out(folder: Path) -> None:
    data = Data(train="latents", validation="latents")
    assert len(open_source(data, held_out=False)) == 10
    with pytest.raises(UserError, match="none of its clips is held out. .*--held-out"):
        open_source(data, held_out=True)


def test_a_folder_for_validation_alone(folder: Path) -> None:
    data = Data(train="demo", validation="latents")
    assert len(open_source(data, held_out=True)) == 10
    assert open_source(data, held_out=False).sample(3).key == "demo#3"


def test_nothing_but_held_out_clips(tmp_path: Path) -> None:
    place = str(write(tmp_path / "a", held=lambda n: True))
    with pytest.raises(UserError, match="expected clips for training, found none: 10 are encoded"):
        open_source(place, held_out=False)


# ---- left out


def test_shards_and_samples_that_are_left_out(folder: Path) -> None:
    whole = open_source("latents", held_out=False)
    gone = whole.sample(0).key
    left = ["00001.safetensors", gone.removeprefix("latents/")]
    source = open_source({"train": "latents", "leave_out": left}, held_out=False)
    keys = [source.sample(i).key for i in range(len(source))]
    expected = [whole.sample(i).key for i in range(10)]
    assert keys == [k for k in expected if k != gone and "00001" not in k]
    assert len(keys) == 6


@pytest.mark.parametrize("name", ["00007.safetensors", "00001.safetensors#3", "0001"])
def test_a_name_to_leave_out_that_is_nowhere(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"leave_out: {name} is no shard and no sample"):
        open_source({"train": "latents", "leave_out": [name]}, held_out=False)


def test_everything_is_left_out(folder: Path) -> None:
    names = [path.name for path in folder.glob("0*")]
    with pytest.raises(UserError, match="found none: 10 are encoded, .*leave_out names 4"):
        open_source({"train": "latents", "leave_out": names}, held_out=False)


# ---- what is wrong with a shard


def read_all(**more: Any) -> None:
    source = open_source({"train": "latents", **more}, held_out=False)
    for i in range(len(source)):
        source.sample(i)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] = ord("x")
    path.write_bytes(data)


def shape(path: Path) -> None:
    """As long as before, with another shape in it."""
    data = path.read_bytes()
    assert data.count(b"[3,4,2,") == 1
    at = data.index(b"[3,4,2,")
    path.write_bytes(data[:at] + b"[3,2,4," + data[at + 7 :])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, r"expected a shard of \d+ bytes: it is not there"),
        (cut, r"00001.safetensors: expected \d+ bytes, found \d+"),
        (flip, r"00001.safetensors#2 is corrupt: expected checksum \w{8}, found \w{8}"),
        (header, "00001.safetensors cannot be read as safetensors"),
        (shape, r"latents: expected \[3, 4, 2, \d, \d\], found \[3, 2, 4, \d, \d\]"),
    ],
)
def test_a_bad_shard(folder: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(folder / "00001.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        read_all()
    assert "fpsc encode" in str(caught.value)
    assert "data.leave_out: [00001.safetensors]" in str(caught.value)
    read_all(leave_out=["00001.safetensors"])


@given(st.data())
def test_no_flipped_bit_of_a_sample_is_missed(data: st.DataObject) -> None:
    tensors = sample(data.draw(st.integers(0, 5)))
    name = data.draw(st.sampled_from(sorted(tensors)))
    before = checksum(tensors)
    assert before == checksum(dict(reversed(tensors.items())))
    raw = tensors[name].clone().view(-1).view(torch.uint8)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 if tensors[name].dtype == torch.bool else 1 << data.draw(st.integers(0, 7))
    changed = {**tensors, name: raw.view(tensors[name].dtype).view(tensors[name].shape)}
    assert checksum(changed) != before


def test_numbers_that_are_not_finite(folder: Path) -> None:
    """Written by something else: the checksum is right, the latents are not."""
    path = folder / "00001.safetensors"
    tensors = load_file(path)
    tensors["latents"][1, 0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    save_file(tensors, path)
    values = json.loads((folder / INDEX).read_text())
    entry = values["shards"][1]
    rows = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(3)]
    entry.update(checksums=[checksum(row) for row in rows], bytes=path.stat().st_size)
    (folder / INDEX).write_text(json.dumps(values))
    message = r"latents/00001.safetensors#1: latents: expected finite numbers, found 2 of 120"
    with pytest.raises(UserError, match=message) as caught:
        read_all()
    assert 'leave_out: ["00001.safetensors#1"]' in str(caught.value)
    read_all(leave_out=["00001.safetensors#1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "found what cannot be read as JSON"),
        ("[]", "expected fpsc-latents: 1, found None"),
        ('{"fpsc-latents": 2}', "expected fpsc-latents: 1, found 2"),
        ('{"fpsc-latents": 1}', "encoded: Field required"),
        (
            '{"fpsc-latents": 1, "encoded": {}, "shards": [{"file": "../a.safetensors", "bytes": 1,'
            ' "held_out": false, "tensors": {}, "checksums": []}]}',
            "shards.0.file: .* found '../a.safetensors'",
        ),
    ],
)
def test_a_bad_index(folder: Path, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match=message):
        read_all()


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected index.json, which `fpsc encode` writes"):
        open_source(str(tmp_path), held_out=False)


def test_an_index_without_shards(tmp_path: Path) -> None:
    write(tmp_path / "a", range(0))
    with pytest.raises(UserError, match="expected encoded clips, found none"):
        open_source(str(tmp_path / "a"), held_out=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"train": 3}, "data.train"),
        ({"trian": "demo"}, "data.trian"),
        ("nowhere", "found no folder nowhere"),
        ("hf://owner/name", "expected hf://datasets/owner/name"),
    ],
)
def test_a_bad_section(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(spec, held_out=False)


# ---- from the hub


class Hub:
    """`hf_hub_download` of a folder; counts what is fetched."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def __call__(self, repo: str, path: str, *, repo_type: str, revision: str | None = None) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert (repo, repo_type) == ("owner/clips", "dataset")
        self.revisions.append(revision)
        local = self.cache / "snapshots" / self.commit / path
        if not local.is_file():
            source = self.remote / path
            if not source.is_file():
                raise LocalEntryNotFoundError("offline")
            self.fetched.append(path)
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(source.read_bytes())
        return str(local)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    write(tmp_path / "remote" / "latents", range(30), tall=lambda n: False)
    made = Hub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made)
    return made


def test_shards_of_a_dataset_come_when_they_are_needed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpsc.train.data.shards.TOGETHER", 2)
    source = open_source("hf://datasets/owner/clips@main/latents", held_out=False)
    assert hub.fetched == ["latents/index.json"] and len(source) == 30
    found = order(source, 0)
    for step in range(6):
        found.batch(step, 0, 1, 1)
    shards = [path for path in hub.fetched if "/0" in path]
    assert len(shards) == 2
    seen = {found.batch(step, 0, 1, 1).keys[0] for step in range(30)}
    assert len(seen) == 30 and len([path for path in hub.fetched if "/0" in path]) == 10
    assert len(hub.fetched) == len(set(hub.fetched))
    assert seen == {
        f"hf://datasets/owner/clips@main/latents/{n:05}.safetensors#{row}"
        for n in range(10)
        for row in range(3)
    }
    assert hub.revisions[0] == "main" and set(hub.revisions[2:]) == {Hub.commit}


def test_a_shard_that_the_hub_has_not(hub: Hub) -> None:
    for path in (hub.remote / "latents").glob("0*"):
        path.unlink()
    source = open_source("hf://datasets/owner/clips/latents", held_out=False)
    with pytest.raises(UserError, match="the hub cannot be reached") as caught:
        source.sample(0)
    assert "leave_out" in str(caught.value)


def test_a_dataset_without_an_index(hub: Hub) -> None:
    with pytest.raises(UserError, match="hf://datasets/owner/clips: expected index.json"):
        open_source("hf://datasets/owner/clips", held_out=False)


def test_what_the_hub_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(AbsentError, match="No space left"):
        Dataset("a/b", None, "", "hf://datasets/a/b").fetch(INDEX)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("hf://datasets/a/b", (("a/b", None, ""), None)),
        ("hf://datasets/a/b@v1.0", (("a/b", "v1.0", ""), None)),
        ("hf://datasets/a/b/c/d", (("a/b", None, "c/d"), None)),
        ("hf://datasets/a/b@main/c/", (("a/b", "main", "c"), None)),
        ("hf://datasets/a/b/c/0.safetensors", (("a/b", None, "c"), "0.safetensors")),
    ],
)
def test_places_of_the_hub(location: str, expected: Any) -> None:
    place, file = place_of(location, Path())
    assert isinstance(place, Dataset)
    assert ((place.repo, place.revision, place.folder), file) == expected


def test_a_cached_dataset_that_is_corrupt(hub: Hub) -> None:
    source = open_source("hf://datasets/owner/clips/latents", held_out=False)
    flip(hub.remote / "latents" / "00009.safetensors")
    with pytest.raises(UserError, match="hub's cache to fetch it again"):
        for i in range(len(source)):
            source.sample(i)
