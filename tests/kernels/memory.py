"""What a kernel reads and writes, looked at in Triton's interpreter, address by address."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter

from fpsc.kernels.triton import attention, gradients, prologue
from fpsc.kernels.triton.launch import launch


class OutOfBounds(AssertionError):
    """A kernel touched memory that is in none of its arguments."""


class Launches:
    """Every launch while it watches: its kernel's name and options, and that it stays in bounds.

    An access may touch no byte but those between the first and the last element of an argument.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.spans: list[tuple[int, int]] = []
        builder = interpreter.interpreter_builder
        load, store, atomic = (
            getattr(builder, f"create_{name}")
            for name in ("masked_load", "masked_store", "atomic_rmw")
        )

        def checked_load(ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self.check("reads", ptrs, mask)
            return load(ptrs, mask, *rest, **named)

        def checked_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.check("writes", ptrs, mask)
            return store(ptrs, value, mask, *rest)

        def checked_atomic(op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.check("writes", ptr, mask)
            return atomic(op, ptr, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", checked_load)
        monkeypatch.setattr(builder, "create_masked_store", checked_store)
        monkeypatch.setattr(builder, "create_atomic_rmw", checked_atomic)
        for module in (attention, gradients, prologue):
            monkeypatch.setattr(module, "launch", self.launch)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.seen.append((kernel.fn.__name__, options))
        self.spans = [span(x) for x in args if isinstance(x, Tensor) and x.numel()]
        launch(kernel, grid, *args, **options)

    def check(self, does: str, ptrs: Any, mask: Any) -> None:
        taken = np.asarray(mask.data).astype(bool)  # a mask may come as numbers
        first = np.broadcast_to(ptrs.data, taken.shape)[taken]
        if first.size == 0:
            return
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        low, high = int(first.min()), int(first.max()) + size
        if not any(start <= low and high <= end for start, end in self.spans):
            near = min(self.spans, key=lambda s: min(abs(low - s[0]), abs(high - s[1])))
            raise OutOfBounds(
                f"{self.seen[-1][0]} {does} bytes {low - near[0]}..{high - near[0]} of an argument "
                f"of {near[1] - near[0]}"
            )


def span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first element, and behind the last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class Last(int):
    """A dimension of a grid of which only the last place runs."""


def run_last_places_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of launches whose grid is of `Last`, one program runs: that with the largest numbers."""

    def places(*ends: Any) -> range:
        return range(ends[0] - 1, ends[0]) if isinstance(ends[0], Last) else range(*ends)

    monkeypatch.setattr(interpreter, "range", places, raising=False)
