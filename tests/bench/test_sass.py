"""bench/sass.py finds what is known of small kernels, and counts as nvdisasm's own graph does."""

from __future__ import annotations

import heapq
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from triton import knobs

from bench import sass
from bench.machine_code import TENSOR, Code, count
from fpsc.kernels.triton.variants import Variant
from tests.bench import command, sass_kernels

KERNELS = "tests.bench.sass_kernels"
VARIANTS = {variant.name: variant for variant in sass_kernels.variants()}

Reports = dict[tuple[str, int], sass.Report]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """Where the table of all test kernels is, and their machine code."""
    folder = tmp_path_factory.mktemp("sass")
    table = folder / "table.json"
    done = command.sass(checkout, "--variants", KERNELS, "--json", table, "--dump", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> Reports:
    table = sass.read(folder / "table.json")
    return {(r.name, r.capability): r for r in sass.reports_of(table)}


def test_every_kernel_has_a_report(reports: Reports) -> None:
    assert set(reports) == set(sass.load(KERNELS))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("fp8", {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}),
        ("fp8 specialised", {90: "QGMMA", 100: "UTCQMMA"}),
        ("bf16", {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}),
    ],
)
def test_matrix_products_are_on_the_tensor_cores(
    reports: Reports, name: str, tensor: dict[int, str]
) -> None:
    for capability, opcode in tensor.items():
        assert set(reports[name, capability].tensor) == {opcode}


def test_what_a_kernel_without_products_has(reports: Reports) -> None:
    report = reports["no product", 90]
    assert report.tensor == {} and report.hot_loop is None
    assert report.registers > 0 and report.instructions > 0 and report.warps == 4


def test_spills_are_found(reports: Reports) -> None:
    assert reports["spills", 90].spill_stores > 0 < reports["spills", 90].spill_loads
    assert reports["fp8", 90].spill_stores == reports["fp8", 90].spill_loads == 0


def test_serialised_products_are_found(reports: Reports) -> None:
    (loss,) = reports["serialised", 90].losses
    assert "wgmma.mma_async instructions are serialized" in loss
    assert reports["fp8", 90].losses == []


def test_specialised_warps_are_found(reports: Reports) -> None:
    report = reports["fp8 specialised", 90]
    assert report.warps == 12  # one group loads, two compute
    assert len(report.register_pools) > 1
    assert reports["fp8", 90].warps == 8 and reports["fp8", 90].register_pools == []


def test_a_kernel_that_does_not_compile_is_a_report(reports: Reports) -> None:
    error = reports["does not compile", 90].error
    assert error is not None and "incompatible dimensions" in error


