"""Independent tasks on the cores of the CPU, one Python thread a core.

Torch's own way is one parallel region an operator, with a barrier at its end. Attention over tiles
is many short operators, and where other processes keep the cores busy each barrier waits for the
slowest thread to be scheduled again: on two busy cores that made the CPU kernel twenty times
slower. Here each thread runs whole tasks with operators of one thread, and no barrier; torch's
operators release the GIL. On idle cores both ways take the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

MOST_WORKERS = 16
"""With more, the GIL between short operators would be the limit; they then have several threads
each. Our choice, not measured on a machine with so many cores."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def workers() -> int:
    """How many tasks run at once: one a thread of torch, but 1 where threads cannot be bound."""
    return min(torch.get_num_threads(), MOST_WORKERS) if _openmp() else 1


def run(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """function(task) of every task, in the order of the tasks; runs in the caller's thread where
    there is one worker. Gradients are not recorded; inference mode is as in the caller."""
    if workers() == 1:
        with torch.no_grad():
            yield from map(function, tasks)
        return
    inference = torch.is_inference_mode_enabled()

    def in_mode_of_caller(task: Task) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(task)

    with _creation:
        pool = _pool(workers(), torch.get_num_threads(), os.getpid())
    yield from pool.map(in_mode_of_caller, tasks)


_creation = threading.Lock()


@lru_cache(maxsize=1)
def _pool(workers: int, threads: int, process: int) -> ThreadPoolExecutor:
    """Workers that share torch's threads. process: a fork does not inherit threads."""
    started = threading.Barrier(workers + 1, timeout=60)

    def bind() -> None:
        torch.get_num_threads()  # takes the process's number, once for each thread
        torch.set_num_threads(threads // workers)
        started.wait()

    pool = ThreadPoolExecutor(workers, "fpsc", initializer=bind)
    for _ in range(workers):
        pool.submit(lambda: None)
    started.wait()
    # The number belongs to a thread, but torch also keeps the last one for threads yet to come.
    torch.set_num_threads(threads)
    return pool


@lru_cache(maxsize=1)
def _openmp() -> bool:
    """Whether torch's number of threads belongs to the thread that sets it."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
