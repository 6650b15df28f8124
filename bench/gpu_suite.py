"""Everything that only a GPU can show, in one command; needs no network.

    python bench/gpu_suite.py                          # all parts, each in under 9 minutes
    python bench/gpu_suite.py --part 0 1               # some
    python bench/gpu_suite.py --part 3 --resume        # goes on where a cut run stopped
    python bench/gpu_suite.py --summary bench/results/gpu/*.json
    python bench/gpu_suite.py --smoke --out /tmp/x     # parts 0, 1, 2, 6, tiny, on CPU

| part | what it shows |
|---|---|
| 0 | the public line: 50 timesteps, CUDA graphs, portrait and landscape, forward and backward |
| 1 | the kernels against the reference, 100 repeats for races, uninitialised memory poisoned |
| 2 | CUDA graphs of the bare op across noise levels, policy edited between replays |
| 3 | times of forward and backward beside every dense attention that is here |
| 4 | measured ceilings, and the share of them that the kernels reach |
| 5 | the kernels of one call apart, and the memory that training holds |
| 6 | whole models beside every other way to run them; Amdahl's split; scaling; compile times |

Each part is a process of its own and writes one file, `part<N>.json` in --out, after every case.
--budget is looked at between cases; what was skipped for time is listed by name.

Exit codes: 0 all is right; 1 something is wrong or a mark is missed; 2 bad arguments; 3 no GPU to
run on; 4 nothing is wrong, but something was skipped or not measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for name in ("bench", "tests"):  # an installed package of this name would win over the folder
    spec = find_spec(name)
    if spec is None or spec.origin is not None:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT / name)]

PARTS = ("public_line", "matrix", "graphs", "timings", "ceilings", "profile", "models")
SMOKE_PARTS = (0, 1, 2, 6)
BUDGET = 460.0
GRACE = 70.0
"""Seconds that the last case of a part may outlast the budget: then the part is ended."""
RESULTS = ROOT / "bench" / "results" / "gpu"
RIGHT, WRONG, USAGE, NO_GPU, INCOMPLETE = 0, 1, 2, 3, 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, nargs="+", choices=range(len(PARTS)))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for each part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--resume", action="store_true", help="skip what the files already have")
    parser.add_argument("--smoke", action="store_true", help="some parts, tiny, on CPU")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="FILE", help="print and judge")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.summary:
        from bench.gpu.summary import summarise

        return summarise(given.summary)
    parts = given.part or list(SMOKE_PARTS if given.smoke else range(len(PARTS)))
    if given.smoke and not set(parts) <= set(SMOKE_PARTS):
        parser.error(f"--smoke has the parts {', '.join(map(str, SMOKE_PARTS))} alone")
    if given.smoke or given.child:
        return worst([run_part(part, given) for part in parts])

    from bench.gpu.device import missing

    lacking = missing()
    if lacking:
        print(f"the GPU suite cannot run here; missing: {'; '.join(lacking)}", file=sys.stderr)
        return NO_GPU
    code = worst([run_process(part, given) for part in parts])
    print(f"to judge: python {sys.argv[0]} --summary {given.out}/*.json")
    return code


def run_process(part: int, given: argparse.Namespace) -> int:
    """One part in a process of its own, which a hanging kernel cannot outlive."""
    print(f"== part {part}: {PARTS[part]}", flush=True)
    command = [sys.executable, __file__, "--child", "--part", str(part), "--out", str(given.out)]
    command += ["--budget", str(given.budget), *(["--resume"] if given.resume else [])]
    # cuBLAS is deterministic with this alone; part 1 asks for it, and no part times around it.
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if part == 1 else {}
    try:
        return subprocess.run(
            command, env={**os.environ, **deterministic}, timeout=given.budget + GRACE
        ).returncode
    except subprocess.TimeoutExpired:
        from bench.gpu.run import close_cut

        name = close_cut(file_of(part, given.out))
        print(f"part {part} was ended {GRACE:.0f} s after its budget, during: {name}", flush=True)
        return WRONG


def run_part(part: int, given: argparse.Namespace) -> int:
    """One part in this process."""
    deadline = time.monotonic() + given.budget
    from importlib import import_module

    import torch

    from bench.gpu import device
    from bench.gpu.run import Document, Setup, run

    # float32 means float32, for what is measured and for what it is compared with.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    setup = Setup(torch.device("cpu" if given.smoke else "cuda"), smoke=given.smoke)
    path = file_of(part, given.out)
    try:
        document = Document(path, PARTS[part], device.environment(), resume=given.resume)
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    run(import_module(f"bench.gpu.{PARTS[part]}").cases(setup), document, deadline)
    return code_of(document.data)


def code_of(document: dict[str, Any]) -> int:
    if any(record["status"] != "ok" for record in document["records"]):
        return WRONG
    return INCOMPLETE if document["skipped"] or document["running"] else RIGHT


def worst(codes: list[int]) -> int:
    """The code of several parts: what is wrong outweighs what is missing."""
    order = (RIGHT, INCOMPLETE, WRONG, USAGE, NO_GPU)
    return max((code if code in order else WRONG for code in codes), key=order.index)


def file_of(part: int, folder: Path) -> Path:
    return folder / f"part{part}.json"


if __name__ == "__main__":
    sys.exit(main())
