"""`$import`: a policy that starts from another one, a built-in one or a file in its folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from . import document as doc
from .errors import PolicyError, listed, nearest, shown
from .files import inside
from .schema import PolicySpec

IMPORT = "$import"

OWN = ("fpsc", "name", "measured", IMPORT)
"""What a policy does not take from the one that it imports."""

MAX_CHAIN = 8
"""Most policies in a chain of imports."""


def presets() -> dict[str, Traversable]:
    """The built-in policies by name."""
    folder = resources.files(__package__) / "presets"
    files = sorted(folder.iterdir(), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f for f in files if f.name.endswith(".yaml")}


def preset(name: str) -> doc.Document:
    """The document of a built-in policy."""
    file = presets()[name]
    return doc.parse(file.read_bytes(), file.name)


def follow(document: doc.Document, chain: Sequence[str] = ()) -> doc.Document:
    """A document with what it imports, merged: its own values win.

    Mappings are merged key by key, so that one number of one mode can be changed; everything else,
    lists too, is replaced as a whole.

    Raises:
        PolicyError: the base is not there, is outside the folder, is not a policy, or imports
            this document.
    """
    if IMPORT not in document.value:
        return document
    name = document.value[IMPORT]
    if not isinstance(name, str):
        description = PolicySpec.model_fields["import_"].description
        raise _error(document, f"expected {description}, found {shown(name)}")
    chain = [*chain, _identity(document)]
    base = _base(document, name)
    if _identity(base) in chain:
        raise _error(document, f'"{name}" imports this policy in turn; remove one of the imports')
    if len(chain) >= MAX_CHAIN:
        raise _error(document, f"a chain of more than {MAX_CHAIN} imports; shorten it")
    base = follow(base, chain)
    inherited = {key: value for key, value in base.value.items() if key not in OWN}
    return replace(document, base=base, value=_merged(inherited, document.value))


def standalone(document: doc.Document) -> doc.Document:
    """A document that says the same without importing anything; the comments of both stay."""
    if document.base is None:
        return document
    tree = copy.deepcopy(document.tree)
    del tree[IMPORT]
    _fill(tree, standalone(document.base).tree, top=True)
    return doc.parse(doc.dumps(tree).encode(), document.file, document.folder)


def _fill(tree: Any, base: Any, top: bool = False) -> None:
    for key, value in base.items():
        if top and key in OWN:
            continue
        if key not in tree:
            tree[key] = copy.deepcopy(value)
        elif isinstance(value, Mapping) and isinstance(tree[key], Mapping):
            _fill(tree[key], value)


def _base(document: doc.Document, name: str) -> doc.Document:
    built_in = presets()
    if name in built_in:
        return preset(name)
    if not name.endswith((".yaml", ".yml")):
        guess = nearest(name, built_in)
        raise _error(
            document,
            f'no built-in policy "{name[:200]}"{guess} (built in: {listed(built_in)}); the name of '
            "a file ends in .yaml",
        )
    try:
        path = inside(document, name)
    except ValueError as error:
        raise _error(document, str(error)) from None
    if not path.is_file():
        raise _error(document, f'no file "{name}" in the folder of the policy')
    return doc.read(path)


def _identity(document: doc.Document) -> str:
    return str(Path(document.file).resolve()) if document.folder else document.file


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _error(document: doc.Document, message: str) -> PolicyError:
    return PolicyError(document.file, [document.problem((IMPORT,), message)])
