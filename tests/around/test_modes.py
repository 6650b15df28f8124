"""Batches, sizes, dtypes, kinds of timesteps, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fpsc
from fpsc.policy import Policy
from tests.around.common import POLICY, TIMESTEPS, compiled
from tests.compiled import NO_RECOMPILE
from tests.thresholds import COMPILED_BF16, COMPILED_FP8, COMPILED_GRAD, relative_rms
from tests.wan import reference_forward, small_inputs, small_wan

RULES = Policy.from_dict(POLICY)
WAYS = pytest.mark.parametrize("way", ["whole", "blocks"])


def assert_equal(run: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        expected = reference_forward(small_wan(), inputs, RULES)
        assert relative_rms(run(**inputs)[0], expected) <= COMPILED_FP8


@WAYS
def test_batches_of_other_sizes(way: str, policy: str, no_inductor: None) -> None:
    run = compiled(small_wan(), way, policy)
    for timesteps in ((600.0,), (950.0, 100.0)):
        assert_equal(run, small_inputs(timesteps))
    with NO_RECOMPILE:  # the second graph takes any batch
        for timesteps in ((100.0, 600.0, 950.0), (600.0, 600.0, 100.0), (100.0,)):
            assert_equal(run, small_inputs(timesteps))


@WAYS
@pytest.mark.parametrize("dynamic", [None, True])
def test_other_resolutions(way: str, dynamic: bool | None, policy: str, no_inductor: None) -> None:
    """At the second one Dynamo takes sizes for dynamic; after that no other one is compiled for."""
    run = compiled(small_wan(), way, policy, dynamic=dynamic)
    for grid in ((3, 8, 10), (2, 4, 5)):
        assert_equal(run, small_inputs((600.0,), grid))
    assert all(report.replaced for report in fpsc.reports())
    with NO_RECOMPILE:
        for grid in ((4, 12, 6), (5, 10, 8), (3, 8, 10)):
            assert_equal(run, small_inputs((600.0,), grid))


@WAYS
def test_autocast(way: str, policy: str, no_inductor: None) -> None:
    run = compiled(small_wan(), way, policy)
    for timestep in TIMESTEPS:
        inputs = small_inputs((timestep,))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            expected = reference_forward(small_wan(), inputs, RULES)
            found = run(**inputs)[0]
        assert relative_rms(found, expected) <= COMPILED_BF16
    assert all(report.replaced for report in fpsc.reports())


@WAYS
def test_train_and_eval(way: str, policy: str, no_inductor: None) -> None:
    model = small_wan()
    run = compiled(model, way, policy)
    for training in (True, False):
        model.train(training)
        assert_equal(run, small_inputs((600.0,)))
    with NO_RECOMPILE:
        model.train()
        assert_equal(run, small_inputs((100.0,)))


@WAYS
def test_a_timestep_for_each_token(way: str, policy: str, no_inductor: None) -> None:
    """The noisiest token decides; those of a conditioning frame are clean."""
    run = compiled(small_wan(), way, policy)
    for timestep in TIMESTEPS:
        inputs = small_inputs((timestep,))
        inputs["timestep"] = torch.full((1, 240), timestep)
        inputs["timestep"][:, :80] = 0
        assert_equal(run, inputs)


@WAYS
def test_integer_timesteps(way: str, policy: str, no_inductor: None) -> None:
    run = compiled(small_wan(), way, policy)
    for timestep in TIMESTEPS:
        inputs = small_inputs((timestep,))
        assert_equal(run, {**inputs, "timestep": inputs["timestep"].long()})


class Numbers(nn.Module):
    """A model whose timestep is a number of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_wan()

    def forward(self, hidden_states: Any, timestep: float, text: Any) -> Any:
        return self.inner(hidden_states, torch.full((1,), timestep), text, return_dict=False)


@WAYS
def test_a_timestep_that_is_a_number(way: str, policy: str, no_inductor: None) -> None:
    model = Numbers().eval()
    options = {"timestep": {"convention": "flow"}}
    if way == "blocks":
        compiled(model.inner, way, policy, **options)
        run: Any = model
    else:
        run = compiled(model, way, policy, **options)
    for timestep in TIMESTEPS:
        inputs = small_inputs((timestep,))
        with torch.no_grad():
            expected = reference_forward(small_wan(), inputs, RULES)
            found = run(inputs["hidden_states"], timestep, inputs["encoder_hidden_states"])[0]
        assert relative_rms(found, expected) <= COMPILED_FP8
    assert all(r.replaced for r in fpsc.reports())
    assert fpsc.reports()[0].timestep == "the root module"


def gradients(model: nn.Module, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    for loss in reversed(losses):  # the last forward first: the others' rows are not the latest
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_is_computed_again_with_its_own_row(
    reentrant: bool, policy: str, no_inductor: None
) -> None:
    """Three forwards, each in another phase, then their backwards."""

    def checkpoint(function: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    model, plain = small_wan().train(), small_wan().train()
    batches = [small_inputs((t,)) for t in TIMESTEPS]
    for inputs in batches:
        inputs["hidden_states"].requires_grad_()  # a reentrant checkpoint asks for it
    expected = gradients(
        plain, [reference_forward(plain, i, RULES).square().sum() for i in batches]
    )
    model.enable_gradient_checkpointing(checkpoint)
    run = compiled(model, "blocks", policy)
    found = gradients(model, [run(**i)[0].square().sum() for i in batches])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6 * gradient.numel() ** 0.5:
            assert relative_rms(found[name], gradient) <= COMPILED_GRAD, name


def test_a_checkpoint_that_copies_its_inputs_is_refused(policy: str, no_inductor: None) -> None:
    def checkpoint(function: Any, *args: Any) -> Any:
        def on_copies(*copied: Any) -> Any:
            moved = [a.clone() if isinstance(a, torch.Tensor) else a for a in copied]
            return function(*moved)

        return torch.utils.checkpoint.checkpoint(on_copies, *args, use_reentrant=False)

    model = small_wan().train()
    model.enable_gradient_checkpointing(checkpoint)
    run = compiled(model, "blocks", policy)
    loss = run(**small_inputs((600.0,)))[0].square().sum()
    with pytest.raises(RuntimeError, match="nothing tells which forward it belongs to"):
        loss.backward()
