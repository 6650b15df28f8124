"""What the Triton kernels compile to: registers, spills, tensor-core instructions, the hot loop.

    python bench/sass.py                             # all GPUs; prints and writes the table
    python bench/sass.py --capability 90 --only fwd  # a part of it; the other rows stay
    python bench/sass.py --check                     # fails at a broken limit or another number
    python bench/sass.py --check --limits-only       # for another Triton than the table's
    python bench/sass.py --only reordered --json bench/results/sass-3.8.json    # by that Triton

Everything is compiled ahead of time: no GPU, no driver and no torch is needed, only Triton, whose
wheel holds the assembler and the disassembler. Numbers are those of the machine code, so they are
exact, and the same on every machine. None of them is a speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.cache import get_cache_manager  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bench.machine_code import TENSOR, Code, count  # noqa: E402
from fpsc.kernels.triton.variants import CAPABILITIES, Variant  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "sass.json"
NEWER = RESULTS.with_name("sass-3.8.json")  # what the oldest Triton does not compile
VARIANTS = "fpsc.kernels.triton.catalogue"
PROCESSES = 2
HOT_LOOP_KEYS = 128

# The limits. What executes a matrix product, by capability and type of the operands:
PRODUCTS: dict[int, dict[str, set[str]]] = {
    80: {"bf16": {"HMMA"}, "fp16": {"HMMA"}},
    89: {"bf16": {"HMMA"}, "fp16": {"HMMA"}, "fp8": {"QMMA"}},
    90: {"bf16": {"HGMMA"}, "fp16": {"HGMMA"}, "fp8": {"QGMMA"}},
    # Tensor memory needs 64 rows or more; smaller products stay in registers.
    100: {"bf16": {"UTCHMMA", "HMMA"}, "fp16": {"UTCHMMA", "HMMA"}, "fp8": {"UTCQMMA", "QMMA"}},
    120: {"bf16": {"HMMA"}, "fp16": {"HMMA"}, "fp8": {"QMMA"}},
}
# Where nothing may spill, and ptxas may report no loss (of wgmma that runs in parallel, mostly):
TUNED_CAPABILITY, TUNED_HEAD_DIMS = 90, (64, 128)
# Instructions per warp and 128 keys of a forward's hot loop, at that capability and head_dim 128;
# the last is for 256 keys at a time.
HOT_LOOP_PORTABLE, HOT_LOOP_SPECIALISED, HOT_LOOP_GLUON, HOT_LOOP_PAIRS = 540, 520, 485, 430


@dataclass(frozen=True)
class HotLoop:
    """What a warp executes in one iteration, and the same for 128 keys."""

    instructions: int
    per_128_keys: float | None
    opcodes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """A variant on one GPU: its machine code in numbers, or the error why there is none."""

    name: str
    capability: int
    error: str | None = None
    registers: int = 0  # per thread, as allocated at the launch
    register_pools: list[int] = field(default_factory=list)  # after setmaxnreg, of all roles
    spill_stores: int = 0  # bytes per thread
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0  # bytes
    warps: int = 0  # with those that specialisation adds
    losses: list[str] = field(default_factory=list)  # what ptxas says it cannot do well
    tensor: dict[str, int] = field(default_factory=dict)  # tensor-core instructions
    instructions: int = 0  # of the whole kernel
    hot_loop: HotLoop | None = None


def compile_variant(variant: Variant, capability: int, dump: Path | None = None) -> Report:
    """Compiles for a GPU that need not be there. A kernel that does not compile is a report too.

    dump: a folder for the machine code and its listing.
    """
    try:
        kernel, log = _compiled(variant, capability)
    except CompileError as error:
        return Report(variant.name, capability, error=str(error))
    listing = _disassemble(kernel.asm["cubin"])
    if dump is not None:
        stem = f"{variant.name}.sm_{capability}"
        (dump / f"{stem}.cubin").write_bytes(kernel.asm["cubin"])
        (dump / f"{stem}.sass").write_text(listing)
    code = Code(listing)
    hot = code.hot_loop()
    loop = None
    if hot is not None:
        keys = variant.keys
        per_keys = round(len(hot) * HOT_LOOP_KEYS / keys, 1) if keys else None
        loop = HotLoop(len(hot), per_keys, count(hot))
    pools = (re.search(r"0x[0-9a-f]+", i.operands) for i in _of_kind(code, "USETMAXREG"))
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    stack, stores, loads = (sum(map(int, column)) for column in zip(*spills, strict=True))
    return Report(
        name=variant.name,
        capability=capability,
        registers=max(map(int, re.findall(r"Used (\d+) registers", log))),
        register_pools=sorted({int(pool.group(), 16) for pool in pools if pool}),
        spill_stores=stores,
        spill_loads=loads,
        stack=stack,
        shared=kernel.metadata.shared,
        warps=_only(re.findall(r"\.reqntid (\d+)", kernel.asm["ptx"])) // 32,
        losses=sorted(set(re.findall(r"\(C\d+\) Potential Performance Loss.*", log))),
        tensor={op: n for op, n in count(code.instructions).items() if op in TENSOR},
        instructions=sum(1 for _ in code.instructions),
        hot_loop=loop,
    )


class CompileError(Exception):
    """Triton or ptxas refused a kernel."""


def _compiled(variant: Variant, capability: int) -> tuple[Any, str]:
    """The kernel, and what ptxas said of it; both from Triton's cache where it has them."""
    source = _source(variant)
    target = GPUTarget("cuda", capability, 32)

    def build(again: bool) -> tuple[Any, str]:
        with knobs.nvidia.scope(), knobs.compilation.scope(), _output() as output:
            knobs.nvidia.dump_ptxas_log = True
            if again:
                knobs.compilation.always_compile = True
            try:
                kernel = triton.compile(source, target=target, options=dict(variant.options))
            except Exception as error:  # of any type: MLIR's, ptxas's, Python's
                said = [
                    line
                    for line in output().splitlines()
                    if re.search(r"\berror\b|Assertion|fatal", line) and "Pipeline" not in line
                ]
                raise CompileError(
                    "; ".join([f"{type(error).__name__}: {error}", *said])
                ) from error
            return kernel, output()

    kernel, log = build(again=False)
    cache = get_cache_manager(kernel.hash)
    if "spill stores" not in log:  # Triton had it in its cache, where we leave the log too
        path = cache.get_file("ptxas.log")
        if path:
            return kernel, Path(path).read_text()
        kernel, log = build(again=True)
    cache.put(log, "ptxas.log", binary=False)
    return kernel, log


