"""The tables of docs/kernels.md that quote bench/results/sass.json, and what stands beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bench.sass import NEWER
from fpsc.bench.markdown import markdown
from fpsc.kernels.triton.configs import (
    BACKWARD,
    BLOCK,
    FP8_BACKWARD,
    HOPPER_FORWARD,
    HOPPER_GLUON,
    HOPPER_REORDERED,
    candidates,
)

HOPPER = (9, 0)
HEAD_DIMS = (64, 128)
NAMES = {"query": "dq", "key": "dk and dv"}


def forward(place: Path) -> str:
    """FP8 cells on Hopper, specialised: what a warp executes in the hot loop for 128 keys."""
    tables = [json.loads((place.parent / name).read_text()) for name in (place.name, NEWER.name)]
    rows = []
    for dp in HEAD_DIMS:
        own = [config for config in HOPPER_FORWARD if config.specialise]
        for config in (*own, *HOPPER_REORDERED[dp], *HOPPER_GLUON[dp]):
            table = tables[config.reorder]
            row = table["kernels"][f"fp8-bf16-{dp}-{config.name}"]["90"]
            traits = ["persistent"] * config.persistent + ["K reordered"] * config.reorder
            rows.append(
                [
                    str(dp),
                    "Gluon" if config.gluon else ", ".join(["Triton", *traits]),
                    str(config.BN),
                    f"{row['hot_loop']['per_128_keys']:g}",
                    str(row.get("spill_stores", 0)),
                    f"{row['shared'] / 1024:.0f} KB",
                    table["triton"],
                ]
            )
    head = [
        "head dim", "kernel", "keys at a time", "instructions per 128 keys", "spills", "shared",
        "compiled by Triton",
    ]  # fmt: skip
    return markdown(head, rows)


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


PARTS: dict[str, Callable[[Path], str]] = {"forward": forward, "backward": backward}
