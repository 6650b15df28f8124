"""`fpsc.set_policy`: other numbers at once, another structure by compiling that model again; and
which policy a model gets in the first place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import fpsc
from fpsc.policy import Policy, PolicyError
from fpsc.policy.load import BESIDE
from tests.compiled import NO_RECOMPILE, compile_blocks, compile_whole, graphs
from tests.thresholds import COMPILED_FP8, relative_rms
from tests.wan import PHASES, reference_forward, small_inputs, small_wan

OTHER_TILE = {**PHASES, "name": "other tile", "tile": [3, 4, 5]}


@pytest.fixture(autouse=True)
def _fresh_reports() -> None:
    fpsc.reports(clear=True)
    counters.clear()


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("compile_", [compile_whole, compile_blocks])
def test_another_structure_compiles_that_model_again_and_no_other(compile_, phases):
    first, second = small_wan(), small_wan()
    inputs = small_inputs((600.0,))
    before, after = Policy.load(phases), Policy.from_dict(OTHER_TILE)
    expected = [reference_forward(first, inputs, p).detach() for p in (before, after)]
    assert relative_rms(*expected) > COMPILED_FP8
    changed, kept = compile_(first, policy=phases), compile_(second, policy=phases)
    run(changed, inputs)
    with NO_RECOMPILE:  # models of one class share compiled code
        run(kept, inputs)
    assert graphs() == 1
    fpsc.set_policy(first, after, recompile=True)
    with NO_RECOMPILE:
        assert relative_rms(run(kept, inputs), expected[0]) <= COMPILED_FP8
    assert relative_rms(run(changed, inputs), expected[1]) <= COMPILED_FP8
    assert graphs() == 2
    with NO_RECOMPILE:
        assert relative_rms(run(kept, inputs), expected[0]) <= COMPILED_FP8
        assert relative_rms(run(changed, inputs), expected[1]) <= COMPILED_FP8
        fpsc.set_policy(first, before, recompile=True)  # its code is still there
        assert relative_rms(run(changed, inputs), expected[0]) <= COMPILED_FP8
    assert fpsc.reports()[-1].policy_source == "given to set_policy"


def test_a_policy_that_covers_more_compiles_what_was_left_dense(phases):
    model, inputs = small_wan(), small_inputs((600.0,))
    policy = Policy.load(phases)
    Policy.load(phases).with_values({"limits.min_tokens": 4096}).save(phases)
    with pytest.warns(fpsc.NothingReplacedWarning):
        run(compiled := compile_whole(model, policy=phases), inputs)
    fpsc.set_policy(compiled, policy, recompile=True)
    found = run(compiled, inputs)
    assert relative_rms(found, reference_forward(model, inputs, policy)) <= COMPILED_FP8


def test_nothing_changes_where_a_policy_is_refused(phases):
    model, inputs = small_wan(), small_inputs((600.0,))
    compiled = compile_whole(model, policy=phases)
    before = run(compiled, inputs)
    with pytest.raises(fpsc.StructureError, match=r"tile \(compiled with .*recompile=True"):
        fpsc.set_policy(model, Policy.from_dict(OTHER_TILE))
    far = {**OTHER_TILE, "except": [{"layers": 7, "use": "dense"}]}
    with pytest.raises(PolicyError, match=r"layer 7 does not exist; the model has 2 layers"):
        fpsc.set_policy(model, Policy.from_dict(far), recompile=True)
    with NO_RECOMPILE:
        assert torch.equal(run(compiled, inputs), before)


def test_what_a_policy_was_tuned_on_is_compared(phases):
    model, inputs = small_wan(), small_inputs((600.0,))
    model.register_to_config(_name_or_path="owner/small")
    tuned = {**PHASES, "for": {"model": "owner/large", "grid": [21, 45, 80]}}
    Policy.from_dict(tuned).save(phases)
    compiled = compile_whole(model, policy=phases)
    with pytest.warns(UserWarning) as caught:
        run(compiled, inputs)
    said = " ".join(str(w.message) for w in caught)
    assert "for.model: phases was tuned on owner/large, this is owner/small" in said
    assert "for.grid: phases was tuned on [21, 45, 80], this is [3, 8, 10]" in said
    with pytest.warns(UserWarning, match=r"for\.grid: phases was tuned on \[1, 2, 3\]"):
        fpsc.set_policy(model, Policy.from_dict({**PHASES, "for": {"grid": [1, 2, 3]}}))


def saved_wan(folder: Path, **settings: Any) -> WanTransformer3DModel:
    """A small Wan, saved and loaded again, with a policy beside its weights."""
    model = small_wan()
    model.save_pretrained(folder)
    policy = Policy.from_dict({**PHASES, "name": "beside", **settings})
    assert fpsc.save_policy(model, folder, policy) == folder / BESIDE
    return WanTransformer3DModel.from_pretrained(folder)


def test_a_policy_beside_the_weights_is_found(tmp_path: Path, phases: str):
    model, inputs = saved_wan(tmp_path / "model"), small_inputs((600.0,))
    compiled = compile_whole(model)
    found = run(compiled, inputs)
    (report,) = fpsc.reports(clear=True)
    assert report.policy == "beside"
    assert report.policy_source == f"saved beside the weights, {tmp_path / 'model' / BESIDE}"
    assert relative_rms(found, reference_forward(model, inputs, Policy.load(phases))) <= (
        COMPILED_FP8
    )
    fpsc.set_policy(model, Policy.from_dict(PHASES).with_values({"modes.near.keep": 0.2}))
    fpsc.save_policy(model, tmp_path / "model")
    assert Policy.load(tmp_path / "model" / BESIDE).modes["near"].keep == 0.2


def analysed(model: nn.Module, **options: Any) -> Any:
    """The report of a model's first compilation."""
    run(compile_whole(model, **options), small_inputs((600.0,)))
    return fpsc.reports(clear=True)[0]


def test_the_options_come_before_the_weights_and_the_weights_before_the_family(
    tmp_path: Path, phases: str
):
    assert analysed(saved_wan(tmp_path), policy=phases).policy_source == "named in the options"
    torch._dynamo.reset()
    (tmp_path / BESIDE).write_text("fpsc: 2\n")
    with pytest.raises(BackendCompilerFailed, match=r"fpsc-policy\.yaml:1:7: fpsc: expected 1"):
        analysed(WanTransformer3DModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("stated", [False, True])
def test_a_component_of_a_pipeline_gets_its_part(tmp_path: Path, stated: bool):
    """As diffusers lays a pipeline out; two transformers of one class."""
    folder = tmp_path / "pipeline"
    parts = {"transformer_2": {"schedule": [{"noise": "1.00..0.00", "use": "near"}]}}
    policy = Policy.from_dict({**PHASES, "components": parts})
    for name in ("transformer", "transformer_2"):
        small_wan().save_pretrained(folder / name)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    policy.save_beside(folder)
    # What a pipeline gives to its parts, and what a user gives who loads one of them.
    if stated:
        model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer_2")
        with pytest.warns(UserWarning, match="parts of its own for transformer_2"):
            report = analysed(model)
        assert len(report.phases) == 3
        torch._dynamo.reset()
        report = analysed(model, component="transformer_2")
    else:
        first = analysed(WanTransformer3DModel.from_pretrained(folder / "transformer"))
        assert first.phases[0].modes == ("dense",)
        torch._dynamo.reset()
        report = analysed(WanTransformer3DModel.from_pretrained(folder / "transformer_2"))
    assert report.policy_source.endswith("component transformer_2")
    assert {mode for phase in report.phases for mode in phase.modes} == {"near", "window"}
