"""The GPU suite without a GPU: a smoke run, resuming, the budget, the tables and the marks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_suite
from bench.gpu import ceilings, contenders, front, problem, profile, run, timings
from bench.gpu.models import HEADLINE
from bench.gpu.profiler import Kernel
from bench.gpu.public_line import replays_missing
from bench.gpu.stopwatch import quartiles, ratio
from bench.gpu.summary import MISSED, NOT_MEASURED, PASS, marks, summarise
from bench.gpu.timings import Trial, compared
from fpsc.bench.record import Role
from fpsc.cost import DeviceCost, Kind, Point
from tests.bench import records

CPU = run.Setup(torch.device("cpu"), smoke=True)
HERE = {
    "device": "GPU 1",
    "capability": [9, 0],
    "driver": "1.2",
    "torch": "2",
    "triton": "3",
    "python": "3",
    "source": "abc",
    "time": "2030-01-01",
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    assert gpu_suite.main(["--smoke", "--out", str(folder)]) == gpu_suite.RIGHT
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_smoke_runs_every_case(smoke):
    for part, least in ((0, 7), (1, 4), (2, 3), (6, 1)):
        document = read(smoke / f"part{part}.json")
        assert len(document["records"]) >= least
        assert {r["status"] for r in document["records"]} == {"ok"}
        assert document["skipped"] == [] and document["running"] is None
        assert document["environment"]["source"]
    assert list(smoke.glob("*.tmp")) == []


def test_smoke_on_cpu_passes_no_mark(smoke, capsys):
    assert summarise(sorted(smoke.glob("*.json"))) == gpu_suite.INCOMPLETE
    assert "not measured" in capsys.readouterr().out
    assert {m.verdict for m in marks([read(p) for p in smoke.glob("*.json")])} == {NOT_MEASURED}


def test_resume_runs_only_what_is_missing(smoke, tmp_path):
    document = read(smoke / "part2.json")
    kept, removed = document["records"][:-1], document["records"][-1]
    (tmp_path / "part2.json").write_text(json.dumps({**document, "records": kept}))
    arguments = ["--smoke", "--part", "2", "--resume", "--out", str(tmp_path)]
    assert gpu_suite.main(arguments) == gpu_suite.RIGHT
    found = read(tmp_path / "part2.json")["records"]
    assert found[:-1] == kept and found[-1]["name"] == removed["name"]


def test_resume_refuses_another_environment(smoke, tmp_path, capsys):
    document = read(smoke / "part2.json")
    document["environment"]["torch"] = "1.0"
    (tmp_path / "part2.json").write_text(json.dumps(document))
    arguments = ["--smoke", "--part", "2", "--resume", "--out", str(tmp_path)]
    assert gpu_suite.main(arguments) == gpu_suite.USAGE
    assert "torch (was 1.0" in capsys.readouterr().err
    assert read(tmp_path / "part2.json") == document


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
def test_without_a_gpu_it_says_so(checkout: Path):
    command = [sys.executable, "bench/gpu_suite.py", "--part", "1"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == gpu_suite.NO_GPU
    assert "a CUDA device that torch sees" in done.stderr


# ---- records


def document(path: Path, **others: Any) -> run.Document:
    return run.Document(path, "matrix", HERE, **others)


def test_every_record_is_on_disk_before_the_next_case(tmp_path):
    path = tmp_path / "part1.json"
    seen = []

    def case() -> dict[str, Any]:
        seen.append((read(path)["running"], len(read(path)["records"])))
        return {}

    run.run([("a", case), ("b", case)], document(path), time.monotonic() + 60)
    assert seen == [("a", 0), ("b", 1)]
    assert read(path)["running"] is None


def test_what_is_skipped_for_time_is_named(tmp_path, capsys):
    path = tmp_path / "part1.json"
    deadline = time.monotonic() + 0.2
    slow = lambda: time.sleep(0.3) or {}  # noqa: E731
    run.run([("a", slow), ("b", slow), ("c", slow)], document(path), deadline)
    assert [r["name"] for r in read(path)["records"]] == ["a"]
    assert read(path)["skipped"] == ["b", "c"]
    assert gpu_suite.code_of(read(path)) == gpu_suite.INCOMPLETE
    assert "skipped for time: b; c" in capsys.readouterr().out


def test_a_case_that_fails_is_not_the_end_and_comes_last_when_resumed(tmp_path):
    path = tmp_path / "part1.json"
    order = []

    def case(name: str, **found: Any) -> run.Case:
        return name, lambda: order.append(name) or found

    def fails() -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    cases = [("a", fails), case("b", problems=["too far off"]), case("c")]
    run.run(cases, document(path), time.monotonic() + 60)
    found = {r["name"]: r for r in read(path)["records"]}
    assert [found[n]["status"] for n in "abc"] == ["error", "wrong", "ok"]
    assert found["a"]["problems"] == ["RuntimeError: no such kernel"]
    assert "fails" in found["a"]["traceback"]
    assert gpu_suite.code_of(read(path)) == gpu_suite.WRONG
    order.clear()
    cases = [case("a"), case("b"), case("c"), case("d")]
    run.run(cases, document(path, resume=True), time.monotonic() + 60)
    assert order == ["d", "a"]
    assert len(read(path)["records"]) == 4


def test_a_case_in_which_the_process_ended_is_known_and_tried_again_last(tmp_path):
    path = tmp_path / "part1.json"
    cut = document(path)
    cut.put({"name": "a", "status": "ok"})
    cut.start("b")
    assert run.close_cut(path) == "b"
    assert [r["status"] for r in read(path)["records"]] == ["ok", "cut"]
    order = []
    cases = [(n, lambda n=n: order.append(n) or {}) for n in "abc"]
    run.run(cases, document(path, resume=True), time.monotonic() + 60)
    assert order == ["c", "b"]
    assert {r["status"] for r in read(path)["records"]} == {"ok"}


def test_exit_codes_of_several_parts():
    right, wrong, cut = gpu_suite.RIGHT, gpu_suite.WRONG, gpu_suite.INCOMPLETE
    assert gpu_suite.worst([right, right]) == right
    assert gpu_suite.worst([right, cut]) == cut
    assert gpu_suite.worst([wrong, cut]) == wrong
    assert gpu_suite.worst([right, -9]) == wrong  # ended by a signal


def test_a_hanging_part_is_ended_and_its_file_closed(tmp_path, monkeypatch, capsys):
    def hang(command: list[str], **others: Any) -> None:
        assert "--child" in command and command[command.index("--part") + 1] == "1"
        document(tmp_path / "part1.json").start("masked keys")
        raise subprocess.TimeoutExpired(command, others["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    given = argparse.Namespace(out=tmp_path, budget=460.0, resume=False)
    assert gpu_suite.run_process(1, given) == gpu_suite.WRONG
    assert "during: masked keys" in capsys.readouterr().out
    (record,) = read(tmp_path / "part1.json")["records"]
    assert record["name"] == "masked keys" and record["status"] == "cut"


def test_every_part_ends_within_nine_minutes():
    assert gpu_suite.BUDGET + gpu_suite.GRACE < 9 * 60


# ---- marks, on made-up results


def contender(ms: float, best: float, rate: float, *, baseline: bool = False) -> dict[str, Any]:
    return {
        "ms": {"median": ms, "q1": ms, "q3": ms},
        "tflops": rate,
        "baseline": baseline,
        "to_best": {"median": best / ms, "q1": best / ms, "q3": best / ms},
        "error": 0.01,
    }


def headline(faster: float) -> dict[str, Any]:
    """The record of part 6: sparse attention, and FP8 linears beside it."""
    seconds = {"eager": 6.0, "Inductor": 4.5, "Inductor, _native_cudnn": 4.0}
    ours = {"fpsattn keep 0.125": 1.5, "fpsattn keep 0.125, FP8 linears": 10.0 / faster}
    both = [
        records.result(name, [x] * 5, Role.eager if name == "eager" else Role.baseline)
        for name, x in seconds.items()
    ]
    both += [records.result("Inductor, FP8 linears", [3.0] * 5, Role.approximate)]
    both += [records.result(name, [x] * 5, Role.fpsattn, keep=0.125) for name, x in ours.items()]
    return records.run([records.case(HEADLINE, results=both)]).model_dump(mode="json")


def results() -> list[dict[str, Any]]:
    """Of a run that passes everything."""

    def of(part: str, records: list[dict[str, Any]]) -> dict[str, Any]:
        records = [{"status": "ok", "at": "2030", "problems": [], **r} for r in records]
        return {
            "part": part,
            "environment": dict(HERE),
            "records": records,
            "skipped": [],
            "running": None,
        }

    forward = {
        "sdpa cudnn": contender(180, 180, 650, baseline=True),
        "fpsc keep 1": contender(120, 180, 970),
        "fpsc keep 0.125": contender(20, 180, 800),
        "fpsc keep 0.1": contender(17, 180, 780),
        "fpsc keep 0.25": contender(10, 180, 820),
    }
    backward = {
        "sdpa cudnn": contender(450, 450, 500, baseline=True),
        "fpsc keep 0.25": contender(190, 450, 300),
    }
    timed = {"best_baseline": "sdpa cudnn", "not_timed": {"FA3": "ModuleNotFoundError: none"}}
    return [
        of("public_line", [{"name": "fifty timesteps"}]),
        of("matrix", [{"name": "masked keys"}]),
        of("graphs", [{"name": "noise rows"}]),
        of(
            "timings",
            [
                {"name": "headline forward: a shape", **timed, "contenders": forward},
                {"name": "headline backward: a shape", **timed, "contenders": backward},
            ],
        ),
        of(
            "ceilings",
            [
                {"name": "matrix products", "ceilings": {"bf16": 700.0, "fp8": 1400.0}},
                {
                    "name": "share of forward, keep 0.125",
                    "rates": {"prologue": {"bytes_per_second": 3.4e12, "of copy": 0.82}},
                },
            ],
        ),
        of("profile", [{"name": "memory: a shape", "saved": 0.3, "held_bytes": {}}]),
        of("models", [{"name": HEADLINE, "run": headline(10.0)}]),
    ]


def test_a_run_that_passes_every_mark(tmp_path, capsys):
    assert {m.verdict for m in marks(results())} == {PASS}
    for n, one in enumerate(results()):
        (tmp_path / f"part{n}.json").write_text(json.dumps(one))
    command = ["--summary", *map(str, tmp_path.glob("*.json"))]
    assert gpu_suite.main(command) == 0
    printed = capsys.readouterr().out
    assert "fpsc keep 0.125" in printed and "MISSED" not in printed


SPOILED = {
    "dense": (
        lambda d: d[3]["records"][0]["contenders"]["fpsc keep 1"]["to_best"].update(median=1.45),
        "headline forward, fpsc keep 1, to the best",
        MISSED,
    ),
    "sparse": (
        lambda d: d[3]["records"][0]["contenders"]["fpsc keep 0.125"]["to_best"].update(median=7),
        "headline forward, fpsc keep 0.125",
        MISSED,
    ),
    "sparser": (
        lambda d: d[3]["records"][0]["contenders"]["fpsc keep 0.1"]["to_best"].update(median=9.9),
        "headline forward, fpsc keep 0.1,",
        MISSED,
    ),
    "rate": (
        lambda d: d[3]["records"][0]["contenders"]["fpsc keep 1"].update(tflops=890.0),
        "headline forward, fpsc keep 1, on the tiles",
        MISSED,
    ),
    "prologue": (
        lambda d: d[4]["records"][1]["rates"]["prologue"].update({"of copy": 0.79}),
        "headline prologue",
        MISSED,
    ),
    "no prologue": (lambda d: d[4]["records"].pop(1), "headline prologue", NOT_MEASURED),
    "both ways": (
        lambda d: d[3]["records"][0]["contenders"]["fpsc keep 0.25"]["ms"].update(median=30.0),
        "headline forward and backward",
        MISSED,
    ),
    "both ways of another best": (
        lambda d: (
            d[3]["records"][0]["contenders"].update({"FA3": contender(90, 90, 9, baseline=True)})
            or d[3]["records"][1]["contenders"].update(
                {"FA3": contender(440, 440, 9, baseline=True)}
            )
        ),
        "headline forward and backward",
        MISSED,
    ),
    "backward": (
        lambda d: d[3]["records"][1]["contenders"]["fpsc keep 0.25"]["to_best"].update(median=1.9),
        "headline backward",
        MISSED,
    ),
    "ceiling": (
        lambda d: d[4]["records"][0]["ceilings"].update(fp8=2000.0),
        "headline forward, fpsc keep 1, of the FP8",
        MISSED,
    ),
    "ceiling of another device": (
        lambda d: d[4]["environment"].update(device="GPU 2"),
        "headline forward, fpsc keep 1, of the FP8",
        NOT_MEASURED,
    ),
    "whole model": (
        lambda d: d[6]["records"][0].update(run=headline(8.5)),
        f"{HEADLINE}, fpsattn keep 0.125, FP8 linears, to the best",
        MISSED,
    ),
    "memory": (lambda d: d[5]["records"][0].update(saved=-0.1), "memory", MISSED),
    "not timed": (
        lambda d: d[3]["records"][0]["contenders"].pop("fpsc keep 0.1"),
        "headline forward, fpsc keep 0.1,",
        NOT_MEASURED,
    ),
    "no such part": (lambda d: d.pop(2), "2: CUDA graphs", NOT_MEASURED),
    "a wrong case": (lambda d: d[1]["records"][0].update(status="wrong"), "1: the kernels", MISSED),
    "a cut case": (
        lambda d: d[1]["records"][0].update(status="cut"),
        "1: the kernels",
        NOT_MEASURED,
    ),
    "a wrong attention": (
        lambda d: d[3]["records"][0].update(status="wrong"),
        "3: what is timed",
        MISSED,
    ),
    "a skipped case": (lambda d: d[0]["skipped"].append("x"), "0: the public", NOT_MEASURED),
    "on CPU": (lambda d: d[0]["environment"].pop("capability"), "0: the public", NOT_MEASURED),
}


@pytest.mark.parametrize("case", SPOILED)
def test_one_mark_that_does_not_pass(case, tmp_path):
    spoil, name, verdict = SPOILED[case]
    documents = deepcopy(results())
    spoil(documents)
    by_verdict = {m.name: m.verdict for m in marks(documents) if m.verdict != PASS}
    assert list(by_verdict.values()) == [verdict]
    assert next(iter(by_verdict)).startswith(name)
    path = tmp_path / "all.json"
    codes = []
    for one in documents:
        path.write_text(json.dumps(one))
        codes.append(summarise([path]))
    assert set(codes) <= {1, 4}  # of one file alone, something is never measured


def test_a_repeated_case_is_judged_by_its_newest_record():
    documents = results()
    worse = deepcopy(documents[3])
    worse["records"] = worse["records"][:1]
    worse["records"][0]["at"] = "2031"
    worse["records"][0]["contenders"]["fpsc keep 1"]["to_best"]["median"] = 0.5
    assert [m.verdict for m in marks([*documents, worse])].count(MISSED) == 1


# ---- what timings and profiles are made of


def test_contenders_agree_with_the_reference_on_cpu():
    """Every op and dense attention that runs here, through the checks before timing."""
    shape = problem.Shape((2, 8, 16), 2, 32, text=5)
    op = problem.Op(shape, 0.4, "fp8", CPU.device)
    assert op.visited < shape.heads * shape.tokens**2
    dense = contenders.Contender("sdpa", torch.nn.functional.scaled_dot_product_attention)
    for backward in (False, True):
        trial = Trial(CPU, shape, backward)
        for one in (contenders.fpsc_(op, CPU.kernel), dense):
            _, error = trial.check(one)
            assert error <= 1e-2, one.name
        wrong = contenders.Contender("wrong", lambda q, k, v: q + k + v)
        assert trial.check(wrong)[1] > 0.5


class MadeUp:
    """Times that no device took."""

    def turns(self, runs: dict[str, Any], seconds: float, least: int = 3) -> dict[str, Any]:
        for measured in runs.values():
            measured()
        return {name: [float(n + 1)] * least for n, name in enumerate(runs)}


def test_every_case_of_the_measuring_parts_runs(monkeypatch, tmp_path):
    """On CPU, with one small shape; times, kernels and memory are made up."""
    shape = problem.Shape((2, 8, 16), 1, 16)
    fewer_bytes = count(1000, -1)
    point = Point(name="one", seconds=1.0, predicted=1.1, held_out=True)
    fitted = DeviceCost(
        device="made up", source="measured", workers=1, head_dim=16, overhead=0.0, bandwidth=1.0,
        kinds={"fp8": Kind(item=0.0, tile=1.0)}, points=(point,),
    )  # fmt: skip
    kernels = [Kernel("quantise", 0, 50.0), Kernel("attend", 1, 900.0)]
    for module, name, value in (
        (timings, "WAN_14B", shape),
        (timings, "OTHERS", ()),
        (timings, "KEEPS", (1.0, 0.25)),
        (timings, "Stopwatch", MadeUp),
        (front, "Stopwatch", MadeUp),
        (torch, "compile", lambda function, **_: function),
        (timings, "flex", lambda ops: []),  # its compilation takes a minute on CPU
        (timings, "flex_dividing", lambda *_: None),
        (ceilings, "WAN_14B", shape),
        (ceilings, "SIZES", ((64, 64, 64),)),
        (ceilings, "COPY_BYTES", 2**10),
        (ceilings, "Stopwatch", MadeUp),
        (profile, "WAN_14B", shape),
        (profile, "JOINT", shape),
        (profile, "SMALL", shape),
        (profile, "CALLS", 2),
        (profile, "profiled", lambda cuda: nullcontext()),
        (profile, "executions", lambda profile: kernels),
        (profile, "device_cost", lambda *_, **__: fitted),
        (profile, "held", lambda shape, setup, attention: next(fewer_bytes)),
        (torch.cuda, "synchronize", lambda: None),
        (problem.Op, "visited", 256**2),
    ):
        monkeypatch.setattr(module, name, value)
    documents = []
    for part, module in (("timings", timings), ("ceilings", ceilings), ("profile", profile)):
        found = run.Document(tmp_path / f"{part}.json", part, HERE)
        run.run(module.cases(CPU), found, time.monotonic() + 600)
        assert [r for r in found.data["records"] if r["status"] != "ok"] == []
        documents.append(found.data)
    headline = documents[0]["records"][0]["contenders"]
    assert {"fpsc keep 1", "fpsc keep 0.125", "sdpa flash"} <= set(headline)
    assert "FA3" in documents[0]["records"][0]["not_timed"]
    share = documents[1]["records"][-1]["rates"]["main"]
    assert set(share) == {"tflops", "of bf16", "of fp8"}
    measured = [m for m in marks(documents) if m.verdict != NOT_MEASURED]
    assert {m.name.split(",")[0] for m in measured} >= {"headline forward", "headline backward"}


def test_dense_visits_every_pair_and_lists_are_those_of_the_op():
    shape = problem.Shape((3, 5, 7), 2, 32)
    op = problem.Op(shape, 1.0, "bf16", CPU.device, tile=(1, 5, 7))
    assert op.visited == shape.heads * shape.tokens**2
    counts, blocks = contenders.dense_lists(op)
    assert counts.flatten().tolist() == [3, 3, 3]
    assert blocks[0, 0].tolist() == [[0, 1, 2]] * 3


def test_ratios_are_taken_turn_by_turn():
    times = {"dense": [100.0, 200.0, 100.0], "ours": [10.0, 20.0, 10.0]}
    shape = problem.Shape((3, 5, 7), 2, 32)
    op = problem.Op(shape, 1.0, "fp8", CPU.device)
    timed = [
        contenders.Contender("ours", max, op),
        contenders.Contender("dense", max, baseline=True),
    ]
    errors = {"dense": 0.0, "ours": 0.0}
    found = compared(timed, times, shape, errors, backward=False)
    assert found["best_baseline"] == "dense"
    assert found["contenders"]["ours"]["to_best"] == {"median": 10.0, "q1": 10.0, "q3": 10.0}
    assert found["contenders"]["ours"]["visited"] == 1.0
    assert ratio([3.0, 3.0], [1.0, 1.0]) == quartiles([3.0, 3.0])


def test_what_speaks_against_one_recording():
    calls = {"cudaGraphLaunch": 6, "cuLaunchKernelEx": 2}
    good = {"calls": calls, "cudagraph_skips": 0, "recordings": {"before": 1, "after": 1}}
    assert replays_missing(good, steps=6) == []
    for change, message in (
        ({"calls": {"cudaGraphLaunch": 5}}, "5 graph launches in 6 steps"),
        ({"calls": {**calls, "cudaStreamBeginCapture": 1}}, "1 recordings were begun"),
        ({"cudagraph_skips": 2}, "skipped CUDA graphs 2 times"),
        ({"recordings": {"before": 0, "after": 0}}, "expected some before"),
        ({"recordings": {"before": 1, "after": 3}}, "none during the steps"),
    ):
        (problem,) = replays_missing({**good, **change}, steps=6)
        assert message in problem


@pytest.mark.parametrize(
    ("grid", "tile"), [((21, 45, 80), (7, 1, 16)), ((21, 30, 52), None), ((4, 8, 32), (4, 4, 8))]
)
def test_tile_for_flex_attention_divides_the_grid(grid, tile):
    assert contenders.dividing_tile(problem.Shape(grid, 1)) == tile


def test_stages_of_a_call():
    lengths = [("mean", 20.0), ("attend", 900.0), ("quantise", 80.0), ("attend", 400.0)]
    kernels = [Kernel(name, n, length) for n, (name, length) in enumerate([*lengths, ("end", 5.0)])]
    found = profile.staged(kernels)
    assert found == pytest.approx({"prologue": 0.1, "main": 1.3, "epilogue": 0.005, "all": 1.405})
    with pytest.raises(RuntimeError, match="the profiler saw none"):
        profile.staged([])
