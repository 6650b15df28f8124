"""The processes of a run, as `accelerate launch` or `torchrun` start them; most often one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Processes:
    """This process among those of the run.

    Without a GPU they talk through gloo.
    """

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available())

    @property
    def rank(self) -> int:
        return int(self._state.process_index)

    @property
    def count(self) -> int:
        return int(self._state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self._state.device
        return device

    def mesh(self) -> DeviceMesh | None:
        """All of them in a row; None for one alone."""
        return None if self.count == 1 else init_device_mesh(self.device.type, (self.count,))

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all of them."""
        return self.sum(value) / self.count

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all of them."""
        value = value.detach().clone()
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until all of them are here."""
        self._state.wait_for_everyone()

    def leave(self) -> None:
        """Take leave of the others, at the end of the program."""
        if self.count > 1:
            self._state.destroy_process_group()
