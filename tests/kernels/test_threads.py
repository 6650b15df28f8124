"""Tasks on all cores: order, errors, modes, and torch's number of threads left as it was."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from fpsc.kernels import cpu, threads
from tests.kernels.cases import DENSE, NEAR, NEAR_FP8, WINDOW, qkv, tables


@pytest.fixture(params=[1, 2, 3])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_in_order_from_bound_threads(number):
    def where(task: int) -> tuple[int, int, bool]:
        return task, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(threads.run(where, range(20))) == [(i, 1, False) for i in range(20)]
    assert torch.get_num_threads() == number
    assert torch.is_grad_enabled()


def test_many_threads_are_shared_by_fewer_workers(monkeypatch):
    monkeypatch.setattr(threads, "MOST_WORKERS", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    found = list(threads.run(lambda task: torch.get_num_threads(), range(9)))
    torch.set_num_threads(before)
    assert found == [2] * 9


def test_threads_that_start_later_have_the_number_of_the_process(number):
    list(threads.run(abs, range(5)))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [number]


def test_errors_arrive(number):
    def divide(task: int) -> float:
        return 1 / task

    with pytest.raises(ZeroDivisionError):
        list(threads.run(divide, [1, 0]))
    assert list(threads.run(divide, [1, 2])) == [1.0, 0.5]


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_is_the_callers(number, inference):
    with torch.inference_mode(inference):
        made = list(threads.run(lambda task: torch.zeros(task), [1, 2]))
    assert [x.is_inference() for x in made] == [inference, inference]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_a_fork():
    """As in a data loader: the child has none of its parent's threads."""
    list(threads.run(abs, range(5)))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(0 if list(threads.run(abs, [-1, 2])) == [1, 2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_number_of_threads_does_not_change_the_kernel():
    t = tables((4, 6, 8), (2, 3, 4), [[DENSE, NEAR_FP8, WINDOW], [NEAR, NEAR, NEAR]], prefix=5)
    q, k, v = qkv(t, key_heads=1)
    found, before = [], torch.get_num_threads()
    for number in (1, 3, 1, 3):
        torch.set_num_threads(number)
        out, lse, _ = cpu.forward(q, k, v, *t.forward, None, 0.2)
        grads = cpu.backward(q, q, k, v, out, lse, None, *t.backward, None, 0.2)
        found.append((out, lse, *grads))
    torch.set_num_threads(before)
    for again, first in zip(found[2:], found[:2], strict=True):  # bit for bit
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    for one, three in zip(*found[:2], strict=True):
        torch.testing.assert_close(one, three)
