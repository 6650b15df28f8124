"""The order of the work: what `schedule.list_work` lists, and how evenly programs share it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpsc.grid import layout
from fpsc.kernels.triton import attention, configs, interpreter, prologue, schedule
from fpsc.kernels.triton.launch import launch
from fpsc.policy.patterns import Pattern, lists
from tests.kernels.cases import NEAR, NEAR_FP8, qkv, resolved, tables

pytestmark = pytest.mark.skipif(not interpreter.ACTIVE, reason="kernels are compiled here")

FP8, INPUT = 1, 0


def worked(
    lengths: list[list[int]], modes: list[list[tuple[int, int]]], *, masked: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The work list of the FP8 cells [items, 4], what was in front of it, and the order of tiles.

    lengths: [patterns, tiles]; modes: of each batch element and head, pattern and dtype.
    """
    own = torch.tensor(lengths)
    n_patterns, tiles = own.shape
    ends = own.flatten().cumsum(0).view(n_patterns, tiles)
    ptr = torch.cat([ends[:, :1] - own[:, :1], ends], 1).int()
    modes_BH3 = torch.tensor([[(p, d, 0) for p, d in element] for element in modes]).int()
    B, H = modes_BH3.shape[:2]
    order = torch.tensor(
        [sorted(range(tiles), key=lambda u, one=one: -one[u].bit_length()) for one in lengths]
    ).int()
    heads = attention._heads_by_kind(modes_BH3, ptr)[FP8]
    counts = torch.full((schedule.WORK["CLASSES"], B * H), -1, dtype=torch.int32)
    work = torch.full((B * H * tiles, 4), -1, dtype=torch.int32)
    width, entries = 8, int(ends[-1, -1])
    sizes = schedule.WORK | {"WIDTH": width}
    visits = None
    if masked:  # of batch element b, b tiles of every list are gone
        visits = torch.stack([(own - b).clamp(min=0) for b in range(B)]).int()
    launch(
        schedule.count_classes, (B * H,),
        heads, modes_BH3, ptr, counts, B * H, tiles, **sizes,
    )  # fmt: skip
    launch(
        schedule.list_work, (B * H, -(-tiles // width)),
        heads, modes_BH3, ptr, visits, order, counts, work, H, B * H, tiles, n_patterns, entries,
        **sizes, COLUMNS=schedule.COLUMNS,
    )  # fmt: skip
    return work, ptr, order


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    tiles, n_patterns = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    length = st.one_of(st.integers(0, 3), st.integers(0, 700))
    lengths = [draw(st.lists(length, min_size=tiles, max_size=tiles)) for _ in range(n_patterns)]
    mode = st.tuples(st.integers(0, n_patterns - 1), st.sampled_from([FP8, INPUT]))
    heads = draw(st.integers(1, 4))
    one = st.lists(mode, min_size=heads, max_size=heads)
    return lengths, draw(st.lists(one, min_size=1, max_size=2))


@settings(max_examples=12, deadline=None)
@given(problems(), st.booleans())
def test_every_item_is_there_once_in_its_class(
    problem: tuple[list[list[int]], list[list[tuple[int, int]]]], masked: bool
) -> None:
    lengths, modes = problem
    work, ptr, order = worked(lengths, modes, masked=masked)
    tiles, heads_each = len(lengths[0]), len(modes[0])
    patterns = [mode[0] for element in modes for mode in element]
    wanted = [h for h, mode in enumerate(m for e in modes for m in e) if mode[1] == FP8]
    items = len(wanted) * tiles
    assert (work[items:] == -1).all(), "only FP8 cells are listed"
    found = [tuple(item) for item in work[:items].tolist()]
    assert sorted(item[:2] for item in found) == sorted(
        (h, tile) for h in wanted for tile in range(tiles)
    )
    entries = sum(map(sum, lengths))
    for head, tile, first, visits in found:
        element, length = head // heads_each, lengths[patterns[head]][tile]
        assert first == int(ptr[patterns[head], tile]) + (element * entries if masked else 0)
        assert visits == (max(length - element, 0) if masked else length)

    def class_of(item: tuple[int, ...]) -> int:
        return lengths[patterns[item[0]]][item[1]].bit_length()

    classes = [class_of(item) for item in found]
    assert classes == sorted(classes)
    # In a class heads one after the other, and each as the order of its pattern, backwards.
    ranks: dict[int, int] = {}
    for item in reversed(found):
        ranks.setdefault(item[0], len(ranks))
    for one in sorted(set(classes)):
        own = [item for item in found if class_of(item) == one]
        heads = list(dict.fromkeys(item[0] for item in own))
        assert [item[0] for item in own] == sorted((i[0] for i in own), key=heads.index)
        for head in heads:
            places = [order[patterns[head]].tolist().index(i[1]) for i in own if i[0] == head]
            assert places == sorted(places, reverse=True)


@pytest.mark.parametrize("programs", [2, 5, 16])
def test_text_does_not_fall_to_one_program(programs: int) -> None:
    """A tile of text in every head, and as many tiles as make it fall to the same one."""
    tiles = 6 * programs
    lengths = [[tiles, *[n] * (tiles - 1)] for n in (4, 9)]
    work, _, _ = worked(lengths, [[(p, FP8) for p in (0, 1, 0, 1, 1, 0, 0)]])
    visits = work[:, 3].long()
    shares = torch.stack([visits[w::programs].sum() for w in range(programs)])
    assert shares.max() - shares.min() <= visits.max()
    # Head by head it would be: a head's items are a multiple of the programs.
    by_head = torch.tensor([lengths[p][t] for p in (0, 1, 0, 1, 1, 0, 0) for t in range(tiles)])
    before = torch.stack([by_head[w::programs].sum() for w in range(programs)])
    assert before.max() - before.min() > 3 * visits.max()


def test_programs_and_items_of_a_head_share_no_large_factor() -> None:
    assert configs.programs(132, 600) == 132 and configs.programs(132, 992) == 132
    assert [configs.programs(132, n * 132) for n in (1, 4, 5)] == [131, 131, 131]
    assert configs.programs(132, 131 * 132) == 130
    assert configs.programs(3, 9) == 3 and configs.programs(1, 5) == 1
    for multiprocessors in (108, 114, 132, 142, 148, 170, 188):
        for items in range(1, 3000):
            found = configs.programs(multiprocessors, items)
            assert multiprocessors - 8 < found <= multiprocessors
            assert math.gcd(found, items) <= configs.COMMON


def test_lists_of_a_joint_sequence_have_two_lengths() -> None:
    """What the bound rests on: in a head all tiles of video see as many, and text sees all."""
    tiles = layout((7, 20, 30), (2, 5, 6), 130, 7)
    for pattern in (Pattern("near", 0.2), Pattern("frame"), Pattern("radial", 0.3)):
        lengths = lists(pattern, tiles)[0].diff()
        assert len(set(lengths[list(tiles.video_tiles)].tolist())) == 1
        text = [t for t in range(tiles.n_tiles) if t not in tiles.video_tiles]
        assert len(text) == 3 and (lengths[text] == tiles.n_tiles).all()


def test_text_costs_what_its_tiles_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products for each tile of each list and no more, with whole and ragged tiles of text."""
    from triton.runtime.interpreter import InterpreterBuilder

    original, products = InterpreterBuilder.create_dot, 0

    def counted(self: InterpreterBuilder, *args: Any) -> Any:
        nonlocal products
        products += 1
        return original(self, *args)

    t = tables((3, 5, 7), (3, 5, 4), [[NEAR, NEAR_FP8]], prefix=3, suffix=130)
    visits = sum(int(t.list_ptr[p].diff().sum()) for p in resolved(t)[0, :, 0].tolist())
    monkeypatch.setattr(prologue, "CHUNKS", 3)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    attention.forward(*qkv(t, dim=16), *t.forward, None, 0.2, 3)
    assert products == 2 * visits
