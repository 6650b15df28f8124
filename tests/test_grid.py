"""The grid, its tiles and the order of tokens in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fpsc.grid import (
    BLOCK,
    MAX_TILE_RATIO,
    Layout,
    TileShape,
    TokenGrid,
    from_tiles,
    layout,
    padded_work,
    plan_tile,
    tile_grid,
    to_tiles,
)

sizes = st.integers(1, 13)
grids = st.tuples(sizes, sizes, sizes).map(lambda g: TokenGrid(*g))
tiles = (
    st.tuples(sizes, sizes, sizes).map(lambda s: TileShape(*s)).filter(lambda s: s.tokens <= BLOCK)
)
texts = st.sampled_from([0, 1, 77, 127, 128, 129, 300])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return layout(draw(grids), draw(tiles), draw(texts), draw(texts))


@given(layouts())
def test_raster_to_tiles_and_back_is_the_identity(lay: Layout) -> None:
    x = torch.arange(2 * lay.tokens * 3.0).view(2, lay.tokens, 3)
    assert torch.equal(from_tiles(to_tiles(x, lay), lay), x)


@given(layouts())
def test_every_position_has_one_row_and_padding_comes_last(lay: Layout) -> None:
    real = lay.gather >= 0
    assert torch.equal(lay.gather[real].sort().values.long(), torch.arange(lay.tokens))
    assert torch.equal(real.sum(1), lay.valid)
    assert bool((lay.valid >= 1).all())
    row = torch.arange(BLOCK)
    assert torch.equal(real, row < lay.valid[:, None])
    assert torch.equal(lay.gather.view(-1)[lay.slot.long()].long(), torch.arange(lay.tokens))
    for tensor in (lay.gather, lay.valid, lay.slot):
        assert tensor.dtype == torch.int32


@given(layouts())
def test_rows_are_where_the_definition_puts_them(lay: Layout) -> None:
    """Tile by tile, in the words of the contract: boxes in raster order, raster inside a box."""
    (T, Y, X), (t, y, x) = lay.grid, lay.tile
    rows = [list(range(i, min(i + BLOCK, lay.prefix))) for i in range(0, lay.prefix, BLOCK)]
    assert lay.video_tiles.start == len(rows)
    for t0 in range(0, T, t):
        for y0 in range(0, Y, y):
            for x0 in range(0, X, x):
                box = [
                    lay.prefix + (a * Y + b) * X + c
                    for a in range(t0, min(t0 + t, T))
                    for b in range(y0, min(y0 + y, Y))
                    for c in range(x0, min(x0 + x, X))
                ]
                rows.append(box)
    assert lay.video_tiles.stop == len(rows)
    assert len(lay.video_tiles) == lay.tile_grid.tokens
    start = lay.prefix + lay.grid.tokens
    rows += [list(range(i, min(i + BLOCK, lay.tokens))) for i in range(start, lay.tokens, BLOCK)]
    padded = [r + [-1] * (BLOCK - len(r)) for r in rows]
    assert lay.gather.tolist() == padded


def test_padding_rows_hold_the_fill() -> None:
    lay = layout((3, 5, 7), (2, 4, 4), prefix=5)
    tiled = to_tiles(torch.ones(lay.tokens, 2), lay, fill=float("nan"))
    assert tiled.shape == (lay.n_tiles, BLOCK, 2)
    assert torch.equal(tiled.isnan().any(-1), lay.gather < 0)


def test_tiles_carry_gradients() -> None:
    lay = layout((3, 5, 7), (2, 4, 4), suffix=3)
    x = torch.randn(2, lay.tokens, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, lay.tokens, 4, dtype=torch.double)
    (from_tiles(to_tiles(x, lay), lay) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_the_wrong_length_is_named() -> None:
    lay = layout((2, 3, 4), (2, 3, 4))
    with pytest.raises(ValueError, match=r"^the layout has 24 tokens, the tensor has 25$"):
        to_tiles(torch.zeros(25, 1), lay)
    with pytest.raises(ValueError, match=r"^the layout has 1 tiles, the tensor has 2$"):
        from_tiles(torch.zeros(2, BLOCK, 1), lay)


def test_wan_720p_pads_little() -> None:
    grid = (21, 45, 80)
    assert plan_tile(grid) == (7, 9, 2)
    assert padded_work(grid, plan_tile(grid)) <= 1.05
    assert padded_work(grid, (7, 9, 2)) == pytest.approx((600 * 128 / 75600) ** 2)
    assert padded_work(grid, (3, 5, 8)) == pytest.approx((630 * 128 / 75600) ** 2)


@pytest.mark.parametrize(
    "grid",
    [
        (21, 30, 52),
        (33, 45, 80),
        (13, 60, 90),
        (13, 30, 52),
        (30, 48, 80),
        (17, 31, 53),
        (9, 24, 32),
    ],
    ids=str,
)
def test_planned_tiles_are_compact_and_within_the_buffers(grid: tuple[int, int, int]) -> None:
    tile = plan_tile(grid)
    assert max(tile) <= 16, "a long thin tile sees far along one axis only"
    least = min(
        tile_grid(TokenGrid(*grid), TileShape(t, y, x)).tokens
        for t in range(1, 129)
        for y in range(1, 128 // t + 1)
        for x in range(1, 128 // (t * y) + 1)
    )
    found = tile_grid(TokenGrid(*grid), tile).tokens
    assert least <= found <= MAX_TILE_RATIO * -(-TokenGrid(*grid).tokens // BLOCK)


@given(grids)
def test_a_planned_tile_fits_block_and_grid(grid: TokenGrid) -> None:
    tile = plan_tile(grid)
    assert tile.tokens <= BLOCK
    assert all(s <= n for s, n in zip(tile, grid, strict=True))
    if grid.tokens <= BLOCK:
        assert tile == grid, "a grid that fits one block is one tile"


@given(grids, st.sampled_from([64, 128, 256]))
@settings(max_examples=30)
def test_no_shape_beats_the_plan_in_both_work_and_compactness(grid: TokenGrid, block: int) -> None:
    tile = plan_tile(grid, block)
    work = padded_work(grid, tile, block)
    for t in range(1, min(block, grid.t) + 1):
        for y in range(1, min(block // t, grid.y) + 1):
            for x in range(1, min(block // (t * y), grid.x) + 1):
                less_work = padded_work(grid, (t, y, x), block) < work
                inside = t <= tile.t and y <= tile.y and x <= tile.x
                assert not (less_work and inside), (t, y, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_tile((0, 1, 1)), r"^grid must be three positive integers \(t, y, x\); found"),
        (lambda: plan_tile((4, 4)), r"^grid must be three positive integers .* found \(4, 4\)$"),
        (lambda: plan_tile((4.0, 4, 4)), r"^grid must be three positive integers"),
        (lambda: layout((4, 4, 4), (True, 4, 4)), r"^tile must be three positive integers"),
        (
            lambda: layout((21, 45, 80), (6, 8, 8)),
            r"^tile \(6, 8, 8\) holds 384 tokens; expected at most 128, for example \(7, 9, 2\)$",
        ),
        (lambda: layout((4, 4, 4), (4, 4, 4), prefix=-1), r"^prefix must be a number of tokens"),
        (lambda: layout((4, 4, 4), (4, 4, 4), suffix=1.5), r"^suffix must be a number of tokens"),
    ],
    ids=["zero", "two sizes", "float", "bool", "too large", "negative prefix", "half a suffix"],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_layout_is_built_once() -> None:
    assert layout((5, 6, 7), (2, 3, 4), 8) is layout(TokenGrid(5, 6, 7), TileShape(2, 3, 4), 8, 0)


def test_cached_tensors_are_ordinary_wherever_they_were_built() -> None:
    """The first call may come from inside a compiler or an inference-mode forward."""
    with torch.inference_mode():
        inference = layout((5, 6, 11), (2, 3, 4))
    with FakeTensorMode():
        fake = layout((5, 6, 12), (2, 3, 4))
    with torch.device("meta"):
        meta = layout((5, 6, 13), (2, 3, 4))
    for lay in (inference, fake, meta):
        assert type(lay.gather) is torch.Tensor
        assert lay.gather.device.type == "cpu"
        assert not lay.gather.is_inference()
