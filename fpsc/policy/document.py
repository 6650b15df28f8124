"""YAML in and out: a bounded, safe reader that knows where every value stands, and keeps comments.

Only plain YAML 1.2 is read: mappings, lists and scalars. Anchors, aliases, merge keys, tags and
several documents in one file are refused, so that a small file cannot grow into a large one.
"""

from __future__ import annotations

import copy
import difflib
import io
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.reader import ReaderError

from .errors import PolicyError, Problem, shown

MAX_BYTES = 256 * 1024
"""Largest policy that is read; people's files are a few KiB."""

MAX_DEPTH = 16
"""Deepest nesting that is read; the format needs 5."""

FIRST = "fpsc: 1"
"""How a policy starts."""

Path_ = tuple[str | int, ...]
"""Keys and list indices from the top of the document to a value."""


@dataclass(frozen=True)
class Document:
    """A parsed document.

    Attributes:
        file: what it was read from, for messages.
        text: as it stands there.
        tree: with comments and positions.
        value: plain; with `base`, both merged.
        folder: where the file is, and with it all that the policy may refer to; None without one.
        base: the document that this one imports.
        moved: top-level keys whose values stand elsewhere in the file, and where.
    """

    file: str
    text: str
    tree: CommentedMap
    value: dict[str, Any]
    folder: Path | None = None
    base: Document | None = None
    moved: Mapping[str, Path_] = field(default_factory=dict)

    def problem(self, path: Path_, message: str, at: Path_ | None = None) -> Problem:
        """A problem with the value at `path`; it points there, or at the key of the path `at`."""
        place, pointed = self.place(path), self.place(at or path)
        owner = self.owner(pointed)
        line, column = position(owner.tree, pointed, at_key=at is not None)
        where = dotted(place)
        file = None if owner is self else owner.file
        return Problem(line, column, f"{where}: {message}" if where else message, file)

    def where(self, path: Path_) -> str:
        """A place as people find it: "wan.yaml:12 except[0]"."""
        place = self.place(path)
        owner = self.owner(place)
        line, _ = position(owner.tree, place)
        return f"{owner.file}:{line} {dotted(place)}" if line else dotted(place)

    def place(self, path: Path_) -> Path_:
        """Where a path of the value stands in the file."""
        return (*self.moved[str(path[0])], *path[1:]) if path and path[0] in self.moved else path

    def owner(self, path: Path_) -> Document:
        """The document, this one or one that it imports, in which a place stands."""
        if self.base is None:
            return self
        owner = self.base.owner(path)
        return self if _depth(self.tree, path) >= _depth(owner.tree, path) else owner

    def component(self, name: str) -> Document:
        """The document as it holds for one of its components."""
        given = self.value["components"][name]
        value = {**self.value, **given}
        del value["components"]
        return replace(self, value=value, moved={key: ("components", name, key) for key in given})


def _depth(tree: Any, path: Path_) -> int:
    """How many steps of a path a tree has."""
    for depth, step in enumerate(path):
        try:
            tree = tree[step]
        except (LookupError, TypeError):
            return depth
    return len(path)


def read(source: str | os.PathLike[str], first: str = FIRST) -> Document:
    """Reads a document: the text itself where it holds a line break, else a file's path.

    Args:
        first: the line that such a document starts with, for messages.

    Raises:
        PolicyError: the file cannot be read, is too large, or is not plain YAML with a mapping at
            the top; the message says where and what to do.
    """
    if isinstance(source, str) and "\n" in source:
        return parse(source.encode(), "<policy>", first=first)
    path = Path(source)
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise _error(str(path), f"cannot be read: {reason}") from None
    return parse(data, str(path), path.parent, first)


