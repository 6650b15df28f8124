"""Budgets, predictions, and the policies that are written of a choice."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fpsc.bench.op import Shape
from fpsc.cost import DeviceCost, Kind
from fpsc.errors import UserError
from fpsc.policy import Policy, resolve
from fpsc.tune import choose, cost, landscape, modes, predict, write
from fpsc.tune.budget import parse
from fpsc.tune.choose import Wishes
from fpsc.tune.cost import Cost
from fpsc.tune.record import Calibration
from tests.tune.common import CANDIDATES, GRID, TILE, made, saved

TIMED = Cost(
    kind="measured",
    heads=tuple(1.0 if i < 2 else 0.5 - 0.01 * i for i in range(len(CANDIDATES))),
    rest=6.0,
)


@pytest.mark.parametrize("text", ["keep=0.25", "keep=0.6", "attention=0.4", "error=0.02"])
@pytest.mark.parametrize("wishes", [Wishes(), Wishes(monotone=True), Wishes(smooth=0.01)])
def test_budgets_are_kept_and_better_than_one_mode(text: str, wishes: Wishes) -> None:
    calibration, budget = made(layers=10, heads=6), parse(text)
    found = choose.choose(calibration, budget, wishes)
    kept = {"keep": found.predicted.keep, "attention": found.predicted.attention}
    kept["error"] = found.predicted.error
    assert kept[budget.kind] <= budget.value * (1 + 1e-6)
    assert 0 <= found.gap < 0.1
    best = choose.best_uniform(calibration, budget)
    assert best is not None
    uniform = predict.of_choice(calibration, choose.uniform(calibration, best))
    if wishes == Wishes():
        if budget.kind == "error":
            assert found.predicted.attention <= uniform.attention + 1e-9
        else:
            assert found.predicted.error <= uniform.error + 1e-12
    if wishes.monotone:
        keep = np.array(calibration.run.keep)[found.choice]
        assert (np.diff(keep, axis=0) <= 1e-9).all()
    assert found.simple is not None and found.simple_predicted is not None
    simple = found.simple_predicted
    spent = {"keep": simple.keep, "attention": simple.attention, "error": simple.error}
    assert spent[budget.kind] <= budget.value * (1 + 1e-6)


def test_more_may_be_spent_more_is_won() -> None:
    calibration = made()
    errors = [choose.choose(calibration, parse(f"keep={k}")).predicted.error for k in (0.3, 0.5, 1)]
    assert errors[0] > errors[1] > errors[2] == 0


def test_time_counts_what_is_not_attention() -> None:
    calibration = made(cost=TIMED)
    dense = predict.of_choice(calibration, choose.uniform(calibration, calibration.dense))
    assert dense.time == pytest.approx(1) and dense.attention == pytest.approx(1)
    found = choose.choose(calibration, parse("time=0.8"))
    cells, rest = 12.0, 6.0
    assert found.predicted.time is not None and found.predicted.time <= 0.8 + 1e-9
    expected = (rest + cells * found.predicted.attention) / (rest + cells)
    assert found.predicted.time == pytest.approx(expected)
    seconds = choose.choose(calibration, parse(f"time={0.8 * 6 * (rest + cells)}s"))
    assert (seconds.choice == found.choice).all()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("keep=0.1", r"nearest .* --budget keep=0\.25"),
        ("attention=0.01", r"nearest .* --budget attention=0\.125"),
        ("time=0.5", "needs times"),
        ("attention=3s", "needs times"),
        ("speed=2", "expected one of keep, attention, time, error"),
        ("keep=2", "at most 1"),
        ("keep=0", "above 0"),
        ("keep=0.2s", "only attention and time"),
        ("keep", "expected one of"),
    ],
)
def test_budgets_that_cannot_be(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        choose.choose(made(), parse(text))


def test_the_nearest_budget_that_is_named_can_be_kept() -> None:
    calibration = made(cost=TIMED)
    for kind in ("keep", "attention", "time"):
        with pytest.raises(UserError) as error:
            choose.choose(calibration, parse(f"{kind}=0.001"))
        choose.choose(calibration, parse(str(error.value).rsplit(" ", 1)[1]))


@pytest.mark.parametrize("form", ["table", "phases"])
def test_a_policy_says_what_was_chosen(form: str, tmp_path: Path) -> None:
    calibration = made()
    found = choose.choose(calibration, parse("keep=0.4"), Wishes(lines=5))
    assert found.simple is not None
    path = tmp_path / "keep-0.4.yaml"
    if form == "table":
        choice = found.choice
        policy = write.write_table(path, calibration, choice, found.simple, {"by": "a test"})
    else:
        choice = found.simple.choice
        policy = write.write_phases(path, calibration, found.simple, {"by": "a test"})
    table = resolve(policy, layers=4, heads=3, fp8=True)
    for b, (hi, lo) in enumerate(pairwise(calibration.run.edges)):
        row = table.row_of((hi + lo) / 2)
        for layer, head in np.ndindex(4, 3):
            name = table.describe(row, layer, head).mode
            assert name == calibration.names[choice[b, layer, head]]
    # Whoever reads the file predicts what was predicted of the choice.
    again = predict.of_policy(calibration, Policy.load(path))
    assert again.as_dict() == predict.of_choice(calibration, choice).as_dict()
    assert policy.limits.min_tokens == 0  # 240 tokens would stay dense by the default
    assert {mode.dtype for mode in policy.modes.values()} == {"bf16", "fp8"}
    assert policy.mismatches(grid=(3, 8, 12)) and not policy.mismatches(grid=(3, 8, 10))


def only(scales: str) -> Policy:
    """One mode everywhere, with these scales; it is called by them."""
    mode = {"pattern": "near", "keep": 0.25, "dtype": "fp8", "scales": {"qk": scales}}
    schedule = [{"noise": "1..0", "use": "x"}]
    return Policy.from_dict({"fpsc": 1, "name": scales, "modes": {"x": mode}, "schedule": schedule})


def test_a_policy_of_other_edges_and_modes() -> None:
    calibration = made()
    half = modes.policy(CANDIDATES, [(1, 0.5, "dense"), (0.5, 0, "near-0_25")], tile=TILE)
    found = predict.of_policy(calibration, half)
    assert found.keep == pytest.approx(0.5 * 1 + 0.5 * 0.25)  # 3 of 6 steps: 1, 0.83, 0.67
    mode = calibration.names.index("near-0_25-fp8")
    expected = predict.of_choice(calibration, choose.uniform(calibration, mode))
    assert predict.of_policy(calibration, only("fine")).as_dict() == expected.as_dict()
    with pytest.raises(predict.NotMeasured, match="coarse"):
        predict.of_policy(calibration, only("coarse"))


def test_presets_are_predicted_where_their_modes_were_measured() -> None:
    calibration = made(candidates=modes.default())
    found, left_out = landscape.built_in(calibration)
    names = [mark.name for mark in found]
    assert {"generic", "generic-tuned", "demo"} <= set(names) and "dense" not in names
    assert not set(names) & set(left_out)
    assert found[0].label == "generic-tuned (FPSAttention's order)"


def test_a_file_holds_all_of_a_calibration(tmp_path: Path) -> None:
    calibration = made()
    path = saved(calibration, tmp_path)
    again = Calibration.load(path)
    assert again.facts == calibration.facts
    for name in ("damage", "attention", "carried", "maps"):
        assert (getattr(again, name) == getattr(calibration, name)).all()
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("what", ["nothing", "text", "other tensors", "cut"])
def test_a_file_that_is_no_calibration(what: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = saved(made(), tmp_path)
    if what == "nothing":
        path.unlink()
    elif what == "text":
        path.write_text("hello")
    elif what == "other tensors":
        save_file({"x": np.zeros(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="calibration"):
        Calibration.load(path)


def test_candidates() -> None:
    assert len(modes.default()) <= 32
    assert list(modes.product(("near",), (0.5,), ("bf16",))) == ["dense", "near-0_5"]
    names = list(modes.product(("near",), (0.5,), ("fp8",), ("tile", "coarse")))
    assert names == ["dense", "dense-fp8", "near-0_5-fp8", "near-0_5-fp8-coarse"]
    with pytest.raises(UserError, match="42 modes"):
        modes.product(("near", "frame", "column", "radial"), (0.1, 0.2, 0.3, 0.4, 0.5))


def test_costs_of_a_device_leave_the_rest_of_a_forward() -> None:
    policy = modes.policy(CANDIDATES, tile=TILE)
    keep = [1.0 if m.keep is None else m.keep for m in policy.modes.values()]
    device = DeviceCost(
        device="made up", source="measured", workers=1, head_dim=64, overhead=0.2, bandwidth=1e30,
        kinds={"bf16": Kind(item=0.0, tile=1 / 144), "fp8": Kind(item=0.0, tile=0.5 / 144)},
    )  # fmt: skip
    found = cost.on_device(
        policy, [np.full(12, round(12 * k)) for k in keep], device, Shape(GRID, 2, 64),
        element=4, layers=3, forward_seconds=10.0,
    )  # fmt: skip
    by_name = dict(zip(CANDIDATES, found.heads, strict=True))
    assert by_name["dense"] == pytest.approx(1.1) and by_name["dense-fp8"] == pytest.approx(0.6)
    assert by_name["near-0_25-fp8"] == pytest.approx(0.1 + 0.125)
    assert found.rest == pytest.approx(10 - 3 * 2.2) and found.device == device
    # Where FP8 does not run as such, its cells cost what those of the input's dtype do.
    only = device.model_copy(update={"kinds": {"bf16": device.kinds["bf16"]}})
    found = cost.on_device(
        policy, [np.full(12, round(12 * k)) for k in keep], only, Shape(GRID, 2, 64),
        element=4, layers=9, forward_seconds=10.0,
    )  # fmt: skip
    by_name = dict(zip(CANDIDATES, found.heads, strict=True))
    assert by_name["dense-fp8"] == by_name["dense"] and found.rest == 0


def test_times_that_were_refused_bound_nothing() -> None:
    policy = modes.policy(CANDIDATES, tile=TILE)
    keep = [1.0 if m.keep is None else m.keep for m in policy.modes.values()]
    calibration = made(cost=cost.counted(policy, keep, refused="wrong by 60%"))
    for text in ("attention=0.4", "time=0.6", "attention=3s"):
        with pytest.raises(UserError, match=r"not used: wrong by 60%\. Calibrate again"):
            choose.choose(calibration, parse(text))
    assert choose.choose(calibration, parse("keep=0.5")).predicted.time is None


def test_what_an_error_counts_depends_on_its_size() -> None:
    calibration = made()
    at, gain = calibration.anchors
    for strength in (0, 1):
        assert calibration.gains_at(at[:, strength]) == pytest.approx(gain[:, strength])
    assert calibration.gains_at(at[:, 0] / 100) == pytest.approx(gain[:, 0])
    assert calibration.gains_at(at[:, 1] * 100) == pytest.approx(gain[:, 1])
    between = calibration.gains_at(np.sqrt(at[:, 0] * at[:, 1]))
    assert between == pytest.approx(np.sqrt(gain[:, 0] * gain[:, 1]))
    assert between == pytest.approx(calibration.gains)
    # So a reference in all heads is predicted to do what was seen of it, bin by bin.
    for strength, name in enumerate(calibration.run.references):
        choice = choose.uniform(calibration, calibration.names.index(name))
        seen = calibration.carried[..., strength].mean(axis=0).sum() ** 0.5
        assert predict.of_choice(calibration, choice).error == pytest.approx(seen, rel=1e-4)
