"""What a run writes down as it goes: `log.jsonl`, and the same for tensorboard.

One JSON object a line: `{"step": 12, "loss": ...}` of a training step, `{"step": 200,
"validation": {...}}` of a validation. A run that goes on from a checkpoint first drops what came
after it, so that the file is the same as if nothing had stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fpsc.errors import UserError
from fpsc.files import replacing

FILE = "log.jsonl"


class Log:
    """The log of a run in a folder; closed by `close`.

    Args:
        step: steps that are done: later lines are dropped.
        tensorboard: whether to write for tensorboard too.

    Raises:
        UserError: tensorboard is wanted and not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in read(self.path) if line["step"] <= step and step > 0]
        with replacing(self.path) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard", step) if tensorboard else None

    def add(self, line: dict[str, Any]) -> None:
        """Write a line, and its numbers for tensorboard."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _numbers("", line):
                self._board.add_scalar(name, value, line["step"])

    def validations(self) -> list[dict[str, Any]]:
        """What validations found so far, the first before any training."""
        return [line["validation"] for line in self.lines if "validation" in line]

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a last one that a kill cut off is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _board(folder: Path, step: int) -> Any:
    try:
        import tensorboard  # noqa: F401  which torch's writer needs
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            'tensorboard is not installed: pip install "fpsc[train]", or set tensorboard: false'
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _numbers(prefix: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [
            number
            for key, inner in value.items()
            if key not in ("step", "noise")
            for number in _numbers(f"{prefix}/{key}" if prefix else key, inner)
        ]
    if isinstance(value, bool | int | float):
        return [(prefix, float(value))]
    return []
