"""From a policy to the table and the plan."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsc.grid import layout
from fpsc.kernels.rows import row_index
from fpsc.policy import Policy, PolicyError, Table, find, plan, resolve
from fpsc.policy.patterns import Pattern, lists
from fpsc.policy.resolve import GROUPINGS, MODES, PATTERNS, ROWS, kinds_of, work_order
from fpsc.policy.values import NoiseRange

LAYERS, HEADS = 5, 4
MODE_NAMES = ["dense", "half", "window", "half8"]
MODE_VALUES = {
    "dense": {"keep": 1.0},
    "half": {"pattern": "near", "keep": 0.5},
    "window": {"pattern": "window", "window": [3, 3, 1], "dtype": "fp8"},
    "half8": {"pattern": "near", "keep": 0.5, "dtype": "fp8"},
}


def policy(
    schedule=("1..0.9 dense", "0.9..0.4 half8", "0.4..0 window"), rules=(), **more
) -> Policy:
    phases = [dict(zip(("noise", "use"), p.split(), strict=True)) for p in schedule]
    return Policy.from_dict(
        {"fpsc": 1, "modes": MODE_VALUES, "schedule": phases, "except": list(rules), **more}
    )


levels = st.integers(0, 20).map(lambda n: n / 20)
noise_ranges = st.lists(levels, min_size=2, max_size=2, unique=True).map(
    lambda ends: NoiseRange(max(ends), min(ends))
)
layer_spans = st.one_of(
    st.integers(0, LAYERS - 1),
    st.lists(st.integers(0, LAYERS - 1), min_size=2, max_size=2).map(
        lambda ends: f"{min(ends)}..{max(ends)}"
    ),
    st.lists(st.integers(0, HEADS - 1), min_size=1, max_size=3),
)
head_spans = st.integers(0, HEADS - 1) | st.lists(st.integers(0, HEADS - 1), min_size=1, max_size=3)


@st.composite
def rules(draw: st.DrawFn) -> dict:
    rule = {
        "layers": draw(layer_spans),
        "heads": draw(head_spans),
        "noise": str(draw(noise_ranges)),
    }
    used = draw(st.sets(st.sampled_from(sorted(rule)), min_size=1))
    return {k: rule[k] for k in used} | {"use": draw(st.sampled_from(MODE_NAMES))}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    inner = draw(st.lists(st.integers(1, 19), max_size=5, unique=True))
    ends = [1.0, *(n / 20 for n in sorted(inner, reverse=True)), 0.0]
    schedule = [f"{hi}..{lo} {draw(st.sampled_from(MODE_NAMES))}" for hi, lo in pairwise(ends)]
    return policy(schedule, draw(st.lists(rules(), max_size=5)))


def covers(noise: NoiseRange | None, level: float) -> bool:
    """The half-open rule: the first number is in, the second is not, but 0 is."""
    return noise is None or noise.lo < level <= noise.hi or level == noise.lo == 0


def inside(spans, n: int) -> bool:
    return spans is None or any(s.first <= n <= s.last for s in spans)


@given(policies(), st.lists(st.floats(0, 1) | levels, min_size=1, max_size=8))
@settings(max_examples=100)
def test_the_table_says_what_a_reader_of_the_file_would(p: Policy, noises: list[float]) -> None:
    """Every cell and its explanation, against the rules applied one by one."""
    table = resolve(p, layers=LAYERS, heads=HEADS, fp8=True)
    for noise in noises:
        if any(0 < abs(noise - float(e)) <= 2e-6 for e in table.edges[: table.n_rows - 1]):
            continue  # within the tolerance of an edge either side is right
        row = table.row_of(noise)
        assert covers(table.noise_ranges[row], noise)
        for layer in range(LAYERS):
            for head in range(HEADS):
                (phase,) = [x for x in p.schedule if covers(x.noise, noise)]
                expected, place = phase.use, f"schedule[{p.schedule.index(phase)}]"
                for i, rule in enumerate(p.rules):
                    if (
                        inside(rule.layers, layer)
                        and inside(rule.heads, head)
                        and covers(rule.noise, noise)
                    ):
                        expected, place = rule.use, f"except[{i}]"
                assert table.mode_names[table.cells[layer, row, head]] == expected
                cell = table.describe(row, layer, head)
                assert (cell.mode, cell.rule) == (expected, place)
                assert table.lines(row, layer, head)[-1] == cell


def row_by_contract(table: Table, noise: float) -> int:
    """The rule that every kernel and hook follows, with nothing of the table but its edges."""
    return sum(1 for edge in table.edges if np.float32(noise) <= edge.item() + 1e-6)


@given(policies(), st.lists(st.floats(0, 1) | levels, min_size=1, max_size=20))
def test_rows_agree_however_they_are_computed(p: Policy, noises: list[float]) -> None:
    table = resolve(p, layers=1 + LAYERS, heads=HEADS, fp8=True)
    near_an_edge = {
        n for n in noises if any(5e-7 < abs(n - float(e)) < 2e-6 for e in table.edges[:-1])
    }
    noises = [n for n in noises if n not in near_an_edge] or [0.5]
    rows = [table.row_of(n) for n in noises]
    assert rows == [row_by_contract(table, n) for n in noises]
    assert rows == row_index(torch.tensor(noises), table.edges).tolist()
    assert rows == row_index(torch.tensor(noises, dtype=torch.float64), table.edges).tolist()
    assert max(rows) < table.n_rows


def test_shapes_are_capacities() -> None:
    for p in (find("dense"), policy()):
        table = resolve(p, layers=LAYERS, heads=HEADS, fp8=True)
        assert (table.edges.shape, table.edges.dtype) == ((ROWS,), torch.float32)
        assert (table.cells.shape, table.cells.dtype) == ((LAYERS, ROWS, HEADS), torch.int32)
        assert (table.modes.shape, table.modes.dtype) == ((MODES, 3), torch.int32)
        assert table.cells.is_contiguous()


def test_rows_edges_and_padding() -> None:
    table = resolve(policy(), layers=2, heads=3, fp8=True)
    assert table.n_rows == 3
    assert table.noise_ranges == [(1.0, 0.9), (0.9, 0.4), (0.4, 0.0)]
    assert table.edges[:2].tolist() == pytest.approx([0.9, 0.4])
    assert (table.edges[2:] == -1).all()
    assert (table.cells[:, 3:] == table.cells[:, 2:3]).all()
    assert table.mode_names == MODE_NAMES
    assert table.cells[0, :3, 0].tolist() == [0, 3, 2]


def test_half_open_edges() -> None:
    table = resolve(policy(), layers=1, heads=1, fp8=True)
    expected = {1.0: 0, 0.91: 0, 0.9: 1, 0.9 + 5e-7: 1, 0.41: 1, 0.4: 2, 0.001: 2, 0.0: 2}
    assert {n: table.row_of(n) for n in expected} == expected


@pytest.mark.parametrize("noise", [-0.5, 1.5, float("nan"), float("inf")])
def test_noise_outside_its_scale(noise: float) -> None:
    table = resolve(policy(), layers=1, heads=1, fp8=True)
    with pytest.raises(ValueError, match=r"noise lies between 0 \(clean\) and 1 \(pure noise\)"):
        table.row_of(noise)
    assert 0 <= int(row_index(torch.tensor([noise]), table.edges)) < table.n_rows


def test_rules_cut_rows_at_their_own_edges() -> None:
    p = policy(rules=[{"noise": "0.95..0.2", "layers": 0, "use": "half"}])
    table = resolve(p, layers=2, heads=1, fp8=True)
    assert table.noise_ranges == [(1, 0.95), (0.95, 0.9), (0.9, 0.4), (0.4, 0.2), (0.2, 0)]
    assert table.cells[0, :5, 0].tolist() == [0, 1, 1, 1, 2]
    assert table.cells[1, :5, 0].tolist() == [0, 0, 3, 2, 2]


def test_ranges_of_layers_include_both_ends() -> None:
    p = policy(["1..0 dense"], rules=[{"layers": "1..3", "heads": [0, "2..3"], "use": "half"}])
    table = resolve(p, layers=5, heads=4, fp8=True)
    assert table.cells[:, 0].tolist() == [[0] * 4, *[[1, 0, 1, 1]] * 3, [0] * 4]


def test_fp8_modes_without_fp8() -> None:
    with_fp8 = resolve(policy(), layers=1, heads=1, fp8=True)
    without = resolve(policy(), layers=1, heads=1, fp8=False)
    assert with_fp8.modes[:4, :2].tolist() == [[0, 0], [1, 0], [2, 1], [1, 1]]
    assert without.modes[:4, :2].tolist() == [[0, 0], [1, 0], [2, 0], [1, 0]]
    assert [kinds_of(policy(), fp8) for fp8 in (True, False)] == [3, 1]
    assert kinds_of(find("dense"), True) == 1
    assert torch.equal(with_fp8.cells, without.cells)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            "{layers: [0, 30], use: dense}",
            "p:7:14: except[0].layers: layer 30 does not exist; the model has 30 layers (0..29)",
        ),
        (
            "{heads: 10..12, use: dense}",
            "p:7:13: except[0].heads: head 12 does not exist; the model has 12 heads (0..11)",
        ),
    ],
    ids=["layer", "head"],
)
def test_a_policy_for_another_number_of_layers_or_heads(tmp_path, rule: str, expected: str) -> None:
    text = "fpsc: 1\nmodes:\n  dense: {keep: 1.0}\nschedule:\n  - {noise: 1..0, use: dense}\n"
    path = tmp_path / "p"
    path.write_text(f"{text}except:\n  - {rule}\n")
    with pytest.raises(PolicyError) as caught:
        resolve(Policy.load(path), layers=30, heads=12, fp8=True)
    assert str(caught.value) == f"{tmp_path}/{expected}"


def test_describe_names_the_line_that_won(tmp_path) -> None:
    text = find("generic").document.text + "except:\n  - {layers: 0, use: dense}\n"
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    line = text.splitlines().index("  - {layers: 0, use: dense}") + 1
    table = resolve(Policy.load(path), layers=2, heads=2, fp8=True)
    assert table.describe(2, 0, 1) == ("dense", (0.4, 0.0), f"{path}:{line} except[0]")
    assert table.describe(2, 1, 1).mode == "fast"
    assert table.describe(2, 1, 1).rule.endswith(" schedule[2]")
    for index in ((3, 0, 0), (0, 2, 0), (0, 0, -1)):
        with pytest.raises(IndexError, match=r"^no (row 3|layer 2|head -1): the table has"):
            table.describe(*index)


def test_the_densest_row() -> None:
    assert resolve(policy(), layers=2, heads=2, fp8=True).densest == 0
    late = policy(["1..0.9 window", "0.9..0.4 half", "0.4..0 dense"])
    assert resolve(late, layers=2, heads=2, fp8=True).densest == 2
    # One dense head outweighs nothing else in the row.
    ruled = policy(
        ["1..0.5 half", "0.5..0 half"], [{"noise": "0.5..0", "heads": 0, "use": "dense"}]
    )
    assert resolve(ruled, layers=2, heads=2, fp8=True).densest == 1
    # Of equal keep, the one with less FP8; then the noisiest.
    mixed = policy(["1..0.6 half8", "0.6..0.3 half", "0.3..0 half"])
    assert resolve(mixed, layers=2, heads=2, fp8=True).densest == 1
    assert resolve(mixed, layers=2, heads=2, fp8=False).densest == 0


KEY_EDITS = [
    {"modes.half.keep": 0.9},
    {"modes.half.keep": 1.0},
    {"modes.window.window": [1, 2, 3]},
    {"modes.half": {"pattern": "radial", "keep": 0.3}},
    {"modes.window.scales": {"qk": [2, 2, 2]}},
    {"schedule": [{"noise": "1..0", "use": "half8"}]},
    {"schedule.0.noise": "1..0.8", "schedule.1.noise": "0.8..0.4"},
    {"except": [{"layers": 0, "use": "window"}]},
    {"except": [{"heads": [1], "noise": "0.7..0.3", "use": "half8"}]},
    {"name": "other", "limits": {"min_tokens": 7}},
]


@pytest.mark.parametrize("change", KEY_EDITS, ids=str)
def test_numbers_do_not_enter_the_structure(change: dict) -> None:
    before = resolve(policy(), layers=2, heads=2, fp8=True)
    after = resolve(policy().with_values(change), layers=2, heads=2, fp8=True)
    assert after.structure_key() == before.structure_key()
    assert after.cells.shape == before.cells.shape
    lay = layout((5, 6, 7), (2, 3, 4))
    assert (
        plan(policy().with_values(change), lay).list_ptr.shape == plan(policy(), lay).list_ptr.shape
    )


def test_structure_enters_the_structure() -> None:
    def key(p: Policy, fp8: bool = True) -> str:
        return resolve(p, layers=2, heads=2, fp8=fp8).structure_key()

    modes = {"dense": {"keep": 1.0}, "half": {"pattern": "near", "keep": 0.5}}
    bf16 = Policy.from_dict(
        {"fpsc": 1, "modes": modes, "schedule": [{"noise": "1..0", "use": "dense"}]}
    )
    keys = [
        key(policy()),
        key(policy(), fp8=False),
        key(policy().with_values({"tile": [3, 5, 8]})),
        key(policy().with_values({"tile": [5, 3, 8]})),
    ]
    assert len(set(keys)) == len(keys)
    assert key(bf16) == key(policy(), fp8=False) == key(bf16, fp8=False)


@pytest.mark.parametrize("texts", [(0, 0), (130, 7)], ids=["video", "joint"])
def test_a_plan_holds_every_pattern_once(texts: tuple[int, int]) -> None:
    p, lay = policy(), layout((7, 20, 30), (2, 5, 6), *texts)
    found = plan(p, lay)
    table = resolve(p, layers=1, heads=1, fp8=True)
    assert (found.list_ptr.shape, found.list_ptr.dtype) == (
        (PATTERNS, lay.n_tiles + 1),
        torch.int32,
    )
    assert (found.list_idx.ndim, found.list_idx.dtype) == (1, torch.int32)
    assert found.list_ptr[PATTERNS - 1, -1] == len(found.list_idx), "nothing is stored unused"
    assert found.gather is lay.gather
    assert found.valid is lay.valid
    for name, (pattern, *_) in zip(table.mode_names, table.modes.tolist(), strict=False):
        ptr, idx = lists(p.modes[name], lay)
        start, stop = found.list_ptr[pattern, 0], found.list_ptr[pattern, -1]
        assert torch.equal(found.list_ptr[pattern] - start, ptr)
        assert torch.equal(found.list_idx[start:stop], idx)
    assert (found.list_ptr[3:] == found.list_ptr[2]).all(), "padding repeats the last pattern"


def every_pattern(**more) -> Policy:
    """One mode for each kind of pattern, most of which are not symmetric."""
    modes = {
        "near": {"pattern": "near", "keep": 0.37, "weights": [2, 1, 1]},
        "window": {"pattern": "window", "window": [2, 3, 1], "dtype": "fp8"},
        "frame": {"pattern": "frame", "keep": 0.3},
        "radial": {"pattern": "radial", "keep": 0.2},
        "explicit": {"pattern": "explicit", "offsets": [[0, 0, 1], [1, 0, 0], [0, -2, 1]]},
    }
    schedule = [{"noise": "1..0", "use": "near"}]
    return Policy.from_dict({"fpsc": 1, "modes": modes, "schedule": schedule, **more})


@pytest.mark.parametrize("texts", [(0, 0), (130, 7)], ids=["video", "joint"])
def test_the_lists_back_are_the_transpose(texts: tuple[int, int]) -> None:
    lay = layout((7, 20, 30), (2, 5, 6), *texts)
    found = plan(every_pattern(), lay)
    n = lay.n_tiles

    def matrix(ptr: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros(n, n, dtype=torch.bool)
        for tile, (start, stop) in enumerate(pairwise(ptr.tolist())):
            entries = idx[start:stop].tolist()
            assert entries == sorted(set(entries))
            seen[tile, entries] = True
        return seen

    assert found.back_ptr.shape == found.list_ptr.shape and found.back_ptr.dtype == torch.int32
    assert found.back_idx.shape == found.list_idx.shape and found.back_idx.dtype == torch.int32
    lopsided = 0
    for pattern in range(PATTERNS):
        seen = matrix(found.list_ptr[pattern], found.list_idx)
        assert torch.equal(matrix(found.back_ptr[pattern], found.back_idx), seen.T)
        lopsided += not torch.equal(seen, seen.T)
    assert lopsided > 0, "a symmetric pattern shows nothing"


def test_long_lists_come_first_in_the_order() -> None:
    lay = layout((7, 20, 30), (2, 5, 6), 130, 7)
    found = plan(every_pattern(), lay)
    assert (found.order.shape, found.order.dtype) == ((PATTERNS, lay.n_tiles), torch.int32)
    for order, ptr in zip(found.order.tolist(), found.list_ptr, strict=True):
        lengths = ptr.diff().tolist()
        assert sorted(order) == list(range(lay.n_tiles))
        assert order == sorted(order, key=lambda u: -lengths[u].bit_length())
    assert found.order[0, :3].tolist() == [0, 1, lay.n_tiles - 1], "text sees everything"


def test_tiles_of_a_class_go_along_the_axis_of_which_they_see_least() -> None:
    lay = layout((4, 12, 16), (2, 6, 8), 5)  # a tile of text, then 2 x 2 x 2 of video
    lengths = [1, 0, 1, 2, 4, 4, 8, 8, 1]
    ptr, idx = np.cumsum([0, *lengths]), np.full(29, 8)  # the middle sees itself: a part of each
    assert work_order(ptr, idx, lay).tolist() == [6, 7, 4, 5, 3, 2, 8, 0, 1]
    lay = layout((8, 24, 40), (2, 6, 8), 130, 3)  # 4 x 4 x 5
    video = np.arange(80)
    t, y, x = np.unravel_index(video, (4, 4, 5))
    for pattern, axes in (
        (Pattern("frame"), (t, y, x)),  # one slab in time, all of the picture
        (Pattern("column"), (x, y, t)),  # the other way round
        (Pattern("window", window=(4, 1, 3)), (y, x, t)),
        (Pattern("near", keep=0.3), (x, y, t)),  # a ball of tokens: 40 of them are most
    ):
        ptr, idx = (each.numpy() for each in lists(pattern, lay))
        order = work_order(ptr, idx, lay)
        expected = np.lexsort(axes[::-1])
        assert order.tolist() == [0, 1, 82, *(2 + expected)], pattern


def test_modes_share_scales_as_the_policy_says() -> None:
    scales = ["tile", [1, 1, 1], [2, 3, 2], "head", [2, 3, 2], [9, 9, 9]]
    modes = {
        f"m{i}": {"keep": 1.0, "dtype": "fp8", "scales": {"qk": qk}} for i, qk in enumerate(scales)
    }
    p = Policy.from_dict({"fpsc": 1, "modes": modes, "schedule": [{"noise": "1..0", "use": "m0"}]})
    table = resolve(p, layers=1, heads=1, fp8=True)
    assert table.modes[: len(scales), 2].tolist() == [0, 0, 1, 2, 1, 3]

    lay = layout((7, 20, 30), (2, 5, 6), 130, 7)  # 4 x 4 x 5 tiles, 2 of text before, 1 after
    groups = plan(p, lay).groups
    assert (groups.shape, groups.dtype) == ((GROUPINGS, lay.n_tiles), torch.int32)
    assert groups[0].tolist() == list(range(lay.n_tiles))
    for row, (t, y, x) in {1: (2, 3, 2), 2: (4, 4, 5), 3: (9, 9, 9)}.items():
        expected = [0, 1]
        for tile in range(4 * 4 * 5):
            a, b, c = tile // 20, tile // 5 % 4, tile % 5
            expected.append(2 + (a - a % t) * 20 + (b - b % y) * 5 + c - c % x)
        assert groups[row].tolist() == [*expected, 82]
    assert (groups[4:] == groups[3]).all(), "padding repeats the last grouping"


def test_granularities_by_name_are_boxes_of_tiles() -> None:
    sizes = {"fine": "tile", "intermediate": [2, 2, 2], "coarse": [4, 4, 4]}
    modes = {}
    for name, box in sizes.items():
        modes[name] = {"dtype": "fp8", "scales": {"qk": name}}
        modes[f"{name}-box"] = {"dtype": "fp8", "scales": {"qk": box}}
    p = Policy.from_dict(
        {"fpsc": 1, "modes": modes, "schedule": [{"noise": "1..0", "use": "fine"}]}
    )
    table = resolve(p, layers=1, heads=1, fp8=True)
    assert table.modes[: len(modes), 2].tolist() == [0, 0, 1, 1, 2, 2]
    groups = plan(p, layout((7, 40, 60), (2, 5, 6))).groups  # 4 x 8 x 10 tiles
    assert [len(row.unique()) for row in groups[:3]] == [320, 2 * 4 * 5, 1 * 2 * 3]


def test_lists_of_another_grid_are_refused_with_their_line(tmp_path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "fpsc: 1\nmodes:\n  own: {pattern: explicit, lists: [[0], [1]]}\n"
        "schedule:\n  - {noise: 1..0, use: own}\n"
    )
    with pytest.raises(PolicyError, match=r"p\.yaml:3:35: modes\.own\.lists: 2 lists, for as many"):
        plan(Policy.load(path), layout((7, 20, 30), (2, 5, 6)))


def test_as_many_groupings_as_modes() -> None:
    modes = {f"m{i}": {"dtype": "fp8", "scales": {"qk": [1, 1, 2 + i]}} for i in range(MODES)}
    p = Policy.from_dict({"fpsc": 1, "modes": modes, "schedule": [{"noise": "1..0", "use": "m0"}]})
    groups = plan(p, layout((1, 1, 200), (1, 1, 2))).groups
    table = resolve(p, layers=1, heads=1, fp8=True)
    assert table.modes[:, 2].tolist() == list(range(1, MODES + 1))
    for i in range(MODES):
        assert len(groups[i + 1].unique()) == -(-100 // (2 + i))


def test_keep_counts_video_tiles_only() -> None:
    p = policy()
    tiles = 4 * 4 * 5
    expected = [1.0, 0.5, 3 * 3 * 1 / tiles, 0.5]
    for texts in ((0, 0), (500, 77)):
        keep = plan(p, layout((7, 20, 30), (2, 5, 6), *texts)).keep
        assert keep.dtype == torch.float32
        assert keep[:4].tolist() == pytest.approx(expected)
        assert (keep[4:] == 0).all()


def test_the_keep_of_a_row_is_the_mean_of_its_cells() -> None:
    p = policy(rules=[{"layers": 0, "noise": "0.9..0.4", "use": "dense"}])
    lay = layout((7, 20, 30), (2, 5, 6))
    table = resolve(p, layers=4, heads=3, fp8=True)
    assert table.keep(plan(p, lay)) == pytest.approx([1.0, (1 + 3 * 0.5) / 4, 9 / 80])


def test_tensors_are_ordinary_under_inference_mode() -> None:
    with torch.inference_mode():
        table = resolve(policy(), layers=1, heads=1, fp8=True)
        found = plan(policy(), layout((5, 7, 11), (2, 3, 4)))
    tensors = [table.edges, table.cells, table.modes]
    tensors += [x for x in vars(found).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 12
    assert not any(t.is_inference() for t in tensors)


def test_a_large_policy_resolves_in_less_than_a_second_and_64_mib() -> None:
    kinds = ["near", "radial", "frame", "column"]
    modes = {f"m{i}": {"pattern": kinds[i % 4], "keep": 0.2 + i / 20} for i in range(8)}
    schedule = [{"noise": f"{1 - i / 8}..{1 - (i + 1) / 8}", "use": f"m{i}"} for i in range(8)]
    exceptions = [{"layers": i, "heads": "0..9", "use": f"m{i % 8}"} for i in range(40)]
    p = Policy.from_dict({"fpsc": 1, "modes": modes, "schedule": schedule, "except": exceptions})
    lay = layout((21, 45, 80), p.tile_for((21, 45, 80)))
    start = time.perf_counter()
    table = resolve(p, layers=40, heads=40, fp8=True)
    found = plan(p, lay)
    assert time.perf_counter() - start < 1
    tensors = (table.edges, table.cells, table.modes, *vars(found).values())
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    assert size < 64 << 20
