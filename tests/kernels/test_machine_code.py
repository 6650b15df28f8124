"""What the Triton kernels compile to, for every GPU that they are launched on, without one.

The limits are in bench/sass.py, which makes the table; the committed one is checked against it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from bench import sass
from bench.machine_code import EXP2, TENSOR, Code
from fpsc.kernels.triton.configs import HOPPER_REORDERED
from fpsc.kernels.triton.variants import CAPABILITIES
from tests.bench import command

VARIANTS = sass.load(sass.VARIANTS)

Reports = dict[tuple[str, int], sass.Report]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """Everything, compiled once: a table, and the listings beside it."""
    folder = tmp_path_factory.mktemp("machine-code")
    done = command.sass(checkout, "--json", folder / "table.json", "--dump", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def reports(compiled: Path) -> Reports:
    found = sass.reports_of(sass.read(compiled / "table.json"))
    return {(r.name, r.capability): r for r in found}


@pytest.mark.parametrize(("name", "capability"), VARIANTS)
def test_limits(reports: Reports, name: str, capability: int) -> None:
    """Tensor cores; on Hopper also no spills, no serialised products, and a short hot loop."""
    assert sass.broken(VARIANTS[name, capability], reports[name, capability]) == []


def test_limits_have_kernels_that_they_hold_for() -> None:
    assert {sm for _, sm in VARIANTS} == set(CAPABILITIES)
    assert {v.product for (_, sm), v in VARIANTS.items() if sm == 80} >= {"bf16", "fp16"}
    hopper = [v for (_, sm), v in VARIANTS.items() if sm == sass.TUNED_CAPABILITY]
    for head_dim in sass.TUNED_HEAD_DIMS:
        assert {v.role for v in hopper if v.head_dim == head_dim} >= {"forward", "backward"}
    forward = [v for v in hopper if (v.role, v.head_dim, v.product) == ("forward", 128, "fp8")]
    assert {v.specialised for v in forward} == {False, True}


GLUON = [name for (name, _), variant in VARIANTS.items() if variant.language == "gluon"]


def test_gluon_is_compiled_for_hopper_alone() -> None:
    assert {sm for (name, sm) in VARIANTS if name in GLUON} == {sass.TUNED_CAPABILITY}
    assert {VARIANTS[name, 90].head_dim for name in GLUON} == set(sass.TUNED_HEAD_DIMS)


@pytest.mark.parametrize("name", [n for n in GLUON if VARIANTS[n, 90].keys == 128])
def test_exponentials_run_beside_a_product(compiled: Path, name: str) -> None:
    """In a trip, between the start of the products and the last wait for one: all of a key tile."""
    hot = Code((compiled / f"{name}.sm_90.sass").read_text()).hot_loop()
    assert hot is not None
    start = max(n for n, i in enumerate(hot) if i.kind in TENSOR)
    waits = [n for n, i in enumerate(hot) if i.opcode.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 2 and start < waits[0] < waits[1]
    beside = sum(i.short == EXP2 for i in hot[waits[0] : waits[1]])
    assert beside >= 64, "of 64 for the keys, and 2 for the old sums"


def rows(table: Path) -> set[tuple[str, int]]:
    return {(r.name, r.capability) for r in sass.reports_of(sass.read(table))}


def test_committed_table_has_all_rows_and_no_other() -> None:
    newer = {(n, sm) for n, sm in VARIANTS if "reordered" in n}
    assert rows(sass.RESULTS) == set(VARIANTS) - newer
    assert newer <= rows(sass.NEWER)


def test_committed_rows_of_a_newer_triton_are_within_the_limits() -> None:
    found = [f"fp8-bf16-{dp}-{config.name}" for dp, of in HOPPER_REORDERED.items() for config in of]
    assert rows(sass.NEWER) == {(name, sass.TUNED_CAPABILITY) for name in found}
    for report in sass.reports_of(sass.read(sass.NEWER)):
        pairs = "x256-" in report.name
        limit = sass.HOT_LOOP_PAIRS if pairs else sass.HOT_LOOP_SPECIALISED
        assert report.hot_loop is not None and report.hot_loop.per_128_keys is not None
        assert report.hot_loop.per_128_keys <= limit
        assert report.spill_stores == report.spill_loads == 0 and not report.losses


def test_committed_table_is_that_of_the_sources(reports: Reports) -> None:
    committed = sass.read(sass.RESULTS)
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {committed['triton']}, this is {triton.__version__}")
    assert sass.differences(committed, reports.values(), VARIANTS) == []


def test_configurations_need_no_torch(checkout: Path) -> None:
    """Another Triton is tried in an environment that has nothing else."""
    code = f"import sys; sys.modules['torch'] = None; import {sass.VARIANTS} as c; c.variants()"
    done = command.python(checkout, "-c", code)
    assert done.returncode == 0, done.stderr
