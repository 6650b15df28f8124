"""Properties that hold for every pattern on every grid, and those that hold for one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsc.grid import BLOCK, Layout, TokenGrid, layout
from fpsc.policy.patterns import Pattern, PatternError, fraction, lists, pattern_of, wanted
from fpsc.policy.schema import Mode

small = st.integers(1, 7)
triples = st.tuples(small, small, small)
keeps = st.floats(0.01, 1.0)
offset = st.integers(-3, 3)
weights = st.just((1.0, 1.0, 1.0)) | st.tuples(*[st.floats(0.1, 10)] * 3)
ordered = st.tuples(st.sampled_from(["near", "radial", "frame", "column"]), keeps, weights).map(
    lambda p: Pattern(p[0], keep=p[1], weights=p[2])
)
patterns = st.one_of(
    st.sampled_from([Pattern("dense"), Pattern("frame"), Pattern("column")]),
    ordered,
    triples.map(lambda window: Pattern("window", window=window)),
    st.lists(st.tuples(offset, offset, offset), min_size=1, max_size=6).map(
        lambda offsets: Pattern("explicit", offsets=tuple(offsets))
    ),
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Up to 7 tiles an axis, with a ragged edge and text on both sides."""
    tile = draw(st.sampled_from([(1, 1, 1), (2, 3, 4), (3, 5, 8), (1, 8, 16)]))
    count = draw(triples)
    grid = [n * s - draw(st.integers(0, s - 1)) for n, s in zip(count, tile, strict=True)]
    return layout(grid, tile, draw(st.sampled_from([0, 5, 200])), draw(st.sampled_from([0, 7])))


def matrix(pattern: Pattern, lay: Layout) -> np.ndarray:
    """bool [n_tiles, n_tiles] from the lists: rows are queries."""
    ptr, idx = (a.numpy() for a in lists(pattern, lay))
    seen = np.zeros((lay.n_tiles, lay.n_tiles), bool)
    for u in range(lay.n_tiles):
        seen[u, idx[ptr[u] : ptr[u + 1]]] = True
    return seen


def video(pattern: Pattern, tiles: tuple[int, int, int]) -> np.ndarray:
    """bool [t, y, x, t, y, x] on a grid of tiles of 2 x 3 x 4 tokens."""
    lay = layout([n * s for n, s in zip(tiles, (2, 3, 4), strict=True)], (2, 3, 4))
    return matrix(pattern, lay).reshape(*tiles, *tiles)


def offsets_seen(seen: np.ndarray, query: tuple[int, int, int]) -> set[tuple[int, int, int]]:
    """Offsets from a query tile to the key tiles that it sees."""
    return {tuple(int(n) for n in k - np.array(query)) for k in np.argwhere(seen[query])}


@given(patterns, layouts())
def test_lists_are_csr_sorted_and_hold_the_tile_itself(pattern: Pattern, lay: Layout) -> None:
    ptr, idx = lists(pattern, lay)
    assert str(ptr.dtype) == str(idx.dtype) == "torch.int32"
    assert ptr[0] == 0
    assert ptr[-1] == len(idx)
    assert len(ptr) == lay.n_tiles + 1
    for u in range(lay.n_tiles):
        keys = idx[ptr[u] : ptr[u + 1]].tolist()
        assert keys == sorted(set(keys))
        assert u in keys
        assert keys[0] >= 0
        assert keys[-1] < lay.n_tiles


@given(patterns, layouts())
def test_text_is_dense_both_ways(pattern: Pattern, lay: Layout) -> None:
    seen = matrix(pattern, lay)
    text = [u for u in range(lay.n_tiles) if u not in lay.video_tiles]
    assert seen[text].all()
    assert seen[:, text].all()


@given(ordered, layouts())
def test_keep_is_what_was_asked_within_one_tile(pattern: Pattern, lay: Layout) -> None:
    assert pattern.keep is not None
    span = slice(lay.video_tiles.start, lay.video_tiles.stop)
    counts = matrix(pattern, lay)[span, span].sum(1)
    n = len(lay.video_tiles)
    assert set(counts.tolist()) == {max(1, round(pattern.keep * n))}
    assert abs(counts[0] / n - pattern.keep) <= 1 / n


@given(patterns, layouts())
def test_the_predicted_keep_is_that_of_the_lists(pattern: Pattern, lay: Layout) -> None:
    span = slice(lay.video_tiles.start, lay.video_tiles.stop)
    assert fraction(pattern, lay.tile_grid) == pytest.approx(
        matrix(pattern, lay)[span, span].mean()
    )


