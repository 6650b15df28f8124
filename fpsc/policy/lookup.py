"""Where a policy is found: by name, by path, on the hub, or beside the weights of a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import document as doc
from .errors import PolicyError, Problem, listed, nearest
from .imports import preset, presets
from .load import BESIDE, Policy

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CACHED = re.compile(r"models--([\w-]+)--([\w.-]+)")


def find(name_or_path: str | os.PathLike[str] | Policy) -> Policy:
    """A policy by the name of a preset, by the path of a file, or as it is.

    A folder stands for the policy saved in it, and what is no file here but looks like a hub id
    (owner/name) for the policy saved in that repository: that one file is downloaded, and its
    table where it names one.

    Raises:
        PolicyError: there is no such preset and no such file, or the policy is not valid.
    """
    if isinstance(name_or_path, Policy):
        return name_or_path
    if isinstance(name_or_path, str) and "\n" in name_or_path:
        return Policy.load(name_or_path)
    built_in, name = presets(), str(name_or_path)
    if name in built_in:
        return Policy(preset(name))
    path = Path(name_or_path)
    if name and (path / BESIDE).is_file():
        path = path / BESIDE
    if path.is_file():
        return Policy.load(path)
    if HUB_ID.fullmatch(name) and not name.endswith((".yaml", ".yml")):
        return Policy(_from_hub(name))
    if name and path.is_dir():
        message = f"a folder without {BESIDE}"
    else:
        guess = nearest(name_or_path, built_in)
        message = f"no such policy, neither a file nor one of {listed(built_in)}{guess}"
    raise PolicyError(name or '""', [Problem(None, None, message)])


def beside(model: Any) -> Path | None:
    """The policy saved beside the weights that a model was loaded from, or None.

    Looked for in the model's own folder, then in that of its pipeline, as `from_pretrained` of
    diffusers recorded it in `config._name_or_path`; of a hub id only what is already here.
    """
    for folder in _folders(model):
        if (folder / BESIDE).is_file():
            return folder / BESIDE
    return None


def component_of(model: Any) -> str | None:
    """The name of a model in its pipeline, `transformer_2` for example, or None if not known."""
    origin = origin_of(model)
    if origin is None:
        return None
    path = Path(origin)
    if (path.parent / "model_index.json").is_file():
        return path.name
    parts = _components(path, model)
    return parts[0].name if len(parts) == 1 else None


def hub_id_of(model: Any) -> str | None:
    """The hub id (owner/name) that a model was loaded from, or None for a folder of one's own."""
    origin = origin_of(model)
    if origin is None:
        return None
    cached = CACHED.search(origin)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return origin if HUB_ID.fullmatch(origin) and not Path(origin).exists() else None


def origin_of(model: Any) -> str | None:
    """What the model was loaded from, as its configuration records it."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        origin = config.get("_name_or_path")
    else:
        origin = getattr(config, "_name_or_path", None)
    return str(origin) if isinstance(origin, str | os.PathLike) and str(origin) else None


def _folders(model: Any) -> list[Path]:
    """Folders in which a model's policy may lie, most specific first."""
    origin = origin_of(model)
    if origin is None:
        return []
    path = Path(origin)
    if not path.is_dir():
        return _cached(origin) if HUB_ID.fullmatch(origin) else []
    folders = [path]
    if (path.parent / "model_index.json").is_file():
        folders.append(path.parent)
    elif len(parts := _components(path, model)) == 1:
        folders.insert(0, parts[0])
    return folders


def _components(pipeline: Path, model: Any) -> list[Path]:
    """The folders of a pipeline that hold a model of this class."""
    if not (pipeline / "model_index.json").is_file():
        return []
    return [
        p.parent for p in sorted(pipeline.glob("*/config.json")) if _class_in(p) == _class(model)
    ]


def _class(model: Any) -> str:
    return type(model).__name__


def _class_in(config: Path) -> str | None:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("_class_name") if isinstance(found, dict) else None


def _cached(repo: str) -> list[Path]:
    """The folder of a repository in the local cache of the hub, if its policy is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, BESIDE)
    return [Path(found).parent] if isinstance(found, str) else []


def _from_hub(repo: str) -> doc.Document:
    """The policy of a repository, and of its files only this one, and its table if it has one."""
    document = doc.read(_download(repo, BESIDE))
    parts = [document.value, *(document.value.get("components") or {}).values()]
    for part in parts:
        table = part.get("table") if isinstance(part, Mapping) else None
        if isinstance(table, str) and table.endswith(".safetensors") and ".." not in table:
            _download(repo, table)
    return document


def _download(repo: str, name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hf_hub_download(repo, name)
    except LocalEntryNotFoundError:
        message = (
            "no such policy: neither built in nor a file here, and the hub cannot be reached "
            f"for {repo}/{name}"
        )
    except EntryNotFoundError:
        message = f"the repository on the hub has no {name}"
    except Exception as error:  # gated, absent, offline: the library has a class for each
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{name} cannot be fetched from the hub: {reason}"
    raise PolicyError(repo, [Problem(None, None, message)])
