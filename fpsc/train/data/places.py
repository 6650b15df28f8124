"""Where shards lie: a folder, or a dataset repository of the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from fpsc.errors import UserError
from fpsc.train.data.index import INDEX, SUFFIX

HUB = "hf://"
_HUB_PLACE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[\w.-]+)*)/?")
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")


class AbsentError(Exception):
    """A file that is not at its place; the message says why."""


class Place(Protocol):
    """Some files with an index among them."""

    @property
    def name(self) -> str:
        """In errors, and in front of the keys of samples."""

    @property
    def remote(self) -> bool:
        """Whether reading a file for the first time is slow."""

    def fetch(self, file: str) -> Path:
        """The file, on this machine.

        Raises:
            AbsentError: it is not there.
        """


@dataclass(frozen=True)
class Folder:
    """A folder of this machine."""

    path: Path
    name: str
    remote: bool = False

    def fetch(self, file: str) -> Path:
        found = self.path / file
        if not found.is_file():
            raise AbsentError("it is not there")
        return found


@dataclass(frozen=True)
class Dataset:
    """A folder of a dataset repository. Files come when they are needed, and stay in the hub's
    cache (`HF_HOME`)."""

    repo: str
    revision: str | None
    folder: str
    name: str
    remote: bool = True

    def fetch(self, file: str) -> Path:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        path = str(PurePosixPath(self.folder) / file)
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    self.repo, path, repo_type="dataset", revision=self.revision
                )
            )
        except LocalEntryNotFoundError as error:
            raise AbsentError(
                "the hub cannot be reached, and it is not in the local cache"
            ) from error
        except EntryNotFoundError as error:
            raise AbsentError(f"{self.repo} on the hub has no {path}") from error
        except OSError as error:  # no space, or an answer of the server: gated, no such repository
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AbsentError(f"it cannot be fetched: {reason}") from error

    def pinned(self) -> Dataset:
        """The same at one commit, so that a push in the middle of a run changes nothing."""
        commit = _COMMIT.search(self.fetch(INDEX).as_posix())
        return replace(self, revision=commit[1]) if commit else self


def place_of(location: str, base: Path) -> tuple[Place, str | None]:
    """The place that a location names, and the one file of it where it names a file.

    Raises:
        UserError: the location is not spelled as one, or there is no such folder.
    """
    folder, file = location, None
    if location.endswith(SUFFIX):
        folder, _, file = location.rpartition("/")
    if location.startswith(HUB):
        found = _HUB_PLACE.fullmatch(folder)
        if found is None:
            raise UserError(
                f"{location}: expected hf://datasets/owner/name, with @revision and /folder where "
                "they are needed"
            )
        repo, revision, within = found.groups()
        return Dataset(repo, revision, within.strip("/"), folder.rstrip("/")), file
    path = base / Path(folder or ".").expanduser()
    if not path.is_dir():
        raise UserError(
            f"{location}: expected demo, a folder that `fpsc encode` wrote or a shard in it, found "
            f"no folder {path}"
        )
    return Folder(path, folder.rstrip("/") or "."), file
