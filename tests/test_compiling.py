"""`fpsc.compile`, and the warning about models whose video attention no graph held."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fpsc
from fpsc.compiling import repeated_blocks
from fpsc.policy import find
from tests.passes.foreign import GRID, TEXT, WIDTH, Layer, Model
from tests.thresholds import COMPILED_DENSE, relative_rms
from tests.wan import small_inputs, small_wan

pytestmark = pytest.mark.filterwarnings("ignore:.*convention of this model's timestep")
FLAGS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")


@pytest.fixture(autouse=True)
def _fresh(no_inductor: None) -> None:
    fpsc.reports(clear=True)
    counters.clear()


def by_length(layer: nn.Module, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    """Reads the longest text from the device in front of the attention, and drops the rest."""
    length = int((text != 0).any(-1).sum(1).max())
    return layer(x) + text[:, :length].mean()


def by_branch(layer: nn.Module, x: Tensor, text: Tensor, grid: Any) -> Tensor:
    """Branches on data inside the frame that attends, as no flag of Dynamo can trace."""
    with torch.no_grad():
        if bool((text.sum() > 1e9).any()):
            return x
    return torch.compiler.disable(layer)(x)


def arguments(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    t, y, x = GRID
    return (
        torch.randn(batch, 4, t, 2 * y, 2 * x),
        torch.full((batch,), 500.0),
        torch.randn(batch, TEXT, 16),
    )


def replaced() -> int:
    return sum(report.replaced for report in fpsc.reports())


def warnings_of(call: Callable[[], Any], times: int) -> list[str]:
    """Messages of `NothingReplacedWarning` that say no graph held the attention."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call()
    messages = [str(w.message) for w in caught if w.category is fpsc.NothingReplacedWarning]
    return [m for m in messages if "none of its graphs held" in m]


def test_flags_are_set_for_this_model_alone() -> None:
    model, given = Model(Layer(), by_length), arguments()
    with torch.no_grad():
        expected = model(*given)
        other = torch.compile(Model(Layer(), by_length), backend="eager")
        other(*given)
        assert counters["graph_break"].total() == 1  # `int` of a tensor
        fpsc.compile(model, policy="dense")
        assert relative_rms(model(*given), expected) <= COMPILED_DENSE
        assert replaced() == 1 and counters["graph_break"].total() == 1
        torch._dynamo.reset()
        other(*given)
        assert counters["graph_break"].total() == 2
    assert not any(getattr(torch._dynamo.config, flag) for flag in FLAGS)


def test_without_it_the_second_forward_warns_with_the_fix() -> None:
    model, given = Model(Layer(), by_branch), arguments()
    compiled = torch.compile(model, backend="fpsattn", options={"policy": "dense"})
    with torch.no_grad():
        assert warnings_of(lambda: compiled(*given), 1) == []
        (message,) = warnings_of(lambda: compiled(*given), 3)  # and only once
    assert "Model takes a latent and a timestep" in message
    assert "fpsc.compile(model)" in message
    assert "Dynamo broke graphs at: " in message


def test_the_first_call_of_fpsc_compile_warns_already() -> None:
    model, given = Model(Layer(), by_branch), arguments()
    fpsc.compile(model, policy="dense")
    with torch.no_grad():
        (message,) = warnings_of(lambda: model(*given), 3)
    assert "fullgraph=True" in message and "blocks=True" in message


def test_models_that_show_their_attention_do_not_warn() -> None:
    model, inputs = small_wan(), small_inputs()
    compiled = torch.compile(model, backend="fpsattn", options={"policy": "dense"})
    with torch.no_grad():
        assert warnings_of(lambda: compiled(**inputs), 3) == []
    assert replaced() == 2


def test_models_without_latent_or_timestep_do_not_warn() -> None:
    words = torch.compile(nn.Linear(8, 8), backend="fpsattn")
    decoder = torch.compile(nn.Conv3d(4, 4, 1), backend="fpsattn")
    with torch.no_grad():
        assert warnings_of(lambda: words(torch.randn(2, 8)), 3) == []
        assert warnings_of(lambda: decoder(torch.randn(1, 4, 2, 4, 4)), 3) == []


def test_whole_and_blocks_equal_eager() -> None:
    inputs = small_inputs()
    with torch.no_grad():
        expected = small_wan()(**inputs)[0]
        for blocks in (False, True):
            fpsc.reports(clear=True)
            policy = find("dense") if blocks else "dense"
            model = fpsc.compile(small_wan(), policy=policy, blocks=blocks, fullgraph=True)
            assert relative_rms(model(**inputs)[0], expected) <= COMPILED_DENSE
            assert replaced() == (1 if blocks else 2)  # one graph serves both blocks


class Plain(Model):
    """With two layers, and no list of what repeats."""

    def __init__(self) -> None:
        super().__init__(Layer())
        self.layers = nn.ModuleList([Layer(), Layer()])


def test_blocks_of_a_model_that_does_not_list_them() -> None:
    torch.manual_seed(0)
    model, given = Plain(), arguments()
    assert repeated_blocks(model) == list(model.layers)
    with torch.no_grad():
        expected = model(*given)
        fpsc.compile(model, policy="dense", blocks=True, options={"grid": GRID})
        assert relative_rms(model(*given), expected) <= COMPILED_DENSE
    assert replaced() == 1


def test_repeated_blocks() -> None:
    wan = small_wan(layers=3)
    assert repeated_blocks(wan) == list(wan.blocks)
    assert repeated_blocks(Model(Layer())) == []  # a list of one repeats nothing
    mixed = nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])
    inner = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(WIDTH, 1)}) for _ in range(2)])
    assert repeated_blocks(nn.ModuleDict({"mixed": mixed, "inner": inner})) == list(inner)


def test_a_copy_is_not_compiled() -> None:
    model = fpsc.compile(small_wan(), policy="dense")
    assert copy.deepcopy(model)._compiled_call_impl is None


def test_wrong_use_says_what_to_do() -> None:
    class Pipeline:
        transformer = nn.Identity()

    with pytest.raises(TypeError, match=r"found Pipeline.*fpsc\.compile\(pipe\.transformer\)"):
        fpsc.compile(Pipeline())
    with pytest.raises(ValueError, match=r"blocks: expected a ModuleList .* in Linear, found none"):
        fpsc.compile(nn.Linear(1, 1), blocks=True)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, found int"):
        fpsc.compile(3)
