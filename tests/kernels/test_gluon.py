"""The Gluon kernel, as its source stands: its numbers, and its barriers under random schedules."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpsc.kernels import reference
from fpsc.kernels.triton import attention, configs, interpreter, prologue, tune
from tests.kernels import emulator
from tests.kernels.cases import (
    DENSE_FP8,
    NEAR,
    NEAR_FP8,
    NEAR_FP8_BOX,
    WINDOW_FP8,
    WINDOW_FP8_HEAD,
    qkv,
    tables,
)
from tests.kernels.emulator import Deadlock, Hazard
from tests.thresholds import KERNEL_FP8, KERNEL_HALF, TRITON_BF16, TRITON_FP32, relative_rms

pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fpsc.kernels.gluon import attention as gluon
from fpsc.kernels.gluon import forward, launch

WHOLE = inspect.getsource(forward)
ROWS, DP = 16, 32
SOURCE = WHOLE.replace("BLOCK = gl.constexpr(128)", f"BLOCK = gl.constexpr({ROWS})").replace(
    "ROWS = gl.constexpr(64)", f"ROWS = gl.constexpr({ROWS // 2})"
)
"""With small tiles: who waits for whom is the same, and takes a tenth of the time."""

E4M3 = torch.float8_e4m3fn


# ---- one launch, on tiles of random numbers


@dataclass
class Problem:
    """One head of each of two batch elements, and a list of key tiles for every query tile."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    meta: Tensor
    v_scale: Tensor
    shift: Tensor
    lists: list[list[list[int]]]
    valid: Tensor

    @property
    def tokens(self) -> int:
        return int(self.valid.sum())


