"""What Dynamo hands to a backend, for a model whose tensors are all on the meta device."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Capture:
    """The graphs of one forward.

    `problem` says why the forward did not reach its end; the graphs up to there are complete.
    `breaks` are the reasons of Dynamo's graph breaks, with how often each occurred.
    """

    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    breaks: Counter[str] = field(default_factory=Counter)
    problem: str | None = None


def capture(model: torch.nn.Module, inputs: dict[str, Any]) -> Capture:
    """Run `model(**inputs)` under torch.compile and keep each graph that the backend is given.

    The graphs run as they were captured, on meta tensors: no data, no memory, no kernels. Where a
    model reads a value back (`.item()`, `nonzero`), a meta tensor has none: the forward stops.
    """
    found = Capture()

    def keep(gm: torch.fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        found.graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        with torch.no_grad(), _quiet():
            torch.compile(model, backend=keep)(**inputs)
    except Exception as error:  # whatever the model or the tracer raised is the answer
        found.problem = _first_line(error)
    found.breaks.update(_breaks(counters["graph_break"]))
    return found


def _breaks(counted: dict[Any, int]) -> dict[str, int]:
    return {str(reason).strip().splitlines()[0]: times for reason, times in counted.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of an error that the caller reports."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line: what is around it is the compiler's own trace."""
    while error.__cause__ is not None:
        error = error.__cause__
    # Dynamo wraps an operator's error: "got RuntimeError('The size of tensor ...')".
    if inner := re.search(r"\bgot (\w+)\((['\"])(.+?)\2\)", str(error), re.DOTALL):
        return f"{inner[1]}: {inner[3]}".splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