@given(triples, keeps, weights)
@settings(max_examples=40)
def test_near_leaves_out_nothing_nearer_than_what_it_takes(tiles, keep, weights) -> None:
    seen = video(Pattern("near", keep, weights=weights), tiles)
    where = np.indices(tiles).reshape(3, -1).T * (2, 3, 4) * weights
    seen = seen.reshape(len(where), len(where))
    for query, row in zip(where, seen, strict=True):
        distance = np.linalg.norm(where - query, axis=1)
        if not row.all():
            assert distance[row].max() <= distance[~row].min() + 1e-9


@given(triples, keeps)
@settings(max_examples=40)
def test_radial_follows_its_formula(tiles, keep) -> None:
    seen = video(Pattern("radial", keep), tiles).reshape(np.prod(tiles), -1)
    t, y, x = np.indices(tiles).reshape(3, -1) * np.array([[2], [3], [4]])
    for q, row in enumerate(seen):
        space = np.hypot(y - y[q], x - x[q])
        cost = (space + 1) * 2 ** np.floor(np.log2(np.maximum(np.abs(t - t[q]), 1)))
        if not row.all():
            assert cost[row].max() <= cost[~row].min() + 1e-9


@pytest.mark.parametrize("kind", ["near", "radial", "frame", "column"])
@pytest.mark.parametrize("count", range(1, 15))
def test_an_order_is_symmetric_in_the_middle(kind: str, count: int) -> None:
    """Away from the borders -d is seen with d, but for the last one of an even count, which leans
    to the lower index."""
    tiles = (9, 11, 13)
    seen = offsets_seen(video(Pattern(kind, count / (9 * 11 * 13)), tiles), (4, 5, 6))
    assert len(seen) == count
    lone = [d for d in seen if tuple(-n for n in d) not in seen]
    assert len(lone) == (count + 1) % 2
    assert all(d < (0, 0, 0) for d in lone)


@given(triples, keeps, weights)
@settings(max_examples=30)
def test_near_is_symmetric_where_nothing_lies_outside(tiles, keep, weights) -> None:
    """With an odd count, two tiles whose own neighbours all lie inside see each other or not."""
    count = wanted(Pattern("near", keep), TokenGrid(*tiles)) | 1
    n = np.prod(tiles)
    if count > n:
        return
    seen = video(Pattern("near", count / n, weights=weights), tiles)
    # Their offsets are those of an endless grid: what the middle of a large one sees.
    wide = tuple(2 * s + 1 for s in tiles)
    middle = offsets_seen(
        video(Pattern("near", count / np.prod(wide), weights=weights), wide), tiles
    )
    inside = [q for q in np.ndindex(tiles) if offsets_seen(seen, q) == middle]
    for q in inside:
        for k in inside:
            assert seen[q][k] == seen[k][q]


@given(triples, triples.map(lambda w: tuple(n | 1 for n in w)))
@settings(max_examples=40)
def test_an_odd_window_is_symmetric_in_the_middle(tiles, window) -> None:
    seen = video(Pattern("window", window=window), tiles)
    half = np.array(window) // 2
    inside = [
        q
        for q in np.ndindex(tiles)
        if all(h <= i < n - h for i, h, n in zip(q, half, tiles, strict=True))
    ]
    for q in inside:
        for k in inside:
            assert seen[q][k] == seen[k][q]


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern("dense"),
        Pattern("frame"),
        Pattern("column"),
        Pattern("explicit", offsets=((0, 1, 2), (0, -1, -2), (1, 0, 0), (-1, 0, 0))),
    ],
    ids=lambda p: p.kind,
)
def test_symmetric_up_to_the_borders(pattern: Pattern) -> None:
    seen = video(pattern, (3, 4, 5)).reshape(60, 60)
    assert (seen == seen.T).all()


