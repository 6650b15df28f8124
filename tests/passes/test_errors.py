"""An error of ours is no error of the model: what it met stays dense, with the error's words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fpsc
from fpsc.passes import manager, normalise, rewrite
from fpsc.passes.manager import Analysis
from fpsc.passes.rewrite import Target
from tests.passes.test_passes import Video, inputs, plain
from tests.passes.test_spellings import after, capture

pytestmark = pytest.mark.usefixtures("no_inductor")


def two(block: Any, x: Any, text: Any, grid: Any) -> Any:
    """One attention that is written out, and one SDPA call."""
    written = block.call
    block.call = torch.nn.functional.scaled_dot_product_attention
    x = block(x)
    block.call = written
    return block(x)


def broken(*args: Any, **kwargs: Any) -> Any:
    raise LookupError("an odd graph")


def analyse(strict: bool) -> Analysis:
    gm, _ = capture(Video(two, after), *inputs())
    return manager.analyse(gm, strict=strict)


def test_an_attention_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalise, "read_softmax", broken)
    sdpa, written = analyse(strict=False).decisions
    assert isinstance(sdpa, Target)
    assert "(LookupError: an odd graph); please report" in written
    with pytest.raises(LookupError, match="an odd graph"):
        analyse(strict=True)


@pytest.mark.parametrize("name", ["match", "infer_grid"])
def test_a_graph_that_cannot_be_judged(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(manager, name, broken)
    found = analyse(strict=False)
    assert len(found.decisions) == 2
    assert all("this graph (LookupError: an odd graph)" in d for d in found.decisions)
    with pytest.raises(LookupError, match="an odd graph"):
        analyse(strict=True)


@pytest.mark.parametrize(
    ("module", "name", "sites"),
    [(manager, "match", 1), (rewrite, "node_arguments", 1), (normalise, "Program", 0)],
)
def test_the_model_runs_dense(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, sites: int
) -> None:
    model, given = Video(plain), inputs()
    monkeypatch.setattr(module, name, broken)
    fpsc.reports(clear=True)
    options: dict[str, Any] = {"policy": "dense", "timestep": {"convention": "flow"}}
    with torch.no_grad():
        with pytest.warns(fpsc.NothingReplacedWarning, match="LookupError: an odd graph"):
            found = torch.compile(model, backend="fpsattn", options=options)(*given)
        assert torch.equal(found, model(*given))
        reports = fpsc.reports()
        assert [len(r.sites) for r in reports] == [sites] * bool(sites)
        assert not any(r.replaced for r in reports)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="an odd graph"):
            options["strict"] = True
            torch.compile(model, backend="fpsattn", options=options)(*given)
