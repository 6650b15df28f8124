"""bench/policy.py measures what it says, and its committed results are within their targets."""

from __future__ import annotations

import json
from pathlib import Path

from bench import policy
from fpsc.policy import Policy


def test_the_policy_is_as_large_as_it_says() -> None:
    loaded = Policy.load(policy.text())
    assert len(loaded.schedule) == len(loaded.modes) == 8
    assert len(loaded.rules) == 40


def test_the_committed_results_are_within_their_targets(checkout: Path) -> None:
    result = json.loads((checkout / "bench" / "results" / "policy.json").read_text())
    assert policy.missed(result) == []
    at_720p, long = result["pattern_ms"].values()
    assert set(at_720p) == set(long) == set(policy.PATTERNS)
    assert all(part < 100 for times in at_720p.values() for part in times.values())
    assert all(part < 3000 for times in long.values() for part in times.values())


def test_a_miss_is_named() -> None:
    slow = {"policy": {"seconds": {"resolve and plan": 2.0}, "device_bytes": 1 << 30}}
    assert policy.missed(slow) == [
        "resolving took 2.0 s; allowed are 1.0",
        f"{1 << 30} bytes on the device; allowed are {64 << 20}",
    ]


def test_one_round_counts_all_tensors() -> None:
    parts, size = policy.once()
    assert size == json.loads(policy.RESULTS.read_text())["policy"]["device_bytes"]
    assert parts["resolve and plan"] < 10