@given(triples, triples)
@settings(max_examples=40)
def test_a_window_is_a_shifted_box_of_one_size(tiles, window) -> None:
    """Sliding Tile Attention's rule, written as loops."""
    seen = video(Pattern("window", window=window), tiles)
    for q in np.ndindex(tiles):
        box = np.ones(tiles, bool)
        for axis, (i, n, w) in enumerate(zip(q, tiles, window, strict=True)):
            width = min(w, n)
            first = min(max(i - width // 2, 0), n - width)
            outside = [k for k in range(n) if not first <= k < first + width]
            np.moveaxis(box, axis, 0)[outside] = False
        assert (seen[q] == box).all()


def test_an_even_window_leans_to_the_lower_index() -> None:
    seen = video(Pattern("window", window=(1, 1, 2)), (1, 1, 5))
    assert [sorted(d for _, _, d in offsets_seen(seen, (0, 0, x))) for x in range(5)] == [
        [0, 1],  # shifted inside
        [-1, 0],
        [-1, 0],
        [-1, 0],
        [-1, 0],
    ]


def test_frame_and_column_without_keep_are_exactly_that() -> None:
    tiles = (3, 4, 5)
    t, y, x = np.indices(tiles)
    frame, column = video(Pattern("frame"), tiles), video(Pattern("column"), tiles)
    for q in np.ndindex(tiles):
        assert (frame[q] == (t == q[0])).all()
        assert (column[q] == ((y == q[1]) & (x == q[2]))).all()


def test_frame_and_column_with_keep_start_from_their_own() -> None:
    tiles = (3, 4, 5)
    one = video(Pattern("frame", 0.5), tiles)[1, 2, 2]
    assert one[1].all()
    assert one.sum() == 30
    two = video(Pattern("column", 0.25), tiles)[1, 2, 2]
    assert two[:, 2, 2].all()
    assert two.sum() == 15
    few = video(Pattern("frame", 4 / 60), tiles)[1, 2, 2]
    assert few.sum() == few[1].sum() == 4


def test_weights_turn_near_towards_an_axis() -> None:
    tiles = (9, 9, 9)
    along_time = offsets_seen(
        video(Pattern("near", 5 / 729, weights=(0.001, 1, 1)), tiles), (4, 4, 4)
    )
    assert along_time == {(d, 0, 0) for d in range(-2, 3)}
    in_space = offsets_seen(video(Pattern("near", 5 / 729, weights=(1000, 1, 1)), tiles), (4, 4, 4))
    assert all(t == 0 for t, _, _ in in_space)


def test_near_counts_tokens_and_not_tiles() -> None:
    """A tile of 7 x 9 x 2 is narrow in x: its neighbours in x come first."""
    lay = layout((49, 63, 14), (7, 9, 2))
    keys = matrix(Pattern("near", 5 / 343), lay).reshape(7, 7, 7, 7, 7, 7)
    assert offsets_seen(keys, (3, 3, 3)) == {(0, 0, d) for d in range(-2, 3)}


def test_explicit_is_clipped_at_the_borders() -> None:
    seen = video(Pattern("explicit", offsets=((0, 0, 1), (9, 0, 0))), (2, 2, 3))
    assert offsets_seen(seen, (0, 0, 0)) == {(0, 0, 0), (0, 0, 1)}
    assert offsets_seen(seen, (0, 0, 2)) == {(0, 0, 0)}


def test_explicit_lists_are_what_is_seen_and_the_tile_itself() -> None:
    mode = Mode(pattern="explicit", lists=[[1], [], [0, 2, 2], [3], [4, 0], [5]])
    lay = layout((2, 6, 12), (2, 3, 4))  # 1 x 2 x 3 tiles
    ptr, idx = lists(mode, lay)
    assert [idx[a:b].tolist() for a, b in pairwise(ptr)] == [[0, 1], [1], [0, 2], [3], [0, 4], [5]]
    assert fraction(pattern_of(mode), lay.tile_grid) == pytest.approx(9 / 36)


def test_explicit_lists_of_another_grid_are_refused() -> None:
    with pytest.raises(
        PatternError, match=r"^2 lists, for as many tiles; this video has 3 x 1 x 1"
    ):
        lists(Pattern("explicit", lists=((0,), (1,))), layout((6, 3, 4), (2, 3, 4)))


def test_equal_modes_share_a_pattern() -> None:
    assert pattern_of(Mode(keep=1.0)) == pattern_of(Mode(pattern="near", keep=1.0))
    assert pattern_of(Mode(pattern="near", keep=0.5)) == pattern_of(
        Mode(pattern="near", keep=0.5, dtype="fp8")
    )
    assert pattern_of(Mode(pattern="near", keep=0.5)) != pattern_of(
        Mode(pattern="radial", keep=0.5)
    )


def test_at_least_one_tile_is_kept() -> None:
    assert wanted(Pattern("near", 1e-6), TokenGrid(3, 5, 7)) == 1


def test_a_mode_gives_the_lists_of_its_pattern() -> None:
    lay = layout((5, 9, 9), (2, 3, 4), prefix=BLOCK + 1)
    mode = Mode(pattern="window", window=[1, 2, 3])
    for a, b in zip(lists(mode, lay), lists(Pattern("window", window=(1, 2, 3)), lay), strict=True):
        assert a.equal(b)
