"""The parts of a calibration that is under way: one file each, so that nothing is measured twice.

Several processes, and a run that was interrupted and goes on, leave the same files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fpsc.errors import UserError
from fpsc.files import replacing

SETTINGS, FINISHED = "settings.json", "finished.json"


class Parts:
    """A folder of parts, for one set of settings.

    Args:
        settings: what the parts are of; plain values.
        fresh: forget what is there.

    Raises:
        UserError: the folder has parts of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, fresh: bool = False) -> None:
        self.folder = folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        settings = json.loads(json.dumps(settings))
        known = self.facts(SETTINGS)
        if known is not None and known != settings:
            names = sorted(n for n in {*known, *settings} if known.get(n) != settings.get(n))
            raise UserError(
                f"{folder} holds a calibration with other settings ({', '.join(names)}): go on "
                "with those, choose another folder with --out, or start again with --fresh"
            )
        self.note(SETTINGS, settings)

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def facts(self, name: str) -> Any:
        """A JSON file; None where it is not there."""
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); start again with --fresh") from error

    def note(self, name: str, facts: Any) -> None:
        with replacing(self.folder / name) as beside:
            beside.write_text(json.dumps(facts, sort_keys=True) + "\n", encoding="utf-8")

    def keep(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        with replacing(self.folder / name) as beside:
            save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, beside)

    def read(self, name: str) -> dict[str, np.ndarray]:
        path = self.folder / name
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); start again with --fresh") from error

    @property
    def finished(self) -> bool:
        """Whether the calibration that they are of was written."""
        return self.has(FINISHED)

    def finish(self) -> None:
        """Note that it was, and remove what was measured."""
        self.note(FINISHED, True)
        for path in self.folder.glob("*.safetensors"):
            path.unlink()
