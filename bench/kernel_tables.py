"""The tables of docs/kernels.md that quote bench/results/sass.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fpsc.bench.markdown import markdown
from fpsc.kernels.triton.configs import BACKWARD, BLOCK, FP8_BACKWARD, candidates

HOPPER = (9, 0)
HEAD_DIMS = (64, 128)
NAMES = {"query": "dq", "key": "dk and dv"}


def backward(place: Path) -> str:
    """Backward on Hopper, the first configuration of each kernel.

    Work is what all warps execute in the hot loop for a block of 128 queries and 128 keys.
    """
    kernels = json.loads(place.read_text(encoding="utf-8"))["kernels"]
    rows = []
    for dp in HEAD_DIMS:
        for kernel in (name for pair in zip(BACKWARD, FP8_BACKWARD, strict=True) for name in pair):
            config = candidates(kernel, HOPPER, dp)[0]
            row = kernels[f"{kernel}-bf16-{dp}-{config.name}"]["90"]
            parts = BLOCK // config.BM * (BLOCK // config.BN)
            work = row["hot_loop"]["instructions"] * parts * config.warps
            rows.append(
                [
                    str(dp),
                    NAMES[kernel.partition("_")[0]],
                    "FP8" if kernel in FP8_BACKWARD else "16 bits",
                    f"{config.BM} x {config.BN}",
                    f"{work:,}",
                    " ".join(f"{n} {name}" for name, n in row["tensor"].items()),
                    str(row["registers"]),
                    str(row.get("spill_stores", 0)),
                    f"{row['shared'] / 1024:.0f} KB",
                ]
            )
    head = [
        "head dim", "gradient", "products", "queries x keys", "warp instructions", "tensor cores",
        "registers", "spills", "shared",
    ]  # fmt: skip
    return markdown(head, rows)


PARTS: dict[str, Callable[[Path], str]] = {"backward": backward}
