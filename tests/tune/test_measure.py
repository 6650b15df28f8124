"""What is measured in one attention, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fpsc.bench.op import Shape, SparseOp
from fpsc.grid import layout
from fpsc.passes.rewrite import PLAN
from fpsc.policy import plan, resolve
from fpsc.policy.resolve import kinds_of
from fpsc.tune import measure, modes
from fpsc.tune.measure import Measurement, Observed, Tables
from tests.tune.common import CANDIDATES, GRID, TILE

SHAPE = Shape(GRID, 2, 16, prefix=3, suffix=4)
POLICY = modes.policy(CANDIDATES, tile=TILE)
LAYOUT = layout(GRID, TILE, SHAPE.prefix, SHAPE.suffix)


def tables(mask: Tensor | None = None) -> Tables:
    """The op's arguments as a graph hands them over: everything dense, all candidates there."""
    table, lists = resolve(POLICY, layers=1, heads=2, fp8=True), plan(POLICY, LAYOUT)
    rows = torch.zeros(1, dtype=torch.int32)
    found = [rows, table.cells, table.modes, *(getattr(lists, name) for name in PLAN)]
    return (*found, mask, SHAPE.head_dim**-0.5, 0, kinds_of(POLICY, True), "auto")


@pytest.fixture
def qkv() -> list[Tensor]:
    return [torch.randn(1, 2, SHAPE.tokens, SHAPE.head_dim) for _ in range(3)]


def alone(name: str, qkv: list[Tensor]) -> Tensor:
    """The output under a policy that has this mode alone."""
    only = modes.policy({"dense": CANDIDATES[name]}, tile=TILE)
    return SparseOp(SHAPE, only, torch.device("cpu"), fp8=True)(*qkv)


def test_every_mode_is_that_of_a_policy(qkv: list[Tensor]) -> None:
    everything = torch.ones(LAYOUT.n_tiles, dtype=torch.bool)
    given = measure.each_mode(tables(), len(CANDIDATES), 2, everything)
    for name, each in zip(CANDIDATES, given, strict=True):
        torch.testing.assert_close(measure.attend(*qkv, each), alone(name, qkv))


def test_a_sample_of_the_queries_is_a_part_of_all(qkv: list[Tensor]) -> None:
    chosen = measure.spread(LAYOUT.n_tiles, 0.3, torch.device("cpu"))
    assert chosen.sum() == round(0.3 * LAYOUT.n_tiles)
    real = torch.arange(128) < LAYOUT.valid[:, None]
    kept = LAYOUT.gather[real & chosen[:, None]].long()
    left = LAYOUT.gather[real & ~chosen[:, None]].long()
    given = measure.each_mode(tables(), len(CANDIDATES), 2, chosen)
    for name, each in zip(CANDIDATES, given, strict=True):
        found, expected = measure.attend(*qkv, each), alone(name, qkv)
        torch.testing.assert_close(found[:, :, kept], expected[:, :, kept])
        assert not found[:, :, left].any()


def observe(qkv: list[Tensor], gradient: Tensor, queries: float = 1.0) -> Measurement:
    found = Measurement(2, 2, len(CANDIDATES), LAYOUT.video_tiles, queries)
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = Observed.apply(q, k, v, 1, tables(), found)
    torch.autograd.grad(out, (q, k, v), gradient)
    return found


def test_numbers_are_those_of_the_formula(qkv: list[Tensor]) -> None:
    gradient = torch.randn(qkv[0].shape)
    found = observe(qkv, gradient)
    assert found.seen.tolist() == [0, 1] and not found.damage[0].any()
    dense = alone("dense", qkv)
    for m, name in enumerate(CANDIDATES):
        error = alone(name, qkv) - dense
        for h in range(2):
            expected = 0.0
            for rows, n in zip(LAYOUT.gather, LAYOUT.valid.tolist(), strict=True):
                products = (error[0, h] * gradient[0, h])[rows[:n].long()].sum(-1)
                expected += sum(float(run.sum()) ** 2 for run in products.split(measure.RUN))
            assert found.damage[1, h, m] == pytest.approx(expected, rel=1e-3, abs=1e-9)
            relative = float(error[0, h].square().sum() / dense[0, h].square().sum())
            assert found.attention[1, h, m] == pytest.approx(relative, rel=1e-3, abs=1e-9)


def test_gradients_are_those_of_the_op(qkv: list[Tensor]) -> None:
    gradient = torch.randn(qkv[0].shape)
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    expected = torch.autograd.grad(measure.attend(q, k, v, tables()), (q, k, v), gradient)
    out = Observed.apply(q, k, v, 0, tables(), lambda *_: None)
    found = torch.autograd.grad(out, (q, k, v), gradient)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_damage_is_the_squared_change_of_a_tokenwise_prediction(qkv: list[Tensor]) -> None:
    """In the mean over random directions, where the model behind acts token by token."""
    weight = torch.randn(2, SHAPE.head_dim, 5)
    total = 0.0
    repeats = 10
    for _ in range(repeats):
        r = torch.randn(SHAPE.tokens, 5)
        total += observe(qkv, torch.einsum("hdc,nc->hnd", weight, r)[None]).damage[1]
    dense = alone("dense", qkv)
    for m, name in enumerate(CANDIDATES):
        change = torch.einsum("hnd,hdc->hnc", (alone(name, qkv) - dense)[0], weight)
        expected = change.square().sum(dim=(1, 2)).numpy()
        assert total[:, m] / repeats == pytest.approx(expected, rel=0.4, abs=1e-6)


def test_a_sample_estimates_the_whole(qkv: list[Tensor]) -> None:
    gradient = torch.randn(qkv[0].shape)
    whole, part = observe(qkv, gradient), observe(qkv, gradient, queries=0.5)
    sparse = [m for m, name in enumerate(CANDIDATES) if not name.startswith("dense")]
    ratio = part.damage[1][:, sparse].sum() / whole.damage[1][:, sparse].sum()
    assert 0.6 < ratio < 1.6
    assert part.attention[1][:, sparse] == pytest.approx(whole.attention[1][:, sparse], rel=0.5)


def test_the_map_is_where_attention_goes(qkv: list[Tensor]) -> None:
    mask = torch.ones(1, SHAPE.tokens, dtype=torch.bool)
    mask[:, -2:] = False
    for given in (tables(), tables(mask)):
        found = measure.attention_map(*qkv[:2], given, LAYOUT.video_tiles)
        assert found.shape == (2, 12)
        # Scores of noise are all alike: each tile gets about its part, and text the rest.
        seen = SHAPE.tokens - (2 if given[measure.MASK] is not None else 0)
        assert found.sum(1).tolist() == pytest.approx([240 / seen] * 2, abs=0.02)
        assert np.all(found.numpy() > 0.01)


def test_observed_attention_survives_checkpointing(qkv: list[Tensor]) -> None:
    from torch.utils.checkpoint import checkpoint

    gradient = torch.randn(qkv[0].shape)
    found = Measurement(1, 2, len(CANDIDATES), LAYOUT.video_tiles)
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = checkpoint(
        lambda *x: Observed.apply(*x, 0, tables(), found), q, k, v, use_reentrant=False
    )
    torch.autograd.grad(out, q, gradient)
    expected = observe(qkv, gradient)
    assert found.seen.tolist() == [1]
    assert found.damage[0] == pytest.approx(expected.damage[1])
