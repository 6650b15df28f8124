"""The public line, `torch.compile(model, backend="fpsattn")`, on a small Wan transformer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import fpsc
from fpsc import backend, launch, runtime
from fpsc.policy import Policy
from tests.compiled import NO_RECOMPILE, compile_blocks, compile_whole, graphs
from tests.thresholds import COMPILED_DENSE, COMPILED_FP8, COMPILED_GRAD, relative_rms
from tests.wan import PHASES, reference_forward, small_inputs, small_wan


@pytest.fixture(autouse=True)
def _fresh_reports() -> None:
    fpsc.reports(clear=True)
    counters.clear()


def write(path: Path, policy: dict[str, Any]) -> str:
    Policy.from_dict(policy).save(path)
    return str(path)


@pytest.mark.parametrize("compile_", [compile_whole, compile_blocks])
def test_dense_policy_equals_eager(compile_):
    model, inputs = small_wan(), small_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = compile_(model, policy="dense")(**inputs)[0]
    assert relative_rms(found, expected) <= COMPILED_DENSE
    (report,) = fpsc.reports()
    assert {s.role for s in report.sites if s.replaced} == {"video"}
    assert {s.role for s in report.sites if not s.replaced} == {"cross"}


@pytest.mark.parametrize("compile_", [compile_whole, compile_blocks])
def test_every_phase_equals_the_reference_without_recompiling(compile_, phases):
    model = small_wan()
    policy = Policy.load(phases)
    timesteps = (950.0, 600.0, 100.0)
    expected = [reference_forward(model, small_inputs((t,)), policy).detach() for t in timesteps]
    compiled = compile_(model, policy=phases)
    with torch.no_grad():
        found = [compiled(**small_inputs((timesteps[0],)))[0]]
        with NO_RECOMPILE:
            found += [compiled(**small_inputs((t,)))[0] for t in timesteps[1:]]
            for t in torch.linspace(1000, 0, 47).tolist():
                compiled(**small_inputs((t,)))
    for f, e in zip(found, expected, strict=True):
        assert relative_rms(f, e) <= COMPILED_FP8
    assert graphs() == 1
    (report,) = fpsc.reports()
    assert [p.modes[0] for p in report.phases] == ["dense", "near", "window"]
    assert sum(p.forwards for p in report.phases) == 50
    assert [p.forwards > 0 for p in report.phases] == [True] * 3
    keeps = [p.keep for p in report.phases]
    assert keeps == sorted(keeps, reverse=True) and keeps[0] == 1.0
    assert "keep 0.08 at noise 0.00" in report.summary()


def test_forty_blocks_are_one_graph(phases):
    grid = (2, 4, 5)
    model, inputs = small_wan(layers=40), small_inputs((600.0,), grid)
    expected = reference_forward(model, inputs, Policy.load(phases))
    compile_blocks(model, policy=phases)
    with torch.no_grad():
        found = model(**inputs)[0]
        with NO_RECOMPILE:
            for t in torch.linspace(1000, 0, 50).tolist():
                model(**small_inputs((t,), grid))
    assert relative_rms(found, expected) <= COMPILED_FP8
    assert graphs() == 1
    (report,) = fpsc.reports()
    assert report.layers == 40
    assert "one graph for 40 layers" in report.summary()


@pytest.mark.parametrize("compile_", [compile_whole, compile_blocks])
def test_each_batch_element_has_its_own_row(compile_, phases):
    model, inputs = small_wan(), small_inputs((950.0, 100.0))
    expected = reference_forward(model, inputs, Policy.load(phases))
    with torch.no_grad():
        found = compile_(model, policy=phases)(**inputs)[0]
    for b in range(2):
        assert relative_rms(found[b], expected[b]) <= COMPILED_FP8
    assert [p.forwards for p in fpsc.reports()[0].phases] == [1, 0, 1]


@pytest.mark.parametrize("compile_", [compile_whole, compile_blocks])
@pytest.mark.parametrize("first", [False, True], ids=["alone", "after a batch of one"])
def test_gradients_equal_the_reference(compile_, first, phases):
    """Also where the batch is of symbolic size, as after a clip was sampled without gradients."""
    model, inputs = small_wan(), small_inputs((950.0, 600.0) if first else (600.0,))
    weight = torch.randn(inputs["hidden_states"].shape)
    (reference_forward(model, inputs, Policy.load(phases)) * weight).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled = compile_(model, policy=phases)
    if first:
        with torch.no_grad():
            compiled(**small_inputs((600.0,)))
    (compiled(**inputs)[0] * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if expected[name].norm() > 1e-6 * parameter.numel() ** 0.5:
            assert relative_rms(parameter.grad, expected[name]) <= COMPILED_GRAD, name


def test_portrait_then_landscape_of_one_length_share_a_graph(phases):
    model, policy = small_wan(), Policy.load(phases)
    compile_blocks(model, policy=phases)
    with torch.no_grad():
        for grid in ((3, 8, 10), (3, 10, 8)):
            inputs = small_inputs((100.0,), grid)
            found = model(**inputs)[0]
            expected = reference_forward(small_wan(), inputs, policy)
            assert relative_rms(found, expected) <= COMPILED_FP8
    assert graphs() == 1


def test_two_models_share_a_graph_and_keep_their_own_layers(phases):
    first, second = small_wan(layers=2), small_wan(layers=3)
    inputs = small_inputs((600.0,))
    compile_blocks(first, policy=phases)
    compile_blocks(second, policy=phases)
    with torch.no_grad():
        for model in (first, second):
            found = model(**inputs)[0]
            layers = model.config.num_layers
            expected = reference_forward(small_wan(layers=layers), inputs, Policy.load(phases))
            assert relative_rms(found, expected) <= COMPILED_FP8
    assert graphs() == 1


def test_numbers_of_a_policy_change_without_recompiling(phases):
    model, inputs = small_wan(), small_inputs((600.0,))
    compiled = compile_whole(model, policy=phases)
    changed = Policy.load(phases).with_values({"modes.near.keep": 0.2, "schedule.0.use": "near"})
    with torch.no_grad():
        before = compiled(**inputs)[0]
        fpsc.set_policy(model, changed)
        with NO_RECOMPILE:
            after = compiled(**inputs)[0]
        expected = reference_forward(model, inputs, changed)
    assert relative_rms(after, expected) <= COMPILED_FP8
    assert relative_rms(after, before) > COMPILED_FP8
    with pytest.raises(fpsc.StructureError, match=r"tile \(compiled with .*recompile=True"):
        fpsc.set_policy(model, Policy.from_dict({**PHASES, "tile": [3, 4, 5]}))
    with pytest.raises(ValueError, match="has not run with backend='fpsattn' yet"):
        fpsc.set_policy(torch.nn.Linear(2, 2), changed)


def test_an_edited_policy_file_is_read_when_the_model_is_compiled_again(phases):
    model, inputs = small_wan(), small_inputs((600.0,))
    with torch.no_grad():
        before = compile_whole(model, policy=phases)(**inputs)[0]
        changed = Policy.load(phases).with_values({"modes.near.keep": 0.2})
        changed.save(phases)
        torch._dynamo.reset()
        after = compile_whole(model, policy=phases)(**inputs)[0]
    assert relative_rms(after, reference_forward(model, inputs, changed)) <= COMPILED_FP8
    assert relative_rms(after, before) > COMPILED_FP8


def test_second_resolution_of_a_dynamic_graph(phases):
    model, policy = small_wan(), Policy.load(phases)
    compiled = torch.compile(
        model, backend="fpsattn", fullgraph=True, dynamic=True, options={"policy": phases}
    )
    with torch.no_grad():
        for grid in ((3, 8, 10), (2, 9, 12)):
            inputs = small_inputs((100.0,), grid)
            found = compiled(**inputs)[0]
            assert relative_rms(found, reference_forward(model, inputs, policy)) <= COMPILED_FP8


def test_short_videos_stay_dense_and_say_so():
    model, inputs = small_wan(), small_inputs()
    with (
        torch.no_grad(),
        pytest.warns(fpsc.NothingReplacedWarning, match="fewer than limits.min_tokens 4096"),
    ):
        found = torch.compile(model, backend="fpsattn")(**inputs)[0]
        assert relative_rms(found, small_wan()(**inputs)[0]) <= COMPILED_DENSE
    (report,) = fpsc.reports()
    assert report.policy == "wan-2.1-14b" and report.replaced == 0
    assert "240 video tokens" in report.sites[0].reason


def test_strict_raises_where_attention_stays_dense():
    compiled = compile_whole(small_wan(), policy="generic", strict=True)
    with torch.no_grad(), pytest.raises(Exception, match="strict: attention was left dense"):
        compiled(**small_inputs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "dense"}, "option 'polcy' is unknown; did you mean 'policy'"),
        ({"grid": [3, 8]}, "option 'grid.2'"),
        ({"strict": "perhaps"}, "option 'strict'"),
        ({"timestep": {"convention": "wan"}}, "expected one of flow"),
        ({"policy": "wann"}, "wann"),
        (
            {"kernel": "tritn"},
            "option 'kernel'.*expected one of auto, cpu, triton, gluon, hopper, reference",
        ),
        ({"kernel": "triton", "policy": "dense"}, "option 'kernel': .* set TRITON_INTERPRET=1"),
    ],
)
def test_bad_options_are_named(options, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    compiled = torch.compile(small_wan(), backend="fpsattn", options=options)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(**small_inputs())


def test_policy_for_another_number_of_layers(tmp_path):
    rules = {**PHASES, "except": [{"layers": [39], "use": "dense"}]}
    compiled = compile_whole(small_wan(), policy=write(tmp_path / "p.yaml", rules))
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"layer 39 does not exist; the model has 2"),
    ):
        compiled(**small_inputs())


def test_grid_that_does_not_match_is_refused():
    compiled = compile_whole(small_wan(), policy="dense", grid=[3, 8, 9], strict=True)
    with torch.no_grad(), pytest.raises(Exception, match="has another number of tokens"):
        compiled(**small_inputs())


def test_unknown_convention_takes_the_densest_row(phases):
    class Renamed(torch.nn.Module):
        """A model of a class that no family knows."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = small_wan()

        def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
            return self.inner(hidden_states, timestep, encoder_hidden_states, None, return_dict)

    model, inputs = Renamed().eval(), small_inputs((100.0,))
    with torch.no_grad():
        expected = model(**inputs)[0]
        with pytest.warns(UserWarning, match="convention of this model's timestep is not known"):
            found = compile_whole(model, policy=phases)(**inputs)[0]
        assert relative_rms(found, expected) <= COMPILED_DENSE
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            stated = compile_whole(model, policy=phases, timestep={"convention": "flow"})
            found = stated(**inputs)[0]
        policy = Policy.load(phases)
        assert relative_rms(found, reference_forward(model.inner, inputs, policy)) <= COMPILED_FP8


