"""The forward that a checkpointed block belongs to, when backward computes the block again.

A block that is compiled by itself takes its noise rows and its grid from the forward that runs.
When a checkpoint computes it again, another forward may have run since. But its inputs are those of
its own forward, kept until then: their storages say which one it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


def in_backward() -> bool:
    """Whether backward is running: what is called then is a part of a forward, computed again."""
    return torch._C._current_graph_task_id() != -1


class Pins(Generic[T]):
    """What belongs to the inputs of past calls, for as long as these inputs live."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, ...], tuple[list[StorageWeakRef], T]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def pin(self, inputs: Sequence[Tensor], what: T) -> None:
        """Remember what belongs to a call with these inputs."""
        held = [StorageWeakRef(t.untyped_storage()) for t in inputs]
        self._held[tuple(ref.cdata for ref in held)] = held, what

    def find(self, inputs: Sequence[Tensor]) -> T | None:
        """What was pinned for a call with these inputs, or None."""
        key = tuple(t.untyped_storage()._cdata for t in inputs)
        held, what = self._held.get(key, ([], None))
        return None if any(ref.expired() for ref in held) else what

    def sweep(self) -> None:
        """Forget the calls whose inputs are gone."""
        gone = [k for k, (held, _) in self._held.items() if any(ref.expired() for ref in held)]
        for key in gone:
            del self._held[key]