def parse(data: bytes, file: str, folder: Path | None = None, first: str = FIRST) -> Document:
    """Reads a document from the bytes of a file that is called `file` in messages."""
    if len(data) > MAX_BYTES:
        raise _error(file, f"larger than {MAX_BYTES // 1024} KiB; a policy is a few KiB of rules")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        start = data.rfind(b"\n", 0, e.start) + 1
        line = data.count(b"\n", 0, e.start) + 1
        message = f"not UTF-8: byte 0x{data[e.start]:02x}; save the file as UTF-8"
        raise _error(file, message, line, e.start - start + 1) from None
    for number, row in enumerate(text.splitlines(), 1):
        if re.match(r" *\t\s*\S", row):
            column = row.index("\t") + 1
            raise _error(file, "tab in the indentation; use spaces", number, column)
    try:
        _refuse_more_than_plain_yaml(text, file)
        tree = _yaml().load(text)
    except DuplicateKeyError as e:
        key = re.search(r'duplicate key "(.*?)"', e.problem or "")
        name = f' "{key[1]}"' if key else ""
        raise _marked(file, e, f"duplicate key{name}; each key stands once in a mapping") from None
    except MarkedYAMLError as e:
        context = f" {e.context}" if e.context else ""
        raise _marked(file, e, f"not YAML: {e.problem}{context}") from None
    except ReaderError as e:
        line, column = (
            text.count("\n", 0, e.position) + 1,
            e.position - text.rfind("\n", 0, e.position),
        )
        message = f"control character U+{e.character:04X}; remove it"
        raise _error(file, message, line, column) from None
    except PolicyError:
        raise
    except (YAMLError, ValueError) as e:  # impossible dates, endless numbers
        raise _error(file, f"not YAML: {str(e).splitlines()[0]}") from None
    if not isinstance(tree, CommentedMap):
        found = shown(_plain(tree, file))
        message = f'expected a mapping that starts with "{first}", found {found}'
        raise _error(file, message, 1, 1)
    return Document(file, text, tree, _plain(tree, file), folder)


def from_value(value: Mapping[str, Any], file: str = "<policy>") -> Document:
    """A document from plain Python values; its tree has no positions but can be written."""
    tree = _tree(value)
    return Document(file, dumps(tree), tree, _plain(tree, file))


def edited(document: Document, changes: Mapping[str, Any]) -> Document:
    """A copy with values replaced; keys are dotted ("schedule.0.noise").

    Comments stay, and lines that hold no change stay as they are, byte for byte. What is changed
    in an imported policy is written into the document that imports it.

    Raises:
        KeyError: a change names a place whose parent is not in the document.
    """
    tree = copy.deepcopy(document.tree)
    for path, value in changes.items():
        try:
            _set(tree, document, path.split("."), value)
        except (LookupError, TypeError, ValueError):
            raise KeyError(f"{path}: no such place in {document.file}") from None
    text = _unchanged_lines_kept(document.text, dumps(document.tree), dumps(tree))
    if not _says(text, _plain(tree, document.file)):
        text = dumps(tree)  # its layout is like nobody's; what it says is what counts
    # Read back, so that positions are those of the text that will be written.
    return parse(text.encode(), document.file, document.folder)


def _set(tree: Any, document: Document, path: Sequence[str], value: Any) -> None:
    """Replaces one value in a tree; mappings and lists that only the base has are copied first."""
    base: Any = document.value
    place = document.place(tuple(int(step) if step.isdecimal() else step for step in path))
    for step in place[:-1]:
        base = base[step]
        if isinstance(tree, CommentedMap) and step not in tree:
            tree[step] = CommentedMap() if isinstance(base, Mapping) else _tree(base)
        tree = tree[step]
    tree[place[-1]] = _tree(value)


def _unchanged_lines_kept(text: str, before: str, after: str) -> str:
    """`after`, with the lines that it shares with `before` as they stand in `text`.

    `before` and `after` are what the YAML library makes of a tree without and with a change, and
    `before` says the same as `text`, where lines may be laid out by hand.
    """
    old, ref, new = (t.splitlines(keepends=True) for t in (text, before, after))
    place: dict[int, str] = {}
    for _, a, a_end, b, b_end in _opcodes(list(map(_words, ref)), list(map(_words, old)), "equal"):
        place.update(zip(range(a, a_end), old[b:b_end], strict=True))
    lines = list(new)
    for kind, a, a_end, b, b_end in _opcodes(ref, new, "equal", "replace"):
        if a_end - a != b_end - b:
            continue
        for i, j in zip(range(a, a_end), range(b, b_end), strict=True):
            kept = place.get(i)
            if kept is not None and kind == "equal":
                lines[j] = kept
            elif kept is not None:  # the value is new, its indentation is the author's
                lines[j] = kept[: len(kept) - len(kept.lstrip(" "))] + new[j].lstrip(" ")
    newline = "\r\n" if "\r\n" in text else "\n"
    return "".join(line.rstrip("\r\n") + newline if line[-1:] == "\n" else line for line in lines)


def _opcodes(
    a: Sequence[str], b: Sequence[str], *kinds: str
) -> list[tuple[str, int, int, int, int]]:
    """The stretches of two texts that are equal, or replace each other."""
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return [opcode for opcode in matcher.get_opcodes() if opcode[0] in kinds]