def test_timestep_that_is_a_number_takes_the_densest_row(phases):
    model, inputs = small_wan(), small_inputs((100.0,))

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, hidden_states, timestep, text):
            return self.inner(hidden_states, torch.full((1,), timestep), text, return_dict=False)

    with torch.no_grad():
        expected = model(**inputs)[0]
        # No hook of the model runs where its forward is called by itself.
        options = {"policy": phases, "timestep": {"convention": "flow"}}
        compiled = torch.compile(Fixed().eval().forward, backend="fpsattn", options=options)
        with pytest.warns(UserWarning, match="timestep is not a tensor"):
            found = compiled(inputs["hidden_states"], 100.0, inputs["encoder_hidden_states"])[0]
    assert relative_rms(found, expected) <= COMPILED_DENSE


def test_fp8_cells_without_emulation_are_computed_in_the_input_dtype(phases):
    model, inputs = small_wan(), small_inputs((100.0,))
    exact = {**PHASES["modes"], "window": {**PHASES["modes"]["window"], "dtype": "bf16"}}
    policy = Policy.from_dict({**PHASES, "modes": exact})
    expected = reference_forward(model, inputs, policy)
    with torch.no_grad():
        found = compile_whole(model, policy=phases, emulate_fp8=False)(**inputs)[0]
    assert relative_rms(found, expected) <= COMPILED_DENSE


