"""Keep and work, counted from lists, against counting pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsc.cost import DeviceCost, Kind
from fpsc.grid import BLOCK, TokenGrid, layout
from fpsc.policy import Policy, PolicyError, find
from fpsc.policy.accounting import account, predicted
from fpsc.policy.models import MODELS, ModelSize
from fpsc.policy.patterns import lists

SMALL = ModelSize("small", 3, 2, 16, TokenGrid(5, 9, 14), ffn=64, text=7, joint=True)

MODES = {
    "dense": {"keep": 1.0},
    "near": {"pattern": "near", "keep": 0.4, "dtype": "fp8"},
    "window": {"pattern": "window", "window": [1, 2, 3]},
    "cross": {"pattern": "explicit", "offsets": [[0, 1, 0], [1, 0, 0]], "dtype": "fp8"},
}


def policy(rules=(), **more) -> Policy:
    return Policy.from_dict(
        {
            "fpsc": 1,
            "tile": [2, 3, 4],
            "modes": MODES,
            "schedule": [{"noise": "1..0.5", "use": "near"}, {"noise": "0.5..0", "use": "window"}],
            "except": list(rules),
            "limits": {"min_tokens": 0},
            **more,
        }
    )


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 14)),
    st.booleans(),
    st.sampled_from(sorted(MODES)),
)
@settings(max_examples=30)
def test_work_is_that_of_every_pair(grid, joint: bool, mode: str) -> None:
    size = SMALL.with_(grid=TokenGrid(*grid), joint=joint)
    found = account(policy([{"layers": 1, "use": mode}]), size)
    tiles = layout(grid, (2, 3, 4), suffix=7 if joint else 0)
    ptr, idx = lists(policy().modes[mode], tiles)
    valid = tiles.valid.tolist()
    pairs = blocks = 0
    for u in range(tiles.n_tiles):
        for w in idx[ptr[u] : ptr[u + 1]].tolist():
            pairs += valid[u] * valid[w]
            blocks += BLOCK * BLOCK
    assert (found.flops[1] == 4 * 16 * pairs).all()
    assert (found.padded_flops[1] == 4 * 16 * blocks).all()
    assert found.dense_flops == 4 * 16 * tiles.tokens**2
    assert found.keep[1, 0, 0] == pytest.approx(float(found.plan.keep[list(MODES).index(mode)]))
    if mode == "dense":
        assert (found.flops[1] == found.dense_flops).all()
        assert (found.keep[1] == 1).all()


def test_every_cell_is_counted_with_its_own_mode() -> None:
    rules = [{"layers": 2, "use": "dense"}, {"heads": 1, "noise": "0.5..0", "use": "cross"}]
    found = account(policy(rules), SMALL, [1.0, 0.6, 0.5, 0.0])
    for layer in range(3):
        for row in range(2):
            for head in range(2):
                mode = found.table.describe(row, layer, head).mode
                number = list(MODES).index(mode)
                assert found.keep[layer, row, head] == pytest.approx(float(found.plan.keep[number]))
                assert found.fp8[layer, row, head] == (MODES[mode].get("dtype") == "fp8")
    assert found.rows_of_steps == [0, 0, 1, 1]
    assert found.modes_of(0) == {"near": pytest.approx(4 / 6), "dense": pytest.approx(2 / 6)}
    assert found.row_keep() == pytest.approx(found.keep.mean(axis=(0, 2)))
    assert found.run_keep() == pytest.approx(found.keep.mean())
    assert found.dense_steps() == 0


def test_the_share_of_attention_in_wan() -> None:
    """By hand, for one layer of Wan2.1 14B at 720p: width 5120, ffn 13824, 512 text tokens."""
    size, n, d = MODELS["wan-2.1-14b"], 75600, 5120
    self_attention = 4 * n * n * d
    projections = 2 * n * 4 * d * d
    cross = 2 * n * 2 * d * d + 2 * 512 * 2 * d * d + 4 * n * 512 * d
    feed_forward = 2 * n * 2 * d * 13824
    rest = projections + cross + feed_forward
    assert size.other_flops == rest
    found = account(find("dense"), size, [1.0, 0.0])
    assert found.dense_share == pytest.approx(self_attention / (self_attention + rest))
    assert found.share() == pytest.approx([found.dense_share])
    assert found.run_share() == pytest.approx((1, 1))
    half = account(find("generic"), size, [0.6])
    assert half.run_share() == pytest.approx(
        (0.5, (0.5 * self_attention + rest) / (self_attention + rest)), rel=1e-3
    )


def test_a_short_video_stays_dense() -> None:
    found = account(policy(limits={"min_tokens": 10_000}), SMALL, [0.2])
    assert not found.applies
    assert (found.keep == 1).all()
    assert not found.fp8.any()
    assert (found.row_flops() == found.dense_forward).all()
    assert found.dense_steps() == 1


def test_what_is_unknown_is_not_guessed() -> None:
    found = account(policy(), SMALL.with_(ffn=0), [0.2])
    assert found.share() is None and found.dense_share is None and found.run_share() is None
    without_steps = account(policy(), SMALL)
    assert without_steps.run_keep() is None and without_steps.run_share() is None


def test_rules_for_another_model_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"layer 3 does not exist; the model has 3 layers"):
        account(policy([{"layers": 3, "use": "dense"}]), SMALL)


def test_a_720p_policy_is_counted_exactly() -> None:
    found = account(find("generic"), MODELS["wan-2.1-14b"])
    assert found.row_keep() == pytest.approx([1, 0.5, 0.35], abs=1e-12)
    assert np.unique(found.padded_flops[:, 0]) == [4 * 128 * (600 * BLOCK) ** 2]


ONE_WORKER = DeviceCost(
    device="made up", source="measured", workers=1, head_dim=128, overhead=1.0, bandwidth=1e30,
    kinds={"bf16": Kind(item=0.0, tile=2.0), "fp8": Kind(item=3.0, tile=1.0)},
)  # fmt: skip


def test_times_are_those_of_the_lists_by_head() -> None:
    policy = Policy.from_dict(
        {
            "fpsc": 1,
            "modes": {
                "dense": {"keep": 1.0},
                "near": {"pattern": "near", "keep": 0.5, "dtype": "fp8"},
                "self": {"pattern": "explicit", "offsets": [[0, 0, 0]], "dtype": "fp8"},
            },
            "schedule": [{"noise": "1..0.5", "use": "dense"}, {"noise": "0.5..0", "use": "near"}],
            "except": [{"layers": [0], "heads": [1], "noise": "0.5..0", "use": "dense"}],
            "limits": {"min_tokens": 0},
        }
    )
    size = ModelSize("m", 2, 3, 128, TokenGrid(4, 16, 24))
    counted = account(policy, size)
    n = counted.plan.layout.n_tiles
    seen = n * round(0.5 * n)
    found = predicted(counted, ONE_WORKER)
    dense_head, near_head = 2.0 * n * n, 3.0 * n + seen
    assert found.dense == pytest.approx(2 * (1 + 3 * dense_head))
    assert found.rows[0] == pytest.approx(found.dense)
    expected = (1 + dense_head + 2 * near_head) + (1 + 3 * near_head)
    assert found.rows[1] == pytest.approx(expected)
    assert found.modes["near"] == pytest.approx((1 + 3 * near_head) / (1 + 3 * dense_head))
    assert found.slower == []
    # Items that cost much for what they visit: few tiles do not pay.
    dear = ONE_WORKER.model_copy(
        update={"kinds": {**ONE_WORKER.kinds, "fp8": Kind(item=2.5 * n, tile=1.0)}}
    )
    assert predicted(counted, dear).slower == ["near", "self"]
    with pytest.raises(ValueError, match="head dim 128, and this attention has 64"):
        predicted(account(policy, ModelSize("m", 2, 3, 64, TokenGrid(4, 16, 24))), ONE_WORKER)


def test_a_short_video_takes_what_dense_takes() -> None:
    size = ModelSize("m", 2, 3, 128, TokenGrid(2, 8, 8))
    counted = account(find("wan-2.1-14b"), size)
    found = predicted(counted, ONE_WORKER)
    assert not counted.applies and found.rows == pytest.approx([found.dense] * counted.rows)