@pytest.mark.parametrize(
    ("name", "capability", "products"),
    [
        ("fp8", 90, 2 * 128 // 32),  # [64, 128] x [128, 128]: 32 of the 128 a time
        ("fp8 specialised", 90, 2 * 128 // 32),
        ("bf16", 90, 2 * 128 // 16),
        ("fp8", 89, 2 * (128 // 32) * (128 // 8)),  # [16, 128] x [128, 128]: 32 by 8 a time
        ("bf16", 80, 2 * (128 // 16) * (128 // 8)),
        ("fp8", 120, 2 * (128 // 32) * (128 // 8)),
    ],
)
def test_hot_loop_holds_one_iteration(
    reports: Reports, name: str, capability: int, products: int
) -> None:
    loop = reports[name, capability].hot_loop
    assert loop is not None and loop.per_128_keys == loop.instructions
    assert sum(n for opcode, n in loop.opcodes.items() if opcode in TENSOR) == products
    # 16 rows of 128 keys on 32 lanes, and how much the row's maximum moved, of two rows a lane.
    assert loop.opcodes["MUFU.EX2"] == 16 * 128 // 32 + 2
    assert sum(loop.opcodes.values()) == loop.instructions


Graph = dict[str, tuple[list[str], set[str]]]  # block -> its instructions, the blocks after it


def nvdisasm_graph(cubin: Path) -> Graph:
    """The control flow as nvdisasm draws it."""
    dot = subprocess.run(
        (knobs.nvidia.nvdisasm.path, "-bbcfg", cubin), check=True, capture_output=True, text=True
    ).stdout
    graph: Graph = {}
    for name, label in re.findall(r'^"(.+)"\n\[label="\{(.*)\}"\]$', dot, re.MULTILINE):
        lines = [re.sub(r"\\(.)", r"\1", line) for line in label.split("\\l")]
        graph[name] = [line for line in lines if line.endswith(";")], set()
    for source, target in re.findall(r'^"(.+?)"(?::\w+)* -> "(.+?)"', dot, re.MULTILINE):
        graph[source][1].add(target)
    return graph


def shortest_cycle(graph: Graph, start: str) -> float:
    """Instructions of the shortest way from a block back to it."""
    size = {block: len(lines) for block, (lines, _) in graph.items()}
    queue = [(size[start], start)]
    known: set[str] = set()
    while queue:
        length, block = heapq.heappop(queue)
        for after in graph[block][1]:
            if after == start:
                return length
            if after not in known:
                heapq.heappush(queue, (length + size[after], after))
        known.add(block)
    return math.inf


@pytest.mark.parametrize(
    ("name", "capability"),
    [("fp8", 90), ("fp8 specialised", 90), ("bf16", 90), ("spills", 90), ("serialised", 90)],
)
def test_hot_loop_is_counted_as_nvdisasm_draws_it(
    reports: Reports, folder: Path, name: str, capability: int
) -> None:
    """These loops have no branch but the waits, so that the shortest way is the only one."""
    graph = nvdisasm_graph(folder / f"{name}.sm_{capability}.cubin")
    tensor = re.compile(rf"\b({'|'.join(TENSOR)})\b")
    blocks = [name for name, (lines, _) in graph.items() if any(map(tensor.search, lines))]
    lengths = [shortest_cycle(graph, block) for block in blocks]
    loop = reports[name, capability].hot_loop
    assert loop is not None
    assert loop.instructions == max(n for n in lengths if n < math.inf)


def listing(*lines: str) -> str:
    """As nvdisasm prints it: labels at the margin."""
    return "".join(
        f"{line}\n" if line.endswith(":") else f"        /*{16 * n:04x}*/   {line} ;\n"
        for n, line in enumerate(lines)
    )


WAIT = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], RZ", "@!P0 BRA `(.L_again)")
AGAIN = (".L_again:", *WAIT, "BRA `(.L_done)")


@pytest.mark.parametrize(
    ("lines", "length"),
    [
        (("HMMA R0", "MUFU.EX2 R1, R1", "@P1 BRA `(.L_loop)"), 3),
        # Either side of a branch: the longer.
        (
            (
                "HMMA R0",
                "@P0 BRA `(.L_else)",
                *("FADD R2, R2, R2",) * 5,
                "BRA `(.L_end)",
                ".L_else:",
                *("FMUL R2, R2, R2",) * 3,
                ".L_end:",
                "MUFU.EX2 R1, R1",
                "@P1 BRA `(.L_loop)",
            ),
            1 + 1 + 5 + 1 + 1 + 1,
        ),
        # Blackwell writes the predicate of a uniform branch among the operands.
        (
            (
                "BRA.U !UP0, `(.L_end)",
                *("FADD R2, R2, R2",) * 2,
                ".L_end:",
                "HMMA R0",
                "BRA.U UP1, `(.L_loop)",
            ),
            5,
        ),
        # A wait that tries again elsewhere, and one that does so in place.
        ((*WAIT, ".L_done:", "HMMA R0", "@P1 BRA `(.L_loop)", "EXIT", *AGAIN), 4),
        (("FADD R2, R2, R2", ".L_again:", *WAIT, "HMMA R0", "@P1 BRA `(.L_loop)"), 5),
        # Threads that part meet again; a warp that has diverged is left out.
        (
            (
                "BSSY B0, `(.L_meet)",
                "@P0 BRA `(.L_part)",
                "FADD R2, R2, R2",
                ".L_part:",
                "BSYNC B0",
                ".L_meet:",
                "BRA.DIV UR4, `(.L_slow)",
                "HMMA R0",
                "@P1 BRA `(.L_loop)",
                "EXIT",
                ".L_slow:",
                *("FADD R2, R2, R2",) * 9,
                "BRA `(.L_meet)",
            ),
            7,
        ),
        # The loop is left by a call within the function.
        (("HMMA R0", "@!P0 CALL.REL.NOINC `(.L_out)", "BRA `(.L_loop)", ".L_out:", "FADD R2"), 3),
        # The loop around it, and a loop without products.
        (
            (
                ".L_other:",
                *("MUFU.EX2 R1, R1",) * 9,
                "@P0 BRA `(.L_other)",
                ".L_inner:",
                "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], RZ",
                "MUFU.EX2 R1, R1",
                "@P1 BRA `(.L_inner)",
                "@P2 BRA `(.L_loop)",
            ),
            3,
        ),
        # A table of jumps.
        (
            (
                'BRX R2 -0x1a0 (*"BRANCH_TARGETS .L_a,.L_b"*)',
                ".L_a:",
                "HMMA R0",
                "@P1 BRA `(.L_loop)",
                "EXIT",
                ".L_b:",
                "EXIT",
            ),
            3,
        ),
    ],
)
def test_trip_through_a_loop(lines: tuple[str, ...], length: int) -> None:
    code = Code(listing(".text.kernel:", "MOV R1, R2", ".L_loop:", *lines, "EXIT"))
    trip = code.hot_loop()
    assert trip is not None and len(trip) == length


def test_products_outside_loops_make_no_hot_loop() -> None:
    assert Code(listing(".text.kernel:", "HMMA R0", "EXIT")).hot_loop() is None


def test_a_jump_to_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="targets of BRX"):
        Code(listing(".text.kernel:", "BRX R2 -0x10", "EXIT"))


def test_histogram_tells_apart_what_matters() -> None:
    lines = (
        "MUFU.EX2 R1, R1",
        "MUFU.RCP R1, R1",
        "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R1, R2, R3, R4",
        "@!P0 FADD.FTZ R1, R1, R1",
        "FADD R1, R1, R1",
    )
    found = count(Code(listing(".text.kernel:", *lines)).instructions)
    assert found == {"FADD": 2, "F2FP.E4M3": 1, "MUFU.EX2": 1, "MUFU.RCP": 1}


GOOD = sass.Report(
    "fp8", 90, registers=168, tensor={"QGMMA": 8}, hot_loop=sass.HotLoop(540, 540.0, {})
)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"tensor": {"HGMMA": 8}}, "expected QGMMA"),
        ({"tensor": {}}, "expected QGMMA"),
        ({"spill_loads": 4}, "no spills"),
        ({"spill_stores": 4}, "no spills"),
        ({"losses": ["(C7510) Potential Performance Loss: serialized"]}, "no loss"),
        ({"hot_loop": sass.HotLoop(541, 541.0, {})}, "at most 540"),
        ({"hot_loop": None}, "at most 540"),
        ({"error": "no"}, "does not compile"),
    ],
)
def test_limits(changes: dict[str, object], problem: str | None) -> None:
    found = sass.broken(VARIANTS["fp8"], replace(GOOD, **changes))  # type: ignore[arg-type]
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_limits_of_specialised_kernels_and_other_gpus() -> None:
    slow = replace(GOOD, hot_loop=sass.HotLoop(521, 521.0, {}))
    assert "at most 520" in sass.broken(VARIANTS["fp8 specialised"], slow)[0]
    spills = replace(slow, capability=89, spill_loads=4, tensor={"QMMA": 8})
    assert sass.broken(VARIANTS["fp8"], spills) == []
    assert sass.broken(replace(VARIANTS["fp8"], head_dim=256), replace(GOOD, spill_loads=4)) == []


def test_products_of_float32_need_no_tensor_core() -> None:
    assert sass.broken(replace(VARIANTS["bf16"], product="fp32"), sass.Report("bf16", 90)) == []


def test_check_fails_at_a_broken_limit(folder: Path, checkout: Path) -> None:
    arguments = ("--variants", KERNELS, "--check", "--limits-only", "--capability", "90", "--only")
    good = command.sass(checkout, *arguments, "^bf16$")
    assert (good.returncode, good.stderr.count("expected")) == (0, 0)
    bad = command.sass(checkout, *arguments, "^spills$")
    assert bad.returncode == 1 and "spills sm_90: expected no spills" in bad.stderr


def test_table_is_compared_row_by_row(folder: Path, reports: Reports) -> None:
    table = sass.read(folder / "table.json")
    assert sass.differences(table, reports.values(), reports) == []
    changed = replace(reports["fp8", 90], registers=1)
    (problem,) = sass.differences(table, [changed], reports)
    assert problem.startswith("fp8 sm_90: registers is 1, committed is ")
    gone = sass.differences(table, [], set(reports) - {("bf16", 90)})
    assert gone == ["bf16 sm_90: in the committed table, but no such variant"]
    new = replace(reports["fp8", 90], name="new")
    assert sass.differences(table, [new], reports) == ["new sm_90: not in the committed table"]


def test_a_part_leaves_the_other_rows(folder: Path, checkout: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text((folder / "table.json").read_text())
    arguments = ("--variants", KERNELS, "--json", path, "--only", "^bf16$", "--capability", "90")
    command.sass(checkout, *arguments)
    assert path.read_text() == (folder / "table.json").read_text()
    assert list(tmp_path.iterdir()) == [path]  # the temporary file is gone
    json.loads(path.read_text())


def test_interpreted_functions_are_refused() -> None:
    variant = replace(VARIANTS["no product"], kernel=len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unset TRITON_INTERPRET"):
        sass.compile_variant(variant, 90)


def test_signature_must_fit(checkout: Path) -> None:
    code = (
        "from dataclasses import replace; from bench import sass; "
        f"variant = sass.load({KERNELS!r})['no product', 90]; "
        "sass.compile_variant(replace(variant, signature={'y': 'i32'}), 90)"
    )
    done = command.python(checkout, "-c", code)
    assert "lacks ['SIZE', 'n', 'out', 'x'], and has unknown ['y']" in done.stderr


def test_fp8_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(ValueError, match="at least 89"):
        replace(VARIANTS["fp8"], capabilities=(80, 90))


def test_names_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    twice: list[Variant] = [VARIANTS["fp8"]] * 2
    monkeypatch.setattr(sys.modules[KERNELS], "variants", lambda: twice)
    with pytest.raises(ValueError, match="two variants"):
        sass.load(KERNELS)


def test_needs_no_torch(checkout: Path) -> None:
    done = command.python(
        checkout, "-c", "import sys; sys.modules['torch'] = None; import bench.sass"
    )
    assert done.returncode == 0, done.stderr


CRASHING = """
import os
from dataclasses import replace
from tests.bench import sass_kernels

class Crash(dict):
    def __iter__(self):
        os._exit(1)

def variants():
    good = next(v for v in sass_kernels.variants() if v.name == "no product")
    yield replace(good, name="crash", signature=Crash())
    yield good
"""


def test_a_crash_of_the_compiler_costs_one_report(checkout: Path, tmp_path: Path) -> None:
    """As when MLIR aborts: the process is gone, and what else it had to do."""
    (tmp_path / "crashing.py").write_text(CRASHING)
    table = tmp_path / "table.json"
    done = command.sass(checkout, "--variants", "crashing", "--json", table, path=tmp_path)
    assert done.returncode == 0, done.stderr
    crash, good = sass.reports_of(sass.read(table))
    assert crash.error == "the compiler crashed"
    assert good.error is None and good.registers > 0