def test_a_device_without_fp8_computes_in_the_input_dtype_and_says_so(phases, monkeypatch):
    for module in (backend, runtime):
        monkeypatch.setattr(module, "fp8_support", lambda device: (False, "it is old"))
    found = {}
    for policy in (phases, "dense"):
        torch._dynamo.reset()
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compile_whole(small_wan(), policy=policy)(**small_inputs((100.0,)))
        found[policy] = [str(w.message) for w in caught if "fp8" in str(w.message)]
    note = "fp8 modes of the policy run in the input's dtype: it is old"
    assert found == {phases: [f"fpsattn: {note}"], "dense": []}
    assert [r.notes for r in fpsc.reports()] == [[note], []]
    assert note in str(fpsc.reports()[0])


class Constants(CustomGraphPass):
    """Notes the structural arguments of every attention: kinds and implementation."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.fpsc.attention.default:
                names = [a.name for a in node.target._schema.arguments]
                given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
                self.seen.append((given.get("kinds", 3), given.get("implementation", "auto")))

    def uuid(self) -> None:
        return None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3, "auto")),
        ({"emulate_fp8": False, "kernel": "cpu"}, (1, "cpu")),
        ({"kernel": "reference"}, (3, "reference")),
    ],
    ids=str,
)
def test_kinds_and_kernel_are_constants_of_the_graph(options, expected, phases):
    constants = Constants()
    model, inputs = small_wan(), small_inputs((600.0,))
    compiled = compile_whole(model, policy=phases, post_grad_custom_pre_pass=constants, **options)
    with torch.no_grad():
        found = compiled(**inputs)[0]
        if expected[0] == 3:
            reference = reference_forward(model, inputs, Policy.load(phases))
            assert relative_rms(found, reference) <= COMPILED_FP8
    assert constants.seen == [expected] * 2
    (kernel,) = fpsc.reports()[0].kernels
    assert kernel.startswith("reference (" if expected[1] == "reference" else "cpu (the CPU kernel")


def test_a_policy_with_other_kinds_is_another_structure(phases):
    model, inputs = small_wan(), small_inputs((600.0,))
    compiled = compile_whole(model, policy=phases)
    only = {name: {**mode, "dtype": "fp8"} for name, mode in PHASES["modes"].items()}
    with torch.no_grad():
        compiled(**inputs)
        with pytest.raises(fpsc.StructureError, match="dtypes"):
            fpsc.set_policy(model, Policy.from_dict({**PHASES, "modes": only}))
        scales = {"modes.window.scales": {"qk": "head"}, "modes.near.scales": {"qk": [2, 1, 2]}}
        changed = Policy.load(phases).with_values(scales)
        fpsc.set_policy(model, changed)
        with NO_RECOMPILE:
            found = compiled(**inputs)[0]
    assert relative_rms(found, reference_forward(model, inputs, changed)) <= COMPILED_FP8


def test_a_grid_of_another_length_is_an_error_at_every_call(phases, monkeypatch):
    """As where a graph's symbols are read wrongly: on a GPU no table would be looked at."""
    compiled = compile_whole(small_wan(), policy=phases)
    with torch.no_grad():
        compiled(**small_inputs((100.0,)))
        monkeypatch.setattr(launch.Launcher, "_grid", lambda *_: (3, 8, 9))
        message = r"grid \[3, 8, 9\] with 0 \+ 0 text tokens makes 216 tokens.* has 240; state"
        with pytest.raises(ValueError, match=message):
            compiled(**small_inputs((100.0,)))


def test_user_options_reach_inductor_and_the_users_own_pass_runs(phases):
    class Spy(CustomGraphPass):
        seen = 0

        def __call__(self, graph):
            Spy.seen += 1
            assert any("fpsc.attention" in str(n.target) for n in graph.nodes)

        def uuid(self):
            return None

    options = {"policy": phases, "post_grad_custom_pre_pass": Spy()}
    compiled = torch.compile(small_wan(), backend="fpsattn", fullgraph=True, options=options)
    with torch.no_grad():
        compiled(**small_inputs())
    assert Spy.seen == 1


def test_nonfinite_input_reaches_the_output():
    model = small_wan()
    inputs = small_inputs()
    inputs["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        found = compile_whole(model, policy="dense")(**inputs)[0]
    assert found.isnan().any()
