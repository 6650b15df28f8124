"""The cost of this device (`fpsc.cost`), fitted to times of the op.

One layer's op is timed dense and at some values of keep, in each dtype, with all of its heads and
with a part of them. Two values of keep are held out: they are what the fit has to predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import metadata

import numpy as np
import torch

from fpsc import __version__
from fpsc.bench.environment import described
from fpsc.bench.measure import Effort, Work, clock_for, take_turns
from fpsc.bench.op import Shape, SparseOp, random_qkv
from fpsc.bench.policies import constant
from fpsc.bench.progress import Tell, quiet
from fpsc.cost import DeviceCost, Dtype, Heads, Load, Measurement, fit, load_of
from fpsc.kernels import threads

KEEPS = (1.0, 0.5, 0.25, 0.125)
"""At which the op is timed."""

HELD_OUT = (0.375, 0.1875)
"""At which it is timed too, and predicted."""

PART = 4
"""One of so many heads, for what does not grow with them."""

EFFORT = Effort(rounds=5, seconds=15.0)

COPY = "copy"
COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


def device_cost(
    shape: Shape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool,
    tile: Sequence[int] | None = None,
    effort: Effort = EFFORT,
    tell: Tell = quiet,
) -> DeviceCost:
    """The cost of this device, whether its fit is good or not (`DeviceCost.refusal`).

    Args:
        shape: of one layer's attention; the kernels' work grows with it as they do in a model.
        fp8: whether fp8 cells run as such on this device; else only the input's dtype is timed.
        tile: of the tokens' grid; planned where None.
        effort: for all contenders together.
    """
    tell("timing the attention")
    kinds: tuple[Dtype, ...] = ("bf16", "fp8") if fp8 else ("bf16",)
    q, k, v = random_qkv(shape, dtype, device, seed=0)
    points: dict[str, tuple[Load, bool]] = {}
    works: dict[str, Work] = {}
    for kind in kinds:
        for keep in (*KEEPS, *HELD_OUT):
            op = SparseOp(shape, constant(keep, kind, tile), device, fp8=fp8)
            lengths = op.lists[0].diff().numpy()
            # What is held out is predicted for all heads, as it is used.
            parts = {shape.heads} if keep in HELD_OUT else {shape.heads, -(-shape.heads // PART)}
            for heads in sorted(parts):
                name = f"{kind}, keep {keep:g}, {heads} heads"
                load = [Heads(kind, lengths, shape.batch * heads)]
                points[name] = (
                    load_of(load, shape.tokens, shape.head_dim, q.element_size()),
                    keep in HELD_OUT,
                )
                works[name] = partial(op, q[:, :heads], k[:, :heads], v[:, :heads])
    works[COPY], moved = copy_of(device)

    def on_round(done: int, total: int) -> None:
        tell("timing the attention", done, total)

    with torch.no_grad():
        times = take_turns(works, clock_for(device, ahead=True), effort, on_round)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    return fit(
        [
            Measurement(name, load, seconds[name], held_out)
            for name, (load, held_out) in points.items()
        ],
        device=described(device).name,
        workers=workers(device),
        bandwidth=moved / seconds[COPY],
        versions={"fpsc": __version__, "torch": torch.__version__, **_triton()},
    )


def copy_of(device: torch.device) -> tuple[Work, int]:
    """A copy of more than a cache holds, and the bytes that it reads and writes."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source), 2 * source.numel()


def workers(device: torch.device) -> int:
    """What takes up items: multiprocessors, or the threads of the CPU kernel."""
    if device.type != "cuda":
        return threads.workers()
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _triton() -> dict[str, str]:
    try:
        return {"triton": metadata.version("triton")}
    except metadata.PackageNotFoundError:
        return {}