def _source(variant: Variant) -> Any:
    """The kernel with its types and constants, as a launch would make it."""
    kernel = variant.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"{variant.name}: expected a function of triton.jit, found {type(kernel).__name__}: "
            "unset TRITON_INTERPRET before the kernels are imported"
        )
    if set(variant.signature) != set(kernel.arg_names):
        missing = sorted(set(kernel.arg_names) - set(variant.signature))
        unknown = sorted(set(variant.signature) - set(kernel.arg_names))
        raise TypeError(f"{variant.name}: signature lacks {missing}, and has unknown {unknown}")
    types, constants, attributes = {}, {}, {}
    for n, parameter in enumerate(kernel.params):
        value = variant.signature[parameter.name]
        if isinstance(value, str) and not parameter.is_constexpr:
            types[parameter.name], _, divisor = value.partition(":")
            if divisor:
                attributes[(n,)] = [["tt.divisibility", int(divisor)]]
        else:  # also what a launch specialises on: None, and the integer 1
            types[parameter.name], constants[(n,)] = "constexpr", value
    if variant.language == "gluon":
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(kernel, types, constants, attributes)
    return ASTSource(kernel, types, constants, attributes)


@contextmanager
def _output() -> Iterator[Any]:
    """Collects what is printed, by Python and by the compiler's own code. Yields a reader."""
    with tempfile.TemporaryFile("w+") as file:
        stderr = os.dup(2)
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)

        def read() -> str:
            file.flush()
            file.seek(0)
            text = file.read()
            file.seek(0, os.SEEK_END)
            return text

        try:
            with redirect_stdout(file):
                yield read
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _of_kind(code: Code, kind: str) -> Iterable[Any]:
    return (i for i in code.instructions if i.kind == kind)


def _only(found: list[str]) -> int:
    (value,) = found
    return int(value)


