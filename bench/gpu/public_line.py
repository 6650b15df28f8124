"""Part 0: `torch.compile(model, backend="fpsattn")` on a Wan transformer with real kernels.

Numbers are compared on the small model of the tests; counts and times are taken on a few layers of
Wan2.1-1.3B at 480p. That graphs are recorded and replayed is read from the profiler and from
torch's graph manager.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch._dynamo.utils import counters

import fpsc
from bench.gpu.problem import one_mode, rounded
from bench.gpu.profiler import calls, kernels, profiled
from bench.gpu.run import Case, Record, Setup
from fpsc.backend import fpsattn as fpsattn_of_checkout
from fpsc.kernels.select import select
from fpsc.policy import Policy, find
from tests.thresholds import (
    GPU_MODEL_BF16,
    GPU_MODEL_FP8,
    GPU_MODEL_GRAD,
    relative_rms,
)
from tests.wan import PHASES, reference_forward, small_inputs, small_wan

NO_RECOMPILE = torch._dynamo.config.patch(error_on_recompile=True)
GRID = (3, 8, 10)
TURNED = (3, 10, 8)

Inputs = dict[str, Any]


def cases(setup: Setup) -> Iterator[Case]:
    yield "the kernel that serves", lambda: serving(setup)
    yield "three phases against the reference", lambda: phases(setup)
    # Of the two ways the one that is not the default of the kernel that serves.
    yield (
        f"three phases, norms and rotations {'left to Inductor' if setup.cuda else 'in the op'}",
        lambda: phases(setup, fuse_prologue=not setup.cuda),
    )
    yield "dense policy against eager", lambda: dense(setup)
    modes = [None, "reduce-overhead"] if setup.cuda else [None]
    for mode in modes:
        yield f"fifty timesteps, {mode or 'plainly'}", partial(fifty, setup, mode)
    for mode in modes:
        yield f"portrait, then landscape, {mode or 'plainly'}", partial(turned, setup, mode)
    yield "gradients against the reference", lambda: gradients(setup)
    yield "gradients, backward in fp8", lambda: gradients(setup, backward="fp8")
    yield "a training step of a few layers", lambda: training(setup)


def serving(setup: Setup) -> Record:
    """Part 0 would pass on any device; it is about this kernel."""
    choice = select(setup.device, torch.bfloat16, 128, fp8=True)
    expected = ("triton", "hopper") if setup.cuda else ("cpu",)
    right = choice.name in expected
    problems = (
        [] if right else [f"expected {' or '.join(expected)}, got {choice.name}: {choice.reason}"]
    )
    return {
        "problems": problems,
        "kernel": choice.name,
        "reason": choice.reason,
        "backend": "by name" if backend() == "fpsattn" else "as a function: fpsc is not installed",
    }


# ---- numbers, on the small model of the tests


def small_model(setup: Setup) -> WanTransformer3DModel:
    """In bfloat16 on a GPU, whose tensor cores have no float32 product."""
    model = small_wan(layers=1 if setup.smoke else 2)
    return model.bfloat16() if setup.cuda else model


def inputs_of(setup: Setup, timestep: float, grid: tuple[int, int, int]) -> Inputs:
    inputs = small_inputs((timestep,), grid)
    return halved(inputs) if setup.cuda else inputs


def three_phases(setup: Setup) -> Policy:
    """All tiles, half of them, one; and where there is a second layer, a head of its own in it."""
    return Policy.from_dict({**PHASES, "except": [] if setup.smoke else PHASES["except"]})


def phases(setup: Setup, **others: Any) -> Record:
    policy = three_phases(setup)
    errors = {}
    with torch.no_grad(), saved(policy) as path:
        compiled = fpsattn(setup, small_model(setup).to(setup.device), path, **others)
        for t in (950.0, 600.0, 100.0):
            inputs = inputs_of(setup, t, GRID)
            expected = reference_forward(small_model(setup), inputs, policy)
            errors[f"timestep {t:.0f}"] = relative_rms(
                compiled(**to(inputs, setup.device))[0].cpu(), expected
            )
    return judged(errors, GPU_MODEL_FP8)


def dense(setup: Setup) -> Record:
    """bfloat16 no further from eager's float32 than eager's own bfloat16 is."""
    model = small_wan(layers=1 if setup.smoke else 2).to(setup.device)
    inputs = to(small_inputs((500.0,), GRID), setup.device)
    half, half_inputs = copy.deepcopy(model).bfloat16(), halved(inputs)
    with torch.no_grad():
        expected = model(**inputs)[0]
        eager = relative_rms(half(**half_inputs)[0], expected)
        found = relative_rms(fpsattn(setup, half, "dense")(**half_inputs)[0], expected)
    record = judged({"bfloat16": found}, GPU_MODEL_BF16 * eager)
    return {**record, "errors": {**record["errors"], "bfloat16, eager": rounded(eager)}}


def turned(setup: Setup, mode: str | None) -> Record:
    """Two grids of one length: the second compiles nothing, and both are right."""
    policy = three_phases(setup)
    errors = {}
    model = small_model(setup).to(setup.device)
    counters.clear()
    with torch.no_grad(), saved(policy) as path:
        model.compile_repeated_blocks(
            backend=backend(), fullgraph=True, options=options(setup, path, mode)
        )
        for name, grid in (("portrait", GRID), ("landscape", TURNED), ("portrait again", GRID)):
            inputs = inputs_of(setup, 100.0, grid)
            expected = reference_forward(small_model(setup), inputs, policy)
            for _ in range(3 if mode else 1):  # warm, record, replay
                torch.compiler.cudagraph_mark_step_begin()  # a step is all blocks, not each
                found = model(**to(inputs, setup.device))[0].cpu()
            errors[name] = relative_rms(found, expected)
    record = judged(errors, GPU_MODEL_FP8)
    graphs = counters["stats"]["unique_graphs"]
    if graphs != 1:
        record["problems"].append(f"expected one graph for both grids, found {graphs}")
    return {**record, "compiles": graphs}


def gradients(setup: Setup, **others: Any) -> Record:
    """others: options of the backend."""
    policy = three_phases(setup)
    model, inputs = small_model(setup), inputs_of(setup, 600.0, GRID)
    weight = torch.randn_like(inputs["hidden_states"])
    there = copy.deepcopy(model).to(setup.device)
    fp8 = others.get("backward") == "fp8"
    expected = reference_forward(model, inputs, policy, fp8_backward=fp8)
    (expected * weight).sum().backward()
    with saved(policy) as path:
        out = fpsattn(setup, there, path, **others)(**to(inputs, setup.device))[0]
        (out * weight.to(setup.device)).sum().backward()
    found = dict(there.named_parameters())
    errors = {}
    for name, parameter in model.named_parameters():
        gradient, size = parameter.grad, parameter.numel() ** 0.5
        if gradient is not None and gradient.norm() > 1e-6 * size:
            other = found[name].grad
            assert other is not None
            errors[name] = relative_rms(other.cpu(), gradient)
    record = judged(errors, GPU_MODEL_GRAD)
    most = sorted(errors, key=lambda name: -errors[name])[:5]
    return {**record, "errors": {name: rounded(errors[name]) for name in most}}


def judged(errors: dict[str, float], allowed: float) -> Record:
    problems = [
        f"{name}: error {rounded(error)}, allowed is {allowed:.3g}"
        for name, error in errors.items()
        if not error <= allowed
    ]
    return {"problems": problems, "errors": {n: rounded(error) for n, error in errors.items()}}


# ---- counts and times, on a few layers of a real model


def few_layers(setup: Setup) -> tuple[WanTransformer3DModel, Inputs]:
    """Wan2.1-1.3B with four layers, at 832x480 and 81 frames; in a smoke test, the small model."""
    if setup.smoke:
        return small_model(setup), small_inputs((999.0,), GRID)
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = WanTransformer3DModel(num_layers=4, num_attention_heads=12, ffn_dim=8960)
    inputs = {
        "hidden_states": torch.randn(1, 16, 21, 60, 104, device=setup.device),
        "timestep": torch.full((1,), 999.0, device=setup.device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=setup.device),
        "return_dict": False,
    }
    return model.bfloat16().eval(), halved(inputs)


def fifty(setup: Setup, mode: str | None) -> Record:
    """50 timesteps through all phases: one compile; with graphs, one recording and then replays."""
    model, inputs = few_layers(setup)
    policy = three_phases(setup) if setup.smoke else find("generic")
    levels = torch.linspace(1000, 0, 6 if setup.smoke else 50, device=setup.device)
    seconds, outputs = [], []

    def step(level: Tensor, run: Callable[..., Any]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        inputs["timestep"].copy_(level)
        return run(**inputs)[0].clone()

    with torch.inference_mode(), saved(policy) as path:
        fpsc.reports(clear=True)
        counters.clear()
        compiled = fpsattn(setup, model, path, mode)
        for _ in range(3):  # compile and tune; record; the first replay
            step(levels[0], compiled)
        wait(setup)
        before = recordings()
        with NO_RECOMPILE:
            for level in levels:
                start = time.perf_counter()
                outputs.append(step(level, compiled))
                wait(setup)
                seconds.append(time.perf_counter() - start)
            some = levels[::9]
            with profiled(setup.cuda) as profile:
                for level in some:
                    step(level, compiled)
        compiles = counters["stats"]["unique_graphs"]
        skips = dict(counters["inductor"]) if mode else {}
        (report,) = fpsc.reports()
        problems = [] if compiles == 1 else [f"expected one compile, found {compiles}"]
        problems += [
            f"step {n} is not finite" for n, out in enumerate(outputs) if not out.isfinite().all()
        ]
        unused = [p.modes for p in report.phases if p.forwards == 0]
        problems += [f"no step used {names}" for names in unused]
        eager = timed_eager(model, step, levels[:3], setup)
    record: Record = {
        "compiles": compiles,
        "replaced": report.replaced,
        "summary": report.summary(),
        "forwards": {p.modes[0]: p.forwards for p in report.phases},
        "seconds": {"first": round(seconds[0], 5), "last": round(seconds[-1], 5), "eager": eager},
    }
    if setup.cuda:
        found = kernels(profile)
        record["kernels"] = dict(sorted(found.items(), key=lambda item: -item[1])[:12])
        apis = calls(profile)
        record["calls"] = apis
        if mode == "reduce-overhead":
            record["cudagraph_skips"] = skips.get("cudagraph_skips", 0)
            record["recordings"] = {"before": before, "after": recordings()}
            problems += replays_missing(record, len(some))
    return {"problems": problems, **record}


def replays_missing(record: Record, steps: int) -> list[str]:
    """What speaks against one recording that every step replayed."""
    problems = []
    apis, made = record["calls"], record["recordings"]
    if record["cudagraph_skips"]:
        problems.append(f"inductor skipped CUDA graphs {record['cudagraph_skips']} times")
    if made["after"] != made["before"] or not made["after"]:
        problems.append(f"recordings: expected some before and none during the steps, got {made}")
    if apis.get("cudaGraphLaunch", 0) < steps:
        problems.append(f"{apis.get('cudaGraphLaunch', 0)} graph launches in {steps} steps")
    captures = sum(n for name, n in apis.items() if "BeginCapture" in name)
    if captures:
        problems.append(f"{captures} recordings were begun during the steps")
    return problems


def recordings() -> int | None:
    """CUDA graphs that torch's graph manager holds for this process; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    if manager is None:
        return 0
    waiting = [node for nodes in manager.roots.values() for node in nodes]
    count = 0
    while waiting:
        node = waiting.pop()
        count += 1
        waiting += [child for children in node.children.values() for child in children]
    return count


