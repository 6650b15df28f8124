"""The targets of the experiment on tuning, on a made-up record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import tune
from fpsc.tune import modes
from tests.tune.common import made


def record(**changes: Any) -> dict[str, Any]:
    """Everything is met; `changes` go to the first seed's policies."""

    def policy(error: float, keep: float = 0.25, predicted: float | None = None) -> dict[str, Any]:
        return {"keep": keep, "error": error, "predicted": predicted, "errors": [], "psnr_db": 30}

    policies = {
        "tuned-0_2500": policy(0.01, predicted=0.008),
        "tuned-0_2500-phases": policy(0.015),
        "uniform-near-0_25": policy(0.02),
        "uniform-near-0_5": policy(0.005, 0.5),
        "preset-demo": policy(0.03, 0.6),
        "tuned-0_6000": policy(0.004, 0.6),
    }
    policies |= {f"random-{i}": policy(0.01 * i, 0.3, 0.02 * i) for i in range(1, 21)}
    seed = {
        "seed": 0,
        "policies": {**policies, **changes},
        "against": {"preset-demo": "tuned-0_6000"},
        "ranked": [f"random-{i}" for i in range(1, 21)],
    }
    return {"seconds": {"tune": 300.0, "again": 4.0}, "seeds": [seed]}


def check(found: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tune, "RESULTS", folder / "tune.json")
    (folder / "tune.json").write_text(json.dumps(found))
    return tune.main(["--check"])


def test_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "RESULTS", tmp_path / "tune.json")
    assert tune.main(["--check"]) == 1  # nothing was measured
    assert check(record(), tmp_path, monkeypatch) == 0
    worse = {"keep": 0.25, "error": 0.009}
    assert check(record(**{"uniform-near-0_25": worse}), tmp_path, monkeypatch) == 1
    better = {"keep": 0.6, "error": 0.003}
    assert check(record(**{"preset-demo": better}), tmp_path, monkeypatch) == 1
    wrong = {f"random-{i}": {"error": 0.01 * i, "predicted": (7 * i) % 20} for i in range(1, 21)}
    assert check(record(**wrong), tmp_path, monkeypatch) == 1
    slow = {**record(), "seconds": {"tune": 601.0, "again": 1.0}}
    assert check(slow, tmp_path, monkeypatch) == 1


def test_tables_of_the_page(tmp_path: Path) -> None:
    found = record()
    second = {**found["seeds"][0], "seed": 1}
    second["policies"] = {**second["policies"], "preset-demo": {"keep": 0.6, "error": 0.05}}
    path = tmp_path / "tune.json"
    path.write_text(json.dumps({**found, "seeds": [found["seeds"][0], second]}))
    keep = tune.PARTS["keep"](path).splitlines()
    assert len(keep) == 2 + 2
    assert keep[2] == "| 0 | 0.01 (30.0 dB) | 0.01 (30.0 dB) | 0.02 (30.0 dB) | near-0.25 | 0.01 |"
    assert tune.PARTS["cost"](path).splitlines()[2:] == ["| demo | 0.60 | 0.040 | 0.004 |"]


def test_rank_correlation() -> None:
    assert tune.spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert tune.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert tune.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866, abs=1e-3)


def test_there_are_twenty_policies_of_all_kinds(tmp_path: Path) -> None:
    calibration = made(candidates=modes.default())
    found = tune.many(calibration, tmp_path)
    kinds = {name.partition("-")[0] for name in found}
    assert len(found) == 20 and kinds == {"tuned", "uniform", "preset", "random"}
    assert all(error > 0 for _, error in found.values())


def test_built_in_policies_apply_to_the_demo() -> None:
    found = tune.built_in()
    assert {"demo", "generic"} <= set(found) and "dense" not in found
    structures = {tuple(sorted({m.dtype for m in p.modes.values()})) for p in found.values()}
    assert structures == {("bf16", "fp8")}
    calibration = made()
    for policy in found.values():
        assert policy.limits.min_tokens == 0
        assert 0 < tune.keep_of(policy, calibration) <= 1