def _says(text: str, value: dict[str, Any]) -> bool:
    try:
        return parse(text.encode(), "").value == value
    except PolicyError:
        return False


def _words(line: str) -> str:
    """A line without the spaces by which people align it."""
    return " ".join(re.sub(r"([\[\]{},:])", r" \1 ", line).split())


def write(document: Document, path: str | os.PathLike[str]) -> None:
    """Writes a document's text in one step: readers see the old file or the new one."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as f:
            f.write(document.text)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def dumps(tree: CommentedMap) -> str:
    """The text of a tree, comments included."""
    out = io.StringIO()
    _yaml().dump(tree, out)
    return out.getvalue()


def position(tree: Any, path: Path_, at_key: bool = False) -> tuple[int | None, int | None]:
    """Line and column, from 1, of the value at `path`, or as near above it as there is one."""
    line, column = _start(tree)
    for i, step in enumerate(path):
        last = i == len(path) - 1
        try:
            if isinstance(tree, CommentedMap):
                place = tree.lc.key(step) if at_key and last else tree.lc.value(step)
            else:
                place = tree.lc.item(step)
            line, column = place[0] + 1, place[1] + 1
            tree = tree[step]
        except (AttributeError, LookupError, TypeError):
            break
    return line, column


def dotted(path: Path_) -> str:
    """("schedule", 0, "noise") -> "schedule[0].noise"."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 4096  # a rule stays on its line
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _refuse_more_than_plain_yaml(text: str, file: str) -> None:
    """Looks at the events only, before anything is built from them."""
    depth = documents = 0
    for event in _yaml().parse(text):
        problem = None
        match event:
            case AliasEvent():
                problem = "aliases are not used here; write the value out"
            case NodeEvent(anchor=str()):
                problem = "anchors are not used here; write the value out"
            case DocumentStartEvent():
                documents += 1
                if documents > 1:
                    problem = 'a second document; a policy is one, so remove the "---"'
                elif event.version or event.tags:
                    problem = "directives are not used here; remove the line with %"
            case ScalarEvent(value="<<", style=None):
                problem = "merge keys are not used here; write the keys out"
            case ScalarEvent() | CollectionStartEvent():
                depth += isinstance(event, CollectionStartEvent)
                if event.ctag is not None and str(event.ctag) not in ("None", ""):
                    problem = f"tag {event.ctag} is not used here; remove it"
                elif depth > MAX_DEPTH:
                    problem = f"nested deeper than {MAX_DEPTH} levels"
            case CollectionEndEvent():
                depth -= 1
        if problem:
            mark = event.start_mark
            raise _error(file, problem, mark.line + 1, mark.column + 1)


def _plain(node: Any, file: str) -> Any:
    """Plain Python values: no comments, no classes of the YAML library."""
    match node:
        case Mapping():
            for key in node:
                if not isinstance(key, str):
                    line, column = position(node, (key,), at_key=True)
                    message = f"keys are text; found {shown(key)}, put it in quotes"
                    raise _error(file, message, line, column)
            return {str(k): _plain(v, file) for k, v in node.items()}
        case str():
            return str(node)
        case Sequence():
            return [_plain(v, file) for v in node]
        case None | bool():
            return node
        case int():
            return int(node)
        case float():
            return float(node)
        case _:  # a date, only in `measured`
            return str(node)


def _tree(value: Any) -> Any:
    """Plain values as a tree that prints like a hand-written policy: one rule on one line."""
    match value:
        case Mapping():
            tree = CommentedMap({str(k): _tree(v) for k, v in value.items()})
            if not any(isinstance(v, Mapping) or _has_rows(v) for v in value.values()):
                tree.fa.set_flow_style()
            return tree
        case str():
            return str(value)
        case Sequence():
            seq = CommentedSeq(_tree(v) for v in value)
            if not _has_rows(value):
                seq.fa.set_flow_style()
            return seq
        case _:
            return value


def _has_rows(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and any(isinstance(v, Mapping) for v in value)


def _start(node: Any) -> tuple[int | None, int | None]:
    lc = getattr(node, "lc", None)
    if lc is None or lc.line is None or not getattr(lc, "data", None):
        return None, None
    return lc.line + 1, lc.col + 1


def _error(
    file: str, message: str, line: int | None = None, column: int | None = None
) -> PolicyError:
    return PolicyError(file, [Problem(line, column, message)])


def _marked(file: str, error: MarkedYAMLError, message: str) -> PolicyError:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return _error(file, message)
    return _error(file, message, mark.line + 1, mark.column + 1)
