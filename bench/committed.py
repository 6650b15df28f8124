"""The measurements whose results are committed, each by one command that can be resumed.

    python bench/committed.py attention      # bench/results/attention.json, about 10 minutes
    python bench/committed.py scaling        # bench/results/scaling.json, about 15 minutes
    python bench/committed.py compile        # bench/results/compile.json, about 25 minutes
    python bench/committed.py transformer    # bench/results/transformer.json, about 40 minutes
    python bench/committed.py compile --check    # judges what is there, and measures nothing

On a quiet machine: two cores, nothing else. Each is a call of `fpsc bench run`, and goes on where
it was interrupted, case by case; with --fresh it starts again. Exit status: 0 where every target is
met, 1 where one is missed or was not measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fpsc.bench.fits import PAIRS  # noqa: E402
from fpsc.bench.record import Case, Quartiles, RecordError, Result, Run, ratio  # noqa: E402

RESULTS = ROOT / "bench" / "results"
THREADS = "2"


@dataclass(frozen=True)
class Target:
    """What was promised, what was found, in words, and whether that is enough."""

    name: str
    expected: str
    found: str
    met: bool


@dataclass(frozen=True)
class Measurement:
    """arguments: of `fpsc bench run`; targets: of what it writes."""

    arguments: tuple[str, ...]
    targets: Callable[[Run], Iterator[Target]]


def attention(run: Run) -> Iterator[Target]:
    """The op on one layer, and never slower than FlexAttention on the same lists."""
    for keep, least in ((0.25, 2.3), (0.125, 4.6)):
        case = run.of(f"attention/13x30x52/keep-{keep:g}")
        ours = case.of(f"fpsattn keep {keep:g}") if case else None
        yield at_least(f"op at keep {keep:g}, to SDPA", ours and ours.to_eager, least)
        flex = [r for r in case.measured if r.name.startswith("FlexAttention")] if case else []
        fastest = min((r.seconds.median for r in flex if r.seconds), default=None)
        if ours is None or ours.seconds is None or fastest is None:
            yield Target(f"op at keep {keep:g}, to FlexAttention", "1x", "not measured", False)
            continue
        speedup = fastest / ours.seconds.median
        yield Target(
            f"op at keep {keep:g}, to FlexAttention", "1x", f"{speedup:.2f}x", speedup >= 1
        )


def scaling(run: Run) -> Iterator[Target]:
    """Cost grows with visited tiles: the exponent of the fit is near one."""
    fit = next((f for f in run.fits if f.axis == PAIRS), None)
    found = f"{fit.exponent:.2f} from {len(fit.points)} points" if fit else "not measured"
    met = fit is not None and 0.85 <= fit.exponent <= 1.15
    yield Target("exponent of cost against visited pairs", "0.85 to 1.15", found, met)
    tokens = [case.problem.tokens for case in run.cases if "/tokens/" in case.name]
    met = bool(tokens) and min(tokens) <= 2048 and max(tokens) >= 32768
    yield Target("tokens", "2,048 to 32,768", ", ".join(map(str, sorted(tokens))), met)


def compiling(run: Run) -> Iterator[Target]:
    """Compile time of 30 layers, as a multiple of plain Inductor's."""
    for cache, most in (("cold", 1.15), ("warm", 1.25)):
        case = run.of(f"compile/wan-2.1-1.3b/{cache}")
        ours = case.of("fpsattn keep 0.25") if case else None
        inductor = case.of("Inductor") if case else None
        name, limit = f"compile time, {cache}, of Inductor's", f"at most {most}x"
        if not (ours and inductor and ours.seconds and inductor.seconds and case):
            yield Target(name, limit, "not measured", False)
            continue
        found = ours.seconds.median / inductor.seconds.median
        text = f"{found:.3f}x, {ours.seconds.median:.1f} s, {case.problem.layers} layers"
        yield Target(name, limit, text, found <= most and case.problem.layers == 30)


def transformer(run: Run) -> Iterator[Target]:
    """One denoising step of four layers, to Inductor with SDPA."""
    case = run.of("transformer/wan-2.1-1.3b/480p")
    ours, inductor = _pair(case, "fpsattn keep 0.125", "Inductor")
    speedup = ratio(inductor, ours) if ours is not None else None
    target = at_least("transformer, keep 0.125, to Inductor with SDPA", speedup, 1.6)
    if inductor is not None and inductor.split is not None:
        bound = f"; {inductor.split.bound():.2f}x if attention were free"
        target = Target(target.name, target.expected, target.found + bound, target.met)
    yield target


def _pair(case: Case | None, *names: str) -> tuple[Result | None, Result | None]:
    first, second = (case.of(name) if case else None for name in names)
    return first, second


def at_least(name: str, speedup: Quartiles | None, least: float) -> Target:
    if speedup is None:
        return Target(name, f"{least}x", "not measured", False)
    text = f"{speedup.median:.2f}x ({speedup.q1:.2f}..{speedup.q3:.2f})"
    return Target(name, f"{least}x", text, speedup.median >= least)


MEASUREMENTS = {
    "attention": Measurement(("attention/13x30x52",), attention),
    "scaling": Measurement(("scaling",), scaling),
    "compile": Measurement(("compile/wan-2.1-1.3b", "--rounds", "5"), compiling),
    "transformer": Measurement(
        (
            *("transformer/wan-2.1-1.3b/480p", "--layers", "4", "--grid", "13,30,52"),
            *("--keep", "0.125", "--rounds", "5", "--seconds", "1500"),
        ),
        transformer,
    ),
}


def judge(name: str) -> bool:
    """Print the targets of a committed file; whether all are met."""
    try:
        run = Run.load(RESULTS / f"{name}.json")
    except RecordError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    targets = list(MEASUREMENTS[name].targets(run))
    for target in targets:
        verdict = "met" if target.met else "MISSED"
        print(f"{verdict}: {target.name}: expected {target.expected}, found {target.found}")
    return all(target.met for target in targets)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=MEASUREMENTS)
    parser.add_argument("--check", action="store_true", help="measure nothing")
    parser.add_argument("--fresh", action="store_true", help="start again")
    given = parser.parse_args(arguments)
    for name in () if given.check else given.names:
        code = "import sys; from fpsc.cli import app; sys.exit(app())"
        command = [sys.executable, "-c", code, "bench", "run", *MEASUREMENTS[name].arguments]
        command += ["--threads", THREADS, "--output", f"bench/results/{name}.json"]
        ended = subprocess.run([*command, *(["--fresh"] if given.fresh else [])], cwd=ROOT)
        if ended.returncode:
            return ended.returncode
    missed = [name for name in given.names if not judge(name)]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