def problem(lists: list[list[list[int]]], seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    B, T = len(lists), len(lists[0])
    valid = torch.randint(1, ROWS + 1, (T,), dtype=torch.int32)
    valid[0] = ROWS
    q, k = (torch.randn(B, 1, T, ROWS, DP).mul(40).to(E4M3) for _ in range(2))
    v = torch.randn(B, 1, DP, T, ROWS).mul(40).to(E4M3)
    for tile, keys in enumerate(valid.tolist()):
        k[:, :, tile, keys:] = k[:, :, tile, :1].clone()
        v[:, :, :, tile, keys:] = 0.0
    k_scale = torch.rand(B, 1, T) * 0.01 + 0.001
    last_weights = (valid - (ROWS - 1)).float()
    meta = torch.stack([k_scale, last_weights.expand(B, 1, T)], -1)
    return Problem(
        q, k, v.flatten(-2), torch.rand(B, 1, T) + 0.5, meta, torch.rand(B, 1, DP) + 0.5,
        torch.randn(B, 1, int(valid.sum())), lists, valid,
    )  # fmt: skip


def descriptors(p: Problem) -> list[SimpleNamespace]:
    """As `launch.descriptors`, of small tiles."""
    blocks = (
        (p.q.view(-1, DP), [ROWS // 2, DP]),
        (p.k.view(-1, 2, 2, DP), [ROWS // 4, 1, 2, DP]),
        (p.v.view(-1, p.v.shape[-1]), [DP, ROWS]),
    )
    return [SimpleNamespace(base=x, block_shape=block, layout=None) for x, block in blocks]


def run(
    p: Problem,
    *,
    programs: int = 1,
    stages: int = 3,
    pairs: bool = False,
    seed: int = 0,
    source: str = SOURCE,
    order: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[list[str]]]:
    """out [B, N, 1, DP], lse and m [B, 1, N], and who issued the products with Q, by program."""
    B, T, N = len(p.lists), len(p.valid), p.tokens
    flat = [w for head in p.lists for one in head for w in one]
    work, first = [], 0
    for b in range(B):
        for tile in range(T):
            work.append([b, tile, first, len(p.lists[b][tile])])
            first += len(p.lists[b][tile])
    gather = torch.full((T, ROWS), -1, dtype=torch.int32)
    at = 0
    for tile, rows in enumerate(p.valid.tolist()):
        gather[tile, :rows] = torch.arange(at, at + rows)
        at += rows
    out, lse, m = (torch.full(size, math.nan) for size in ((B, N, 1, DP), (B, 1, N), (B, 1, N)))
    work_tensor = torch.tensor([work[n] for n in order or range(len(work))], dtype=torch.int32)
    issued = emulator.run(
        source, "attend", programs,
        (
            *descriptors(p), p.q_scale,
            p.meta.view(torch.int64), p.v_scale, p.shift, out, lse, m,
            torch.tensor([B], dtype=torch.int32), work_tensor,
            torch.tensor(flat or [0], dtype=torch.int32), gather, p.valid, 0.05, 1, 1, N, T,
        ),
        seed=seed, D=DP, DP=DP, STAGES=stages, PAIRS=pairs,
    )  # fmt: skip
    return out, lse, m, issued


def expected(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row, with the running maximum that it has in the end."""
    B, N = len(p.lists), p.tokens
    out, lse = torch.zeros(B, N, 1, DP), torch.full((B, 1, N), -math.inf)
    offset = torch.zeros(B, 1, N)
    starts = [0, *p.valid.cumsum(0).tolist()]
    for b in range(B):
        for tile, visited in enumerate(p.lists[b]):
            if not visited:
                continue
            q = p.q[b, 0, tile, : p.valid[tile]].float()
            keys = [p.k[b, 0, w, : p.valid[w]].float() for w in visited]
            values = p.v[b, 0].float().unflatten(-1, (-1, ROWS))
            scale = 0.05 * 1.4426950408889634 * p.q_scale[b, 0, tile] * p.meta[b, 0, :, 0]
            s = torch.cat([q @ k.T * scale[w] for k, w in zip(keys, visited, strict=True)], 1)
            m = (s.amax(1, keepdim=True) - 8).ceil()
            weights = torch.exp2(s - m)
            v = torch.cat([values[:, w, : p.valid[w]] for w in visited], 1)
            total = weights.sum(1)
            rows = slice(starts[tile], starts[tile + 1])
            offset[b, 0, rows] = m[:, 0]
            out[b, rows, 0] = weights.to(E4M3).float() @ v.T / total[:, None] * p.v_scale[b, 0]
            lse[b, 0, rows] = (m[:, 0] + total.log2()) * math.log(2) + p.shift[b, 0, rows]
    return out, lse, offset


def check(p: Problem, **options: Any) -> None:
    out, lse, m, issued = run(p, **options)
    expected_out, expected_lse, expected_m = expected(p)
    # Of few keys: one weight that rounds the other way is seen, and a wrong tile is a hundredfold.
    assert relative_rms(out, expected_out) <= 1e-2
    seen = expected_lse.isfinite()
    assert torch.equal(lse[~seen], expected_lse[~seen])
    assert relative_rms(lse[seen], expected_lse[seen]) <= TRITON_FP32
    assert torch.equal(m[seen], expected_m[seen])
    each = 2 if options.get("pairs") else 1
    for program in issued:
        turns = [name for role in (0, 1) for name in [f"attend_rows {role}"] * each]
        assert program == turns * (len(program) // len(turns)), "not in turns"


LISTS = [[[0, 2, 1], [], [1], [2, 0, 0, 1, 2, 1]], [[1, 0], [3], [], [0, 1, 2, 3, 0]]]
"""Empty ones, of one tile, and longer than there are stages."""


BOTH = pytest.mark.parametrize("pairs", [False, True], ids=["tiles", "pairs"])


@BOTH
@pytest.mark.parametrize("programs", [1, 3, 8, 11])
def test_more_and_fewer_items_than_programs(programs, pairs):
    check(problem(LISTS), programs=programs, pairs=pairs)


@BOTH
def test_every_list_is_empty(pairs):
    check(problem([[[], [], []]] * 2), programs=2, pairs=pairs)


@st.composite
def lists(draw: st.DrawFn) -> list[list[list[int]]]:
    tiles = draw(st.integers(1, 3))
    one = st.lists(st.integers(0, tiles - 1), max_size=6)
    return draw(st.lists(st.lists(one, min_size=tiles, max_size=tiles), min_size=1, max_size=2))


@BOTH
@settings(max_examples=20)
@given(lists(), st.integers(1, 9), st.integers(3, 5), st.integers(0, 2**30), st.randoms())
def test_random_schedules(pairs, lists, programs, stages, seed, shuffled):
    """Also for items in any order."""
    p = problem(lists, seed)
    order = list(range(len(lists) * len(lists[0])))
    shuffled.shuffle(order)
    check(p, programs=programs, stages=stages, pairs=pairs, seed=seed, order=order)


# ---- what the simulation must find

ERRORS = (Deadlock, Hazard, AssertionError)
SCHEDULES = 60


def barrier_statements() -> Iterator[tuple[str, str]]:
    """The source without one of its waits, arrivals or expected bytes, and what was taken away."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        called = (
            node.value.func
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            else None
        )
        if isinstance(called, ast.Attribute) and called.attr in ("wait", "arrive", "expect"):
            lines = SOURCE.splitlines()
            first, last = node.lineno - 1, node.end_lineno
            indent = lines[first][: node.col_offset]
            without = [*lines[:first], f"{indent}pass", *lines[last:]]
            yield f"{ast.unparse(node)[:60]}, line {node.lineno}", "\n".join(without)


TAKEN_AWAY = dict(barrier_statements())
CHANGED = {
    "one consumer frees a stage": ("empty = ring(STAGES, 2)", "empty = ring(STAGES, 1)"),
    "one consumer frees Q": ("q_empty = ring(Q_BUFFERS, 2)", "q_empty = ring(Q_BUFFERS, 1)"),
    "a turn of two arrivals": ("turns = ring(2, 1)", "turns = ring(2, 2)"),
    "the parity of a free stage": ("(visited // STAGES + 1) & 1", "(visited // STAGES) & 1"),
    "the parity of free Q": ("(taken // Q_BUFFERS + 1) & 1", "(taken // Q_BUFFERS) & 1"),
    "both begin": ("(visited + 1 - me) & 1", "(visited + 1) & 1"),
    "too few bytes": ("full.index(stage), 2 * BLOCK * DP", "full.index(stage), BLOCK * DP"),
    "a stage too far": ("before = (visited - 1) % STAGES", "before = visited % STAGES"),
    "no wait for the scores": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "no wait for P V": (
        "product = warpgroup_mma_wait(0, deps=(product,))",
        "product = warpgroup_mma_wait(1, deps=(product,))",
    ),
}


def found_by(source: str, stages: int = 3) -> str | None:
    """How soon the simulation fails, of tiles or of pairs, and how."""
    p = problem(LISTS)
    for seed in range(SCHEDULES):
        for pairs in (False, True):
            try:
                check(p, seed=1000 * seed, stages=stages, pairs=pairs, source=source)
            except ERRORS as error:
                return f"schedule {seed}, pairs {pairs}: {type(error).__name__}: {error}"
    return None


def test_there_are_barriers_to_take_away():
    assert len(TAKEN_AWAY) == SOURCE.count("mbarrier.wait(") + SOURCE.count(
        "mbarrier.arrive("
    ) + SOURCE.count("mbarrier.expect(")
    assert len(TAKEN_AWAY) > 20


@pytest.mark.parametrize("name", TAKEN_AWAY)
def test_every_wait_and_arrival_is_needed(name):
    assert found_by(TAKEN_AWAY[name]) is not None


@pytest.mark.parametrize("name", CHANGED)
def test_a_wrong_protocol_is_found(name):
    before, after = CHANGED[name]
    assert before in SOURCE
    assert found_by(SOURCE.replace(before, after)) is not None


def test_two_stages_are_too_few():
    with pytest.raises(AssertionError):  # the kernel says so itself
        run(problem(LISTS), stages=2)
    unchecked = SOURCE.replace("gl.static_assert(STAGES >= 3)", "pass")
    assert "Deadlock" in str(found_by(unchecked, stages=2))


def test_an_error_names_who_waits_and_for_what():
    unchecked = SOURCE.replace("gl.static_assert(STAGES >= 3)", "pass")
    with pytest.raises(Deadlock, match=r"attend_rows 0 waits for parity 1 of allocation \d\[0\]"):
        run(problem(LISTS), stages=2, source=unchecked)


# ---- the way from q, k and v


TILES, PAIRS = configs.HOPPER_GLUON[128]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch, config: configs.Config) -> Iterator[None]:
    """Packing in Triton's interpreter, then the Gluon kernel under the emulator."""
    if not interpreter.ACTIVE:
        pytest.skip("kernels are compiled here: TRITON_INTERPRET=0")
    monkeypatch.setattr(prologue, "CHUNKS", 3)

    def choose(kernel: str, *_: Any) -> configs.Config:
        return config if kernel in configs.GLUON else configs.INTERPRETED

    monkeypatch.setattr(tune, "choose", choose)
    with emulator.emulated(monkeypatch, launch, forward.attend, WHOLE):
        yield


SMALL = ((3, 5, 7), (3, 5, 4))


@pytest.mark.usefixtures("on_hopper", "uninitialised_memory_is_nan")
@pytest.mark.parametrize(
    ("config", "dim", "modes", "key_heads", "dtype", "masked"),
    [
        (TILES, 128, [[NEAR_FP8, NEAR]], 1, torch.bfloat16, 0.0),
        (TILES, 64, [[DENSE_FP8, WINDOW_FP8]], 2, torch.float32, 0.3),
        (PAIRS, 72, [[NEAR_FP8_BOX, WINDOW_FP8_HEAD]], 2, torch.float32, 0.0),
        (PAIRS, 40, [[DENSE_FP8]], 1, torch.float32, 1.0),
    ],
    ids=["both kinds", "masked", "pairs", "nothing to see"],
)
def test_a_call_against_the_reference(dim, modes, key_heads, dtype, masked):
    """Grouped heads, masks, padded head dims, shared scales, and what backward is left."""
    t = tables(*SMALL, modes, prefix=3)
    q, k, v = qkv(t, dim=dim, key_heads=key_heads, dtype=dtype)
    mask = torch.rand(len(modes), t.tokens) >= masked if masked else None
    rest = (*t.forward, mask, 0.2, 3 if NEAR in modes[0] else 2)
    out, lse, saved = gluon.forward(q, k, v, *rest)
    expected_out, expected_lse, _ = reference.forward(q, k, v, *rest[:-1])
    assert out.transpose(1, 2).is_contiguous() and out.dtype == dtype
    seen = expected_lse.isfinite()
    assert torch.equal(lse[~seen], expected_lse[~seen])
    if masked == 1.0:
        assert not seen.any() and not out.any()
        return
    assert relative_rms(lse[seen], expected_lse[seen]) <= TRITON_FP32
    limit = KERNEL_FP8 if dtype == torch.float32 else TRITON_BF16
    assert relative_rms(out, expected_out) <= limit

    same, same_lse, others = attention.forward(q, k, v, *rest)
    assert relative_rms(out, same) <= KERNEL_HALF
    assert relative_rms(lse[seen], same_lse[seen]) <= TRITON_FP32
    for one, other in zip(saved, others, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("config", [TILES], ids=["tiles"])
def test_a_permuted_v_is_refused(monkeypatch):
    t = tables(*SMALL, [[NEAR_FP8]])
    monkeypatch.setattr(tune, "PERMUTE_V", True)
    with pytest.raises(ValueError, match="v: expected in order for the Gluon kernel"):
        gluon.forward(*qkv(t, dim=64), *t.forward, None, 0.2, 2)


def test_descriptors_are_what_a_device_takes():
    """Strides of 16 bytes, rows of the swizzle's width: `TensorDescriptor` looks at the rest."""
    for dp in configs.GLUON_HEAD_DIMS:
        tiles = prologue.Tiles(*(torch.randn(1, 2, 3, 128, dp).to(E4M3) for _ in range(3)))
        tiles = tiles._replace(v=tiles.v.reshape(1, 2, dp, 3 * 128))
        q, k, v = launch.descriptors(tiles)
        for one in (q, k, v):
            assert isinstance(one, TensorDescriptor)
            assert all(stride % 16 == 0 for stride in one.strides[:-1])
            assert one.layout.swizzle_byte_width == one.block_shape[-1] in (64, 128)
        halves = [k.base[:32, bit].reshape(32, 2, dp).float() for bit in range(2)]
        whole = torch.stack(halves, 1).reshape(128, dp)
        assert torch.equal(whole, tiles.k[0, 0, 0].float()), "two copies are a tile"


def test_random_is_seeded():
    """A schedule that fails is found again by its number."""
    p = problem(LISTS)
    a, b = run(p, seed=7)[-1], run(p, seed=7)[-1]
    assert a == b