def timed_eager(
    model: WanTransformer3DModel, step: Callable[..., Tensor], levels: Tensor, setup: Setup
) -> float:
    """Seconds of the last of a few steps of the uncompiled model."""
    for level in levels:
        start = time.perf_counter()
        step(level, model)
        wait(setup)
        took = time.perf_counter() - start
    return round(took, 5)


def training(setup: Setup) -> Record:
    """Forward and backward of the compiled model: one compile, finite gradients, time and memory
    beside eager."""
    model, inputs = few_layers(setup)
    fp8 = one_mode({"pattern": "near", "keep": 0.25, "dtype": "fp8"})
    policy = three_phases(setup) if setup.smoke else fp8
    problems, record = [], {}

    def step(run: Callable[..., Any]) -> None:
        model.zero_grad()
        run(**inputs)[0].square().mean().backward()

    with saved(policy) as path:
        for name, run in (("eager", model), ("fpsattn", fpsattn(setup, model, path))):
            counters.clear()
            step(run)
            took = []
            with NO_RECOMPILE:
                for level in (900.0, 500.0, 100.0):
                    inputs["timestep"].fill_(level)
                    if setup.cuda:
                        torch.cuda.reset_peak_memory_stats()
                    wait(setup)
                    start = time.perf_counter()
                    step(run)
                    wait(setup)
                    took.append(time.perf_counter() - start)
            record[name] = {"seconds": round(min(took), 5)}
            if setup.cuda:
                record[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
            problems += [
                f"{name}: the gradient of {parameter_name} is not finite"
                for parameter_name, parameter in model.named_parameters()
                if parameter.grad is not None and not parameter.grad.isfinite().all()
            ]
    compiles = counters["stats"]["unique_graphs"]
    if compiles != 1:
        problems.append(f"expected one compile, found {compiles}")
    return {"problems": problems, "compiles": compiles, **record}


# ---- small things


def fpsattn(
    setup: Setup, model: torch.nn.Module, policy: str, mode: str | None = None, **others: Any
) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(
        model, backend=backend(), fullgraph=True, options=options(setup, policy, mode) | others
    )
    return compiled


def backend() -> Any:
    """By name where fpsc is installed; a bare checkout has no entry point, and gives the function
    that it would name."""
    return "fpsattn" if "fpsattn" in torch._dynamo.list_backends(()) else fpsattn_of_checkout


def options(setup: Setup, policy: str, mode: str | None) -> dict[str, Any]:
    """A smoke test is not about Inductor's own kernels, which take a minute to compile."""
    chosen = mode or ("lite" if setup.smoke else None)
    return {"policy": policy, "strict": True, **({"mode": chosen} if chosen else {})}


@dataclass
class saved:
    """The path of a policy's file, for as long as the block runs."""

    policy: Policy

    def __enter__(self) -> str:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "policy.yaml"
        self.policy.save(path)
        return str(path)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def to(inputs: Inputs, device: torch.device) -> Inputs:
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()}


def halved(inputs: Inputs) -> Inputs:
    return {
        n: x.bfloat16() if isinstance(x, Tensor) and n != "timestep" else x
        for n, x in inputs.items()
    }


def wait(setup: Setup) -> None:
    if setup.cuda:
        torch.cuda.synchronize()
