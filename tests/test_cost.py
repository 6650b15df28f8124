"""The cost of a device: when the last item ends, what a fit finds, what is refused."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsc import cost
from fpsc.cost import DeviceCost, Dtype, Heads, Kind, Load, Measurement, load_of, makespan
from fpsc.errors import UserError
from fpsc.grid import layout, plan_tile
from fpsc.policy.patterns import Pattern, lists

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132,
    clock_rate=1_980_000, memory_clock_rate=3_201_000, memory_bus_width=6144,
)  # fmt: skip

Runs = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 60)),
    min_size=1,
    max_size=8,
    unique_by=lambda run: run[0],
)


def arrays(runs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    costs, counts = (np.array(column) for column in zip(*runs, strict=True))
    return costs.astype(float), counts


def one_by_one(costs: np.ndarray, counts: np.ndarray, workers: int) -> float:
    """The same by what the words say."""
    free = [0.0] * workers
    for item in sorted(np.repeat(costs, counts), reverse=True):
        heapq.heapreplace(free, free[0] + float(item))
    return max(free)


@given(Runs, st.integers(1, 20))
def test_the_last_item_ends_when_it_would_one_by_one(
    runs: list[tuple[int, int]], workers: int
) -> None:
    found = makespan(*arrays(runs), workers)
    assert found == pytest.approx(one_by_one(*arrays(runs), workers))


@given(Runs, st.integers(1, 200), st.floats(1e-9, 1e3))
def test_the_end_is_bounded_by_sum_and_longest(
    runs: list[tuple[int, int]], workers: int, unit: float
) -> None:
    costs, counts = arrays(runs)
    costs *= unit
    share, longest = float((costs * counts).sum()) / workers, float(costs.max())
    found = makespan(costs, counts, workers)
    assert max(share, longest) <= found * (1 + 1e-9)
    assert found <= (share + longest) * (1 + 1e-9)


@given(Runs, st.integers(1, 20), st.data())
def test_an_item_that_costs_more_never_ends_all_earlier(
    runs: list[tuple[int, int]], workers: int, data: st.DataObject
) -> None:
    costs, counts = arrays(runs)
    at = data.draw(st.integers(0, len(costs) - 1))
    more = costs.copy()
    more[at] += data.draw(st.floats(0, 30))
    before = makespan(costs, counts, workers)
    assert before <= makespan(more, counts, workers) * (1 + 1e-9)
    assert before <= makespan(costs, counts + 1, workers) * (1 + 1e-9)


GRID = (9, 20, 24)


def visits(keep: float, text: int = 0) -> np.ndarray:
    tiles = layout(GRID, plan_tile(GRID), suffix=text)
    pattern = Pattern("near", keep) if keep < 1 else Pattern("dense")
    return np.diff(lists(pattern, tiles)[0].numpy())


def load(keep: float, heads: int, dtype: Dtype = "fp8", text: int = 0) -> Load:
    tokens = layout(GRID, plan_tile(GRID), suffix=text).tokens
    return load_of([Heads(dtype, visits(keep, text), heads)], tokens, 128)


MODEL = DeviceCost(
    device="made up",
    source="measured",
    workers=132,
    head_dim=128,
    overhead=30e-6,
    bandwidth=4e12,
    kinds={"bf16": Kind(item=3e-6, tile=1.2e-6), "fp8": Kind(item=2e-6, tile=0.7e-6)},
)


@settings(max_examples=30)
@given(
    st.lists(st.floats(0.05, 1), min_size=2, max_size=2),
    st.integers(1, 40),
    st.sampled_from(cost.DTYPES),
)
def test_more_keep_never_takes_less(keeps: list[float], heads: int, dtype: Dtype) -> None:
    few, many = (MODEL.seconds(load(keep, heads, dtype)) for keep in sorted(keeps))
    assert few <= many * (1 + 1e-9)


def test_a_load_counts_heads_and_bytes() -> None:
    near = visits(0.25)
    heads = [Heads("bf16", visits(1.0), 3), Heads("fp8", near, 2), Heads("fp8", near, 1)]
    found = load_of(heads, 1000, 64)
    of_dense, counts = found.items["bf16"]
    n = len(visits(1.0))
    assert of_dense.tolist() == [n] and counts.tolist() == [3 * n]
    assert found.items["fp8"][1].sum() == 3 * n
    # q, k and v in and out; of fp8 cells out in one byte, and k and v read twice.
    assert found.bytes == 1000 * 64 * 3 * (12 + 13)


def test_cells_of_both_kinds_wait_for_each_other() -> None:
    both = load_of([Heads("bf16", visits(1.0), 1), Heads("fp8", visits(1.0), 1)], 10, 128)
    alone = [load_of([Heads(d, visits(1.0), 1)], 10, 128) for d in cost.DTYPES]
    assert MODEL.seconds(both) + MODEL.overhead == pytest.approx(sum(map(MODEL.seconds, alone)))


def measurements(noise: float, seed: int, text: int = 0) -> list[Measurement]:
    draw = np.random.default_rng(seed)
    found = []
    for dtype in cost.DTYPES:
        for heads in (2, 8, 40):
            for keep in (1.0, 0.5, 0.35, 0.25, 0.125):
                one = load(keep, heads, dtype, text)
                seconds = MODEL.seconds(one) * float(np.exp(draw.normal(0, noise)))
                held_out = keep == 0.35
                found.append(Measurement(f"{dtype} {heads} {keep}", one, seconds, held_out))
    return found


def fitted(found: list[Measurement]) -> DeviceCost:
    return cost.fit(found, device="made up", workers=132, bandwidth=4e12)


@pytest.mark.parametrize("text", [0, 200])
def test_a_fit_finds_what_the_times_were_made_of(text: int) -> None:
    found = fitted(measurements(0.0, 0, text))
    assert found.overhead == pytest.approx(MODEL.overhead, rel=1e-3)
    for dtype, kind in MODEL.kinds.items():
        assert found.kinds[dtype].tile == pytest.approx(kind.tile, rel=1e-3)
        assert found.kinds[dtype].item == pytest.approx(kind.item, rel=1e-2)
    assert found.fit_error < 1e-3 and found.held_out_error is not None
    assert found.held_out_error < 1e-3 and found.refusal is None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_noise_moves_a_fit_by_about_itself(seed: int) -> None:
    found = fitted(measurements(0.02, seed))
    for dtype, kind in MODEL.kinds.items():
        assert found.kinds[dtype].tile == pytest.approx(kind.tile, rel=0.08)
        assert min(found.overhead, *(k.item for k in found.kinds.values())) >= 0
    # What was not measured: another keep, and heads of both kinds.
    mixed = load_of([Heads("bf16", visits(0.7), 10), Heads("fp8", visits(0.2), 30)], 4320, 128)
    assert found.seconds(mixed) == pytest.approx(MODEL.seconds(mixed), rel=0.05)


@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=4, max_size=7),
    st.lists(st.floats(-1, 1), min_size=7, max_size=7),
    st.lists(st.floats(0, 2), min_size=3, max_size=3),
)
def test_nothing_that_is_not_negative_fits_better(
    rows: list[list[float]], wanted: list[float], other: list[float]
) -> None:
    columns, y = np.array(rows), np.array(wanted[: len(rows)])
    found = cost.nonnegative(columns, y)
    assert (found >= 0).all()
    least = ((columns @ found - y) ** 2).sum()
    assert least <= ((columns @ np.array(other) - y) ** 2).sum() + 1e-9


def test_a_bad_fit_is_refused_and_says_why(tmp_path: Path) -> None:
    scattered = fitted(measurements(0.6, 1))
    assert scattered.refusal is not None and "held out" in scattered.refusal
    scattered.save(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"predicted wrong by \d+%, more than 25%; measure again"):
        DeviceCost.load(tmp_path / "bad.json")
    alone = [m for m in measurements(0.0, 0) if not m.held_out]
    assert "nothing says how well" in (fitted(alone).refusal or "")


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    found = fitted(measurements(0.01, 3))
    path = tmp_path / "there" / "device.json"
    found.save(path)
    assert DeviceCost.load(path) == found
    assert "measured, held-out error" in str(found)
    path.write_text(json.dumps({"format": "fpsc-device-cost-1", "device": "x"}))
    with pytest.raises(UserError, match="cannot be read as the cost of a device"):
        DeviceCost.load(path)
    with pytest.raises(UserError, match="fpsc bench device"):
        DeviceCost.load(tmp_path / "none.json")


def test_what_the_model_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match="head dim 128, and this attention has 64"):
        MODEL.seconds(load_of([Heads("fp8", visits(1.0), 1)], 10, 64))
    only = MODEL.model_copy(update={"kinds": {"bf16": Kind(item=0, tile=1)}})
    with pytest.raises(ValueError, match="fp8 cells on made up is not known, only of bf16"):
        only.seconds(load(1.0, 1))
    with pytest.raises(ValueError, match="not held out"):
        fitted([])


def test_an_estimate_says_that_it_is_one() -> None:
    found = cost.roofline(H200, 128)
    assert found.source == "estimate" and "not measured" in str(found) and found.refusal is None
    # 132 x 8192 operations in a clock are 2.1 PFLOP/s at this clock, the data sheet's 1979 at less.
    rate = 132 * 4 * 128**3 / found.kinds["fp8"].tile
    assert rate == pytest.approx(132 * 8192 * 1.98e9)
    assert found.bandwidth == pytest.approx(4.9e12, rel=0.01)
    # Half the products, as many exponentials: at head dim 64 these are the bound of FP8.
    half = cost.roofline(H200, 64).kinds
    assert half["fp8"].tile == half["bf16"].tile == found.kinds["fp8"].tile


def test_no_estimate_where_a_device_does_not_say_enough() -> None:
    older = SimpleNamespace(**{**vars(H200), "name": "Tesla V100", "major": 7})
    with pytest.raises(ValueError, match=r"Tesla V100 \(.* 7.0\) has no known rate"):
        cost.roofline(older, 128)
    silent = SimpleNamespace(**{**vars(H200), "clock_rate": 0})
    with pytest.raises(ValueError, match="fpsc bench device"):
        cost.roofline(silent, 128)
    ampere = SimpleNamespace(**{**vars(H200), "major": 8})
    assert list(cost.roofline(ampere, 128).kinds) == ["bf16"]
