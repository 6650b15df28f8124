"""Files that a policy refers to: they lie in its folder, and nowhere else."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from .document import Document


def inside(document: Document, name: str) -> Path:
    """The file that a document refers to by a path relative to its own.

    Links inside the folder are followed as long as they end there, or beside the file that the
    document itself is a link to (as in the cache of the hub).

    Raises:
        ValueError: the document has no folder, or the path leads out of it; the message says so.
    """
    if document.folder is None:
        raise ValueError("a file can only be named in a policy that is one; save it first")
    path = PurePosixPath(name)
    if "\x00" in name or "\\" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f'"{name[:200]}" leads out of the folder of the policy; put the file there, and name '
            "it relative to the policy"
        )
    target = document.folder / path
    allowed = (document.folder.resolve(), Path(document.file).resolve().parent)
    if not any(target.resolve().is_relative_to(folder) for folder in allowed):
        raise ValueError(f'"{name}" is a link out of the folder of the policy; put the file there')
    return target
