"""The lines by which users compile, and what Dynamo made of them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch._dynamo.utils import counters

Model = TypeVar("Model", bound=nn.Module)

NO_RECOMPILE = torch._dynamo.config.patch(error_on_recompile=True)


def compile_whole(model: Model, *, dynamic: bool | None = None, **options: object) -> Model:
    compiled: Model = torch.compile(
        model, backend="fpsattn", fullgraph=True, dynamic=dynamic, options=options
    )
    return compiled


def compile_blocks(model: Model, *, dynamic: bool | None = None, **options: object) -> Model:
    model.compile_repeated_blocks(
        backend="fpsattn", fullgraph=True, dynamic=dynamic, options=options
    )
    return model


def graphs() -> int:
    """Graphs that were compiled since `counters` was cleared."""
    return int(counters["stats"]["unique_graphs"])
