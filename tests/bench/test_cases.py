"""The registry, what a CPU is given of it, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fpsc.bench import subject as subjects
from fpsc.bench.cases import CPU_LIMITS, chosen, grid_of, quick, registry, smaller
from fpsc.bench.record import Level
from fpsc.bench.subject import Machine, check_memory, sized
from fpsc.errors import UserError
from fpsc.models.known import KNOWN, known
from fpsc.models.materialise import settings_of, with_layers
from fpsc.policy.models import MODELS

CPU = Machine(torch.device("cpu"), torch.float32)
GPU = Machine(torch.device("cuda"), torch.bfloat16)


def test_every_level_of_every_model_is_there() -> None:
    names = registry(cuda=False)
    for level in set(Level) - {Level.compile}:
        for model, its in KNOWN.items():
            assert all(f"{level}/{model}/{size}" in names for size in its.clips)
    assert all(f"compile/{model}" in names for model in KNOWN)
    assert {"480p", "720p"} == set(KNOWN["wan-2.1-14b"].clips)
    assert "scaling/tokens/32768" in names and "scaling/tokens/302400" in registry(cuda=True)


def test_the_beginning_of_a_name_stands_for_all() -> None:
    names = registry(cuda=False)
    assert len(chosen(["scaling/batch"], names)) == 3
    assert len(chosen(["scaling/batch", "scaling/batch/2"], names)) == 3
    assert chosen(["compile/mochi"], names)[0].names() == (
        "compile/mochi/cold",
        "compile/mochi/warm",
    )


def test_an_unknown_case_is_named_with_a_near_one() -> None:
    with pytest.raises(UserError, match=r"did you mean .*transformer/wan-2\.1-14b/720p"):
        chosen(["transformer/wan-2.1-14b/720"], registry(cuda=False))
    with pytest.raises(UserError, match="not in the registry"):
        chosen(["transform"], registry(cuda=False))


def test_an_unknown_model_is_named_with_a_near_one() -> None:
    with pytest.raises(UserError, match=r"did you mean wan-2\.1-14b"):
        known("wan2.1-14B")


def test_the_known_models_are_those_that_policies_are_counted_for() -> None:
    """Layers, heads, widths and grids agree with what `fpsc policy show` assumes."""
    checked = 0
    for name, size in MODELS.items():
        if name not in KNOWN:
            continue
        found = sized(registry(cuda=True)[f"transformer/{name}/480p"], GPU).problem
        assert (found.full_layers, found.heads, found.head_dim) == (
            size.layers,
            size.heads,
            size.head_dim,
        ), name
        checked += 1
    assert checked == len(KNOWN)


def test_a_gpu_gets_the_whole_model_and_a_cpu_what_it_can() -> None:
    spec = registry(cuda=True)["transformer/wan-2.1-1.3b/480p"]
    whole = sized(spec, GPU).problem
    assert (whole.layers, whole.grid, whole.reduced) == (30, (21, 30, 52), ())
    cut = sized(spec, CPU)
    assert cut.problem.layers == 2 and cut.model is not None
    assert cut.model.config["num_layers"] == 2
    assert cut.problem.tokens <= CPU_LIMITS[Level.transformer].tokens
    assert cut.problem.reduced[0] == "2 of 30 layers"
    assert cut.problem.reduced[1].endswith("instead of 21x30x52")


def test_what_the_user_set_is_not_cut() -> None:
    from dataclasses import replace

    spec = replace(registry(cuda=False)["transformer/wan-2.1-1.3b/480p"], layers=4, grid=(3, 8, 10))
    found = sized(spec, CPU, frozenset({"layers", "grid"})).problem
    assert (found.layers, found.grid) == (4, (3, 8, 10))
    assert "4 of 30 layers" in found.reduced


def test_a_model_has_no_more_layers_than_it_has() -> None:
    from dataclasses import replace

    spec = replace(registry(cuda=False)["transformer/hunyuan-video/480p"], layers=61)
    with pytest.raises(UserError, match="1 to 60"):
        sized(spec, CPU, frozenset({"layers"}))


def test_two_kinds_of_layers_are_cut_in_proportion() -> None:
    names = registry(cuda=False)
    for name, double, single in (("training", 1, 0), ("block", 1, 1)):
        found = sized(names[f"{name}/hunyuan-video/480p"], CPU)
        assert found.model is not None
        assert found.model.config == {"num_layers": double, "num_single_layers": single}
    config = settings_of(KNOWN["hunyuan-video"].spec)
    third = with_layers(KNOWN["hunyuan-video"].spec, config, 12)
    assert third.config == {"num_layers": 4, "num_single_layers": 8}


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_does_not_fit_says_how_much_and_what_would(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = registry(cuda=True)["transformer/wan-2.1-14b/720p"]
    case = sized(spec, GPU)
    gib = 2**30
    monkeypatch.setattr(subjects, "memory", lambda device: (20 * gib, 24 * gib))
    with pytest.raises(
        UserError, match=r"needs about \d+\.\d GiB .* 20\.0 are free; what fits: --layers \d+"
    ):
        check_memory(case, machine)
    monkeypatch.setattr(subjects, "memory", lambda device: (gib // 1024, gib))
    with pytest.raises(UserError, match="nothing of this model fits"):
        check_memory(case, machine)
    monkeypatch.setattr(subjects, "memory", lambda device: (500 * gib, 500 * gib))
    check_memory(case, machine)


def test_grids() -> None:
    assert smaller((21, 30, 52), 99999) == (21, 30, 52)
    t, y, x = smaller((21, 45, 80), 4096)
    assert t * y * x <= 4096 and y % 2 == x % 2 == 0 and t < y < x
    for tokens in (1024, 4096, 75600, 302400):
        t, y, x = grid_of(tokens)
        assert t * y * x == tokens and y <= x <= 2 * y


def test_the_quick_cases_are_whole_but_for_steps() -> None:
    cut = {spec.name: sized(spec, CPU).problem.reduced for spec in quick()}
    assert cut.pop("quick/sampling") == ("5 of 20 steps",)
    assert set(cut.values()) == {()}


def test_a_users_own_folder_is_a_model(tmp_path: Path) -> None:
    from fpsc.bench.cases import Spec
    from fpsc.models.build import find_model

    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"_class_name": "WanTransformer3DModel", "num_layers": 3, "num_attention_heads": 2}'
    )
    own = find_model(str(tmp_path))
    found = sized(Spec("x", Level.transformer, own=own, grid=(2, 4, 6)), CPU).problem
    assert (found.full_layers, found.heads, found.head_dim) == (3, 2, 128)
