"""The cost of this device, measured; how well it fits is asserted of a made-up clock alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fpsc.bench.op import Shape, SparseOp
from fpsc.bench.policies import constant
from fpsc.cli import app
from fpsc.cost import DeviceCost, makespan
from fpsc.kernels import threads
from fpsc.tune import timing

SHAPE = Shape((6, 16, 20), 4, 32, prefix=3)  # 16 tiles or so: no two keeps are one
OVERHEAD, TILE, BYTES = 5e-4, {"bf16": 2e-5, "fp8": 3e-5}, 2**50


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The op does nothing, and a clock says what its lists would take: what is held out so many
    times as much. A copy takes a second."""
    cpu = torch.device("cpu")
    known = {len(SparseOp(SHAPE, constant(keep), cpu, fp8=True).lists[1]) for keep in timing.KEEPS}

    def pretend(wrong: float) -> None:
        seconds: list[float] = []

        def call(self: SparseOp, q: torch.Tensor, *_: Any) -> None:
            ptr, idx = self.lists
            visits = ptr.diff().repeat(q.shape[1]).numpy()
            tile = TILE["fp8" if self.kinds == 2 else "bf16"]
            end = makespan(tile * visits, np.ones(len(visits), int), threads.workers())
            seconds.append((OVERHEAD + end) * (1.0 if len(idx) in known else wrong))

        def clock(work: Callable[[], object]) -> float:
            seconds.clear()
            work()
            return seconds[0] if seconds else 1.0

        monkeypatch.setattr(SparseOp, "__call__", call)
        monkeypatch.setattr(timing, "clock_for", lambda device, ahead: clock)
        monkeypatch.setattr(timing, "copy_of", lambda device: (lambda: None, BYTES))

    return pretend


def measured(fp8: bool = True) -> DeviceCost:
    return timing.device_cost(SHAPE, device=torch.device("cpu"), dtype=torch.float32, fp8=fp8)


def test_what_the_clock_says_is_found(pretended: Callable[[float], None]) -> None:
    pretended(1.0)
    found = measured()
    assert found.source == "measured" and found.workers == threads.workers()
    assert found.bandwidth == BYTES
    assert found.overhead == pytest.approx(OVERHEAD, rel=0.05)
    for kind, each in found.kinds.items():
        assert each.tile == pytest.approx(TILE[kind], rel=0.02)
    assert found.held_out_error is not None and found.held_out_error < 0.02
    assert found.refusal is None
    assert [p.held_out for p in found.points if "keep 0.375" in p.name] == [True, True]
    assert {p.name.rsplit(", ", 1)[1] for p in found.points} == {"1 heads", "4 heads"}
    assert list(measured(fp8=False).kinds) == ["bf16"]


def test_what_does_not_go_on_as_it_began_is_refused(pretended: Callable[[float], None]) -> None:
    pretended(1.5)
    assert "predicted wrong by 3" in str(measured().refusal)


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    done = CliRunner().invoke(
        app,
        [
            *("bench", "device", "--grid", "3,8,10", "--heads", "2", "--head-dim", "16"),
            *("--seconds", "1", "--device", "cpu", "-o", str(path), "--json"),
        ],
    )
    assert done.exit_code in (0, 1), done.output  # on a busy machine it may refuse itself
    told = json.loads(done.stdout)
    assert told == json.loads(path.read_text())
    assert told["head_dim"] == 16 and len(told["points"]) == 2 * (2 * 4 + 2)
    assert all(point["seconds"] > 0 for point in told["points"])
    assert ("not to be used" in done.stderr) == (done.exit_code == 1)
