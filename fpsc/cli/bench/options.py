"""What `fpsc bench` and `fpsc bench run` share: the machine, and reading of options."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpsc.errors import UserError

if TYPE_CHECKING:
    from fpsc.bench.subject import Machine


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def machine(
    *,
    device: str | None,
    dtype: Dtype | None,
    threads: int | None,
    traces: Path | None = None,
    **others: Any,
) -> "Machine":
    """The machine that the options name: a GPU in bfloat16 where there is one, else the CPU in
    float32.

    Raises:
        UserError: there is no such device, or no GPU.
    """
    import torch

    from fpsc.bench.subject import Machine

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError(
                f"--device {name}: torch {torch.__version__} sees no GPU; without --device the "
                "same cases run on the CPU, reduced"
            )
        if (found.index or 0) >= count:
            raise UserError(f"--device {name}: there are {count} GPUs, numbered from 0")
        torch.cuda.set_device(found)
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = dtype or (Dtype.bfloat16 if found.type == "cuda" else Dtype.float32)
    return Machine(
        found,
        getattr(torch, chosen.value),
        traces=None if traces is None else str(traces),
        **others,
    )


def grid_of(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--grid {text}: expected three positive integers T,Y,X, as 21,30,52")
    t, y, x = map(int, parts)
    return t, y, x


def keeps_of(values: list[float]) -> tuple[float, ...]:
    for value in values:
        if not 0 < value <= 1:
            raise UserError(f"--keep {value:g}: expected a fraction above 0 and at most 1")
    return tuple(sorted(set(values)))