def broken(variant: Variant, report: Report) -> list[str]:
    """The limits that a report breaks, in words."""
    if report.error is not None:
        return [f"does not compile: {report.error}"]
    problems = []
    capability = report.capability
    on_tensor_cores = variant.product not in (None, "fp32")
    if on_tensor_cores:
        expected = PRODUCTS[capability][str(variant.product)]
        if not expected & report.tensor.keys():
            names = " or ".join(sorted(expected))
            problems.append(f"expected {names} for {variant.product}, found {report.tensor}")
    if capability != TUNED_CAPABILITY:
        return problems
    if variant.head_dim in TUNED_HEAD_DIMS:
        spilled = report.spill_stores + report.spill_loads
        if spilled:
            problems.append(f"expected no spills, found {spilled} bytes")
        problems += [f"expected no loss, found {loss}" for loss in report.losses]
    if variant.role == "forward" and variant.head_dim == 128 and on_tensor_cores:
        limit = HOT_LOOP_SPECIALISED if variant.specialised else HOT_LOOP_PORTABLE
        if variant.language == "gluon":
            limit = HOT_LOOP_GLUON
        if variant.keys == 2 * HOT_LOOP_KEYS:
            limit = HOT_LOOP_PAIRS
        found = report.hot_loop.per_128_keys if report.hot_loop else None
        if found is None or found > limit:
            problems.append(f"expected at most {limit} instructions per 128 keys, found {found}")
    return problems


Place = tuple[str, int]  # name and capability: a row of the table
Variants = dict[Place, Variant]

# A worker imports the variants anew: functions of triton.jit cannot be sent to another process.
_variants: Variants = {}


def load(module: str) -> Variants:
    """What a module's `variants()` yields, for every capability on its own."""
    found: Variants = {}
    for variant in importlib.import_module(module).variants():
        for capability in variant.capabilities:
            if (variant.name, capability) in found:
                raise ValueError(f"{module}: two variants have the name {variant.name!r}")
            found[variant.name, capability] = variant
    return found


def _start_worker(module: str) -> None:
    _variants.update(load(module))


def _work(name: str, capability: int, dump: Path | None) -> Report:
    return compile_variant(_variants[name, capability], capability, dump)


def _pool(module: str, processes: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, _start_worker, (module,))


def compile_all(module: str, tasks: list[Place], dump: Path | None = None) -> Iterator[Report]:
    """Reports in the order in which they are done. A compiler that crashes costs one report."""
    lost = []
    with _pool(module, min(PROCESSES, len(tasks))) as pool:
        futures: dict[Future[Report], Place] = {
            pool.submit(_work, *task, dump): task for task in tasks
        }
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:  # all that were under way, and the one that crashed
                lost.append(futures[future])
    for name, capability in lost:
        with _pool(module, 1) as pool:
            try:
                yield pool.submit(_work, name, capability, dump).result()
            except BrokenProcessPool:
                yield Report(name, capability, error="the compiler crashed")


COLUMNS = ("kernel", "sm", "regs", "spills", "shared", "warps", "tensor", "hot loop", "/128 keys")


def cells(report: Report) -> tuple[str, ...]:
    if report.error is not None:
        return report.name, str(report.capability), report.error.splitlines()[-1], *([""] * 6)
    loop = report.hot_loop
    pools = "/".join(map(str, reversed(report.register_pools)))
    return (
        report.name,
        str(report.capability),
        f"{report.registers}" + (f" ({pools})" if pools else ""),
        f"{report.spill_stores}/{report.spill_loads}",
        f"{report.shared / 1024:.0f}K",
        str(report.warps),
        " ".join(f"{n} {op}" for op, n in report.tensor.items()),
        str(loop.instructions) if loop else "",
        f"{loop.per_128_keys:.0f}" if loop and loop.per_128_keys else "",
    )


