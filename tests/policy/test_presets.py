"""Every built-in policy: what it is for, and that it does what its comments say."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fpsc.families import FAMILIES, Family, family_of
from fpsc.policy import find, presets, resolve
from fpsc.policy.accounting import account
from fpsc.policy.axis import levels
from fpsc.policy.models import DEFAULT, MODELS, size_for

TUNED = sorted(name for name in presets() if name.endswith("-tuned"))
SAFE = sorted({"generic", *MODELS})


def test_every_family_has_both_forms() -> None:
    assert set(presets()) == {"dense", "demo", *SAFE, *TUNED}
    assert [name.removesuffix("-tuned") for name in TUNED] == SAFE


@pytest.mark.parametrize("name", SAFE)
def test_a_safe_preset_is_dense_early_and_sparser_later(name: str) -> None:
    policy, size = find(name), size_for(name)
    assert policy.tuned_on.weights == "base"
    found = account(policy, size, noise := levels(size.sampling))
    keep = found.row_keep()
    assert keep[0] == 1
    assert (np.diff(keep) < 0).all()
    assert 0.24 <= found.dense_steps() / len(noise) <= 0.37, "as published methods do"
    assert not found.fp8[:, 0].any()
    if name != "generic":
        assert (found.keep[0] == 1).all(), "the first layer is dense"


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_preset_has_the_order_of_the_paper(name: str) -> None:
    policy, size = find(name), size_for(name)
    assert policy.tuned_on.weights == "jointly-tuned"
    assert [p.use for p in policy.schedule] == ["early", "middle", "late"]
    assert [m.scales.qk for m in policy.modes.values()] == ["coarse", "fine", "intermediate"]
    found = account(policy, size, levels(size.sampling))
    early, middle, late = found.row_keep()
    assert early < late < middle
    assert found.fp8.all()
    assert found.run_keep() == pytest.approx(1 / 5.15, abs=0.015)


@pytest.mark.parametrize("name", [*SAFE, *TUNED])
def test_numbers_that_nobody_measured_are_called_so(name: str) -> None:
    words = " ".join(find(name).document.text.replace("#", " ").split())
    assert "our choice" in words
    assert re.search(r"not measured|was measured on this model|No number", words)


@pytest.mark.parametrize("name", [name for name in [*SAFE, *TUNED] if "generic" not in name])
def test_the_counts_of_steps_in_comments_are_right(name: str) -> None:
    policy, size = find(name), size_for(name)
    noise = levels(size.sampling)
    table = resolve(policy, layers=size.layers, heads=size.heads, fp8=True)
    rows = [table.row_of(level) for level in noise]
    found = re.findall(r"use: \w+} +# (\d+)(?: of (\d+))? steps", policy.document.text)
    assert [int(n) for n, _ in found] == [rows.count(row) for row in range(table.n_rows)]
    assert int(found[0][1]) == len(noise)


def test_the_count_of_steps_of_the_generic_preset() -> None:
    rows = account(find("generic"), MODELS[DEFAULT], levels(MODELS[DEFAULT].sampling)).rows_of_steps
    assert [rows.count(row) for row in range(3)] == [18, 27, 5]
    words = " ".join(find("generic").document.text.replace("#", " ").split())
    assert "stays above 0.90 for 18 steps and above 0.40 for another 27" in words


def test_families_name_presets_that_exist_and_are_safe() -> None:
    named = {family.policy for family in FAMILIES.values() if isinstance(family, Family)}
    assert {"generic", "mochi"} <= named <= set(SAFE)


@pytest.mark.parametrize(
    ("cls", "config", "expected"),
    [
        ("WanTransformer3DModel", {"num_attention_heads": 12}, "wan-2.1-1.3b"),
        ("WanTransformer3DModel", {"num_attention_heads": 40}, "wan-2.1-14b"),
        ("WanTransformer3DModel", {"num_attention_heads": 24}, "wan-2.2"),
        ("WanTransformer3DModel", {"_name_or_path": "Wan-AI/Wan2.2-I2V-A14B"}, "wan-2.2"),
        ("WanTransformer3DModel", {"_name_or_path": "Wan-AI/Wan2.1-T2V-14B"}, "wan-2.1-14b"),
        ("HunyuanVideoTransformer3DModel", {}, "hunyuan-video"),
        ("CogVideoXTransformer3DModel", {}, "cogvideox"),
        ("LTXVideoTransformer3DModel", {}, "ltx-video"),
        ("MochiTransformer3DModel", {}, "mochi"),
        ("AllegroTransformer3DModel", {}, "generic"),
    ],
)
def test_the_preset_of_a_model(cls: str, config: dict[str, Any], expected: str) -> None:
    sizes = {name: n for name, n in config.items() if isinstance(n, int)}
    with torch.device("meta"):
        model = getattr(diffusers, cls)(num_layers=1, **sizes)
    model.register_to_config(**config)
    family = family_of(model)
    assert family is not None
    assert family.policy == expected
