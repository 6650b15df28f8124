"""Each level measured once on a tiny model; what the numbers are is not asserted, what they say is.

One model and one set of gates serve all: compiling is what these tests take their time for.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.models import SMOKE
from fpsc.bench import attention, compiling, forward, op, sampling
from fpsc.bench.cases import Spec
from fpsc.bench.measure import Effort
from fpsc.bench.record import Case, Level, Role, Status
from fpsc.bench.run import settings
from fpsc.bench.subject import Machine, sized

CPU = Machine(torch.device("cpu"), torch.float32)
TINY = SMOKE.own
ONCE = Effort(rounds=2, least=1)


def spec(level: Level, **changes: Any) -> Spec:
    given: dict[str, Any] = {
        "own": TINY,
        "grid": (4, 8, 16),
        "text_tokens": 4,
        "keeps": (0.25,),
        "contenders": ("eager", "Inductor"),
        "whole": True,
    }
    return Spec(f"{level}/tiny", level, **{**given, **changes})


def test_an_op_beside_every_attention_that_is_here() -> None:
    given = Spec(
        "attention/x", Level.attention, grid=(4, 6, 16), heads=2, head_dim=16, keeps=(0.25,),
        whole=True, gather=True,
    )  # fmt: skip
    with settings():
        found = attention.measure(sized(given, CPU), CPU, ONCE)
    by_name = {result.name: result for result in found.results}
    timed = {result.name for result in found.measured}
    assert {"SDPA (default)", "SDPA flash", "SDPA math", "fpsattn keep 0.25"} <= timed
    assert any(name.startswith("FlexAttention keep 0.25") for name in timed)
    assert by_name["SDPA cuDNN"].reason == "needs a GPU"
    ours = by_name["fpsattn keep 0.25"]
    assert [gate.passed for gate in ours.gates] == [True, True]
    assert ours.error is not None and ours.error_fp8 is not None
    assert ours.error > 0.1 < ours.error_fp8  # random keys: what is skipped is missed
    assert ours.visited is not None and 0.1 < ours.visited < 0.4
    flex = next(r for r in found.results if r.name.startswith("FlexAttention"))
    assert flex.error == pytest.approx(ours.error, rel=0.05)  # it skips the same
    assert found.rounds == 2 and found.best in timed


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong by a little, in a contender and in fpsattn."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * 1.001

    right = op.F.scaled_dot_product_attention
    given = Spec("x", Level.attention, grid=(2, 6, 16), heads=1, head_dim=16, keeps=(), whole=True)
    monkeypatch.setattr(op.F, "scaled_dot_product_attention", broken)
    found = attention.measure(sized(given, CPU), CPU, ONCE)
    eager = found.eager
    assert eager is not None and eager.status is Status.wrong and eager.seconds is None
    assert "error 0.001 to dense attention" in eager.reason
    assert found.status is Status.failed and found.best is None


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    machine = replace(CPU, traces=str(tmp_path_factory.mktemp("traces")))
    with settings():
        case = forward.measure(
            sized(spec(Level.transformer, policies=("quick",)), machine), machine, ONCE
        )
    for result in case.measured:
        if result.split is not None:
            assert result.split.trace is not None
            trace = Path(machine.traces or "") / result.split.trace
            with gzip.open(trace, "rt") as opened:
                assert json.load(opened)["traceEvents"]
    return case


def test_a_transformer_beside_eager_and_inductor(transformer: Case) -> None:
    by_name = {result.name: result for result in transformer.results}
    assert by_name["eager"].role is Role.eager and by_name["eager"].error == 0
    assert by_name["Inductor"].gates[0].passed
    ours = by_name["fpsattn keep 0.25"]
    assert [gate.against.split(",")[0] for gate in ours.gates] == ["eager", "reference op"]
    assert ours.to_eager is not None and ours.to_best is not None
    assert ours.compile_seconds is not None and ours.error is not None and ours.error > 1e-4
    assert ours.error_fp8 is not None
    assert by_name["Inductor, _native_cudnn"].reason == "needs a GPU"
    assert by_name["Inductor, flex"].status is Status.skipped


def test_a_policy_is_timed_in_each_of_its_phases(transformer: Case) -> None:
    phases = [r for r in transformer.results if r.policy == "quick"]
    assert [r.name.split(", ")[1] for r in phases] == [
        "noise 1..0.95",
        "noise 0.95..0.8",
        "noise 0.8..0",
    ]
    keeps = [r.keep or 0.0 for r in phases]
    assert keeps[0] == 1.0 and keeps[0] > keeps[1] > keeps[2] > 0
    errors = [r.error or 0.0 for r in phases]
    assert errors[0] < 1e-5 < errors[1] < errors[2]  # the timestep arrives: dense is dense


def test_the_split_adds_up(transformer: Case) -> None:
    ours = transformer.of("fpsattn keep 0.25")
    assert ours is not None and ours.split is not None
    assert ours.split.attention > 0 and ours.split.linear > 0
    kinds = {kernel.name: kernel.kind for kernel in ours.split.top}
    assert kinds["fpsc::attention"] == "attention"
    # Cross-attention is no self-attention: it is in the rest.
    assert kinds["aten::_scaled_dot_product_flash_attention_for_cpu"] == "rest"
    eager = transformer.of("eager")
    assert eager is not None and eager.split is not None
    assert any(kernel.kind == "attention" for kernel in eager.split.top)


def test_a_sampling_loop_has_its_steps() -> None:
    given = spec(Level.sampling, keeps=(), policies=("quick",), steps=4)
    with settings():
        found = sampling.measure(sized(given, CPU), CPU, Effort(rounds=2, least=2))
    ours = found.of("fpsattn quick")
    assert ours is not None and len(ours.steps) == 4 and ours.seconds is not None
    noise = [step.noise for step in ours.steps]
    assert noise == sorted(noise, reverse=True) and noise[0] > 0.95
    assert ours.steps[0].modes == ("dense",)
    assert ours.steps[-1].modes == ("sparse",)
    total = sum(step.seconds.samples[0] for step in ours.steps)
    assert ours.seconds.samples[0] == pytest.approx(total, rel=1e-4)
    eager = found.eager
    assert eager is not None and len(eager.steps) == 4 and eager.steps[0].modes == ()


def test_a_training_step_changes_no_weight() -> None:
    given = sized(spec(Level.training, keeps=(), contenders=("eager",)), CPU)
    with settings():
        found = forward.measure(given, replace(CPU, profile=False), ONCE)
    eager = found.eager
    # All rounds computed the same gradient as the first: the weights did not move.
    assert eager is not None and eager.error == 0 and eager.seconds is not None


def test_a_block_alone_is_given_its_grid() -> None:
    machine = replace(CPU, profile=False)
    given = sized(spec(Level.block, contenders=("eager",)), machine)
    with settings():
        found = forward.measure(given, machine, ONCE)
    ours = found.of("fpsattn keep 0.25")
    assert ours is not None and ours.status is Status.measured, ours
    assert ours.error is not None and ours.error > 1e-4


def test_memory_counts_what_a_call_has_at_its_peak() -> None:
    from fpsc.bench.profile import peak

    found = peak(lambda: [torch.empty(1000), torch.empty(500)][0].sum(), CPU.device)
    assert 6000 <= found.peak < 8000


def test_compile_times_come_from_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cold one of fpsattn is real; each takes as long as all other tests here."""
    real = compiling.child
    folders: list[Path] = []

    def child(case: Any, machine: Machine, name: str, caches: Path) -> dict[str, Any]:
        folders.append(caches)
        if name == compiling.INDUCTOR:
            return {"seconds": 9.0, "second": 0.1, "error": 1e-7, "replaced": 0}
        if not list(caches.iterdir()):
            return real(case, machine, name, caches)
        assert any((caches / "torchinductor_cache_dir").rglob("*"))  # what the cold one left
        return {"seconds": 3.0, "second": 0.1, "error": 1e-2, "replaced": 1}

    monkeypatch.setattr(compiling, "child", child)
    given = sized(spec(Level.compile), CPU)
    cold, warm = compiling.measure(given, CPU, Effort(rounds=1))
    assert (cold.name, warm.name) == ("compile/tiny/cold", "compile/tiny/warm")
    assert (cold.problem.cache, warm.problem.cache) == ("cold", "warm")
    for found in (cold, warm):
        assert [r.status for r in found.results] == [Status.measured] * 2, found
    ours, again = (found.of("fpsattn keep 0.25") for found in (cold, warm))
    assert ours is not None and again is not None and ours.error is not None
    assert ours.error > 1e-4 and again.error == 1e-2
    # Cold and warm share their caches, contenders do not.
    assert folders[0] == folders[1] != folders[2] == folders[3]


def test_a_compile_that_replaced_nothing_is_wrong() -> None:
    given = sized(spec(Level.compile), CPU)
    sample = {"seconds": 9.0, "second": 0.1, "error": 1e-7, "replaced": 0}
    found = compiling.result_of("fpsattn keep 0.25", [sample], given)
    assert (found.status, found.reason) == (Status.wrong, "replaced 0 of 1 attentions")
    assert found.seconds is None
    failed = compiling.result_of("Inductor", [sample, {"failed": "no compiler"}], given)
    assert (failed.status, failed.reason) == (Status.failed, "no compiler")


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    bad = replace(TINY, config={**TINY.config, "patch_size": "no"})
    given = replace(sized(spec(Level.compile), CPU), model=bad)
    found = compiling.child(given, CPU, "Inductor", tmp_path)
    assert "WanTransformer3DModel rejects the configuration" in found["failed"]