def show(reports: list[Report]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        rows = [COLUMNS, *map(cells, reports)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=f"Triton {triton.__version__}")
    for column in COLUMNS:
        left = column in ("kernel", "tensor")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for report in reports:
        table.add_row(*cells(report))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


Document = dict[str, Any]


def document(reports: Iterable[Report], earlier: Document) -> Document:
    """The table as JSON: the new rows, and those of `earlier` that were not made again."""
    rows = {
        (name, int(sm)): row for name, of in earlier["kernels"].items() for sm, row in of.items()
    }
    for report in reports:
        row = {key: value for key, value in asdict(report).items() if value}
        place = row.pop("name"), row.pop("capability")
        rows[place] = row
    kernels: dict[str, dict[str, Any]] = {}
    for name, capability in sorted(rows):
        kernels.setdefault(name, {})[str(capability)] = rows[name, capability]
    return {"triton": triton.__version__, "kernels": kernels}


def reports_of(table: Document) -> Iterator[Report]:
    """The other way: what `document` was made of."""
    for name, of in table["kernels"].items():
        for sm, row in of.items():
            loop = HotLoop(**row["hot_loop"]) if "hot_loop" in row else None
            yield Report(name, int(sm), **{**row, "hot_loop": loop})


def read(path: Path) -> Document:
    """A table, or an empty one where there is no such file."""
    if path.exists():
        found: Document = json.loads(path.read_text())
        return found
    return {"triton": triton.__version__, "kernels": {}}


def write(path: Path, table: Document) -> None:
    """One line for each kernel and GPU. The file is whole at every moment."""
    kernels = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(sm)}: {json.dumps(row)}" for sm, row in of.items())
        + "\n  }"
        for name, of in table["kernels"].items()
    )
    text = f'{{\n "triton": {json.dumps(table["triton"])},\n "kernels": {{\n{kernels}\n }}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def differences(
    committed: Document, reports: Iterable[Report], variants: Iterable[Place]
) -> list[str]:
    """Where a table made by the same Triton says something else, or has rows of no variant."""
    before = {(r.name, r.capability): asdict(r) for r in reports_of(committed)}
    problems = []
    for report in reports:
        row, old = asdict(report), before.get((report.name, report.capability))
        if old is None:
            problems.append(f"{report.name} sm_{report.capability}: not in the committed table")
            continue
        problems += [
            f"{report.name} sm_{report.capability}: {key} is {value}, committed is {old[key]}"
            for key, value in row.items()
            if value != old[key]
        ]
    return problems + [
        f"{name} sm_{capability}: in the committed table, but no such variant"
        for name, capability in sorted(set(before) - set(variants))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES
    )
    parser.add_argument("--only", type=re.compile, help="regular expression in the names")
    parser.add_argument("--json", type=Path, help="where to write; without --check, the table")
    parser.add_argument("--check", action="store_true", help="compare with the table; leave it")
    parser.add_argument("--limits-only", action="store_true", help="with --check: do not compare")
    parser.add_argument("--dump", type=Path, help="folder for the machine code and its listings")
    parser.add_argument("--variants", default=VARIANTS, help="the module that has variants()")
    arguments = parser.parse_args()

    variants = load(arguments.variants)
    tasks = [
        (name, capability)
        for name, capability in variants
        if arguments.only is None or arguments.only.search(name)
        if capability in arguments.capability
    ]
    if not tasks:
        sys.exit("no variant has this name and capability")
    path = arguments.json or (None if arguments.check else RESULTS)
    committed = read(RESULTS)
    compare = arguments.check and not arguments.limits_only
    if compare and committed["triton"] != triton.__version__:
        sys.exit(
            f"the table is of Triton {committed['triton']}, this is {triton.__version__}: "
            "pass --limits-only, or use that version"
        )
    earlier: Document = {"kernels": {}}
    if path is not None and len(tasks) < len(variants):
        earlier = read(path)
        if earlier["triton"] != triton.__version__:
            sys.exit(f"{path} is of Triton {earlier['triton']}: make all of it anew")

    if arguments.dump is not None:
        arguments.dump.mkdir(parents=True, exist_ok=True)
    reports = []
    for report in compile_all(arguments.variants, tasks, arguments.dump):
        reports.append(report)
        done = f"[{len(reports)}/{len(tasks)}] {report.name} sm_{report.capability}"
        print(done, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    reports.sort(key=lambda report: tasks.index((report.name, report.capability)))
    show(reports)
    if path is not None:
        kept = {
            name: {sm: row for sm, row in of.items() if (name, int(sm)) in variants}
            for name, of in earlier["kernels"].items()
        }
        write(path, document(reports, {"kernels": kept}))

    problems = [
        f"{report.name} sm_{report.capability}: {problem}"
        for report in reports
        for problem in broken(variants[report.name, report.capability], report)
    ]
    if compare:
        problems += differences(committed, reports, variants)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems and arguments.check else 0)


if __name__ == "__main__":
    main()
