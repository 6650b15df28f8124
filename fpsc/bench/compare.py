"""Whether one run is slower than another, by a rule that noise does not pass.

What is compared is each accelerated contender's speedup against the best dense contender that both
runs have, round by round: a machine that is slower as a whole slows both and changes nothing. A
contender is slower where its median fell by more than `threshold`, and an exact Mann-Whitney test
says that samples of one distribution differ so much in fewer than `alpha` of all cases. Both must
hold: a tiny change that is certain is no finding, nor is a large one that is luck.
"""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

from fpsc.bench.record import Case, RecordError, Result, Role, Run
from fpsc.errors import UserError

THRESHOLD = 0.05
ALPHA = 0.01
EXACT = 20
"""Samples up to which the test is exact; above, the normal approximation is as good."""


class Verdict(StrEnum):
    slower = "slower"
    faster = "faster"
    same = "same"
    unknown = "cannot tell"  # too few rounds for the test to say anything


@dataclass(frozen=True)
class Change:
    """One contender of one case in both runs.

    before, after: medians of its speedup against `against` (seconds, where there is none).
    change: how many times as fast it is now; below 1 is slower. p: of the test.
    """

    case: str
    contender: str
    against: str
    before: float
    after: float
    change: float
    p: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    only_before, only_after: cases that the other does not have. lost: contenders that were
    measured before and are not now. warnings: what makes the comparison less sure.
    """

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    lost: tuple[str, ...]
    warnings: tuple[str, ...]

    def of(self, verdict: Verdict) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict is verdict)


def compare(
    before: Run, after: Run, *, threshold: float = THRESHOLD, alpha: float = ALPHA
) -> Comparison:
    """Compare what both runs have.

    Raises:
        UserError: they were taken on different machines or libraries, a case is another problem in
            each, or they have no case in common.
    """
    differing = before.environment.differences(after.environment, source=False)
    if differing:
        raise UserError(
            "the runs cannot be compared, their environments differ: " + "; ".join(differing)
        )
    names = [case.name for case in before.cases if after.of(case.name) is not None]
    if not names:
        raise UserError("the runs have no case in common")
    changes: list[Change] = []
    warnings: list[str] = []
    lost: list[str] = []
    for name in names:
        one, other = before.of(name), after.of(name)
        assert one is not None and other is not None
        different = _differences(one, other)
        if different:
            raise UserError(f"{name} is another problem in each run: {'; '.join(different)}")
        changes += _changes(one, other, threshold, alpha)
        lost += _lost(one, other)
    loads = [f"{run.environment.load:g}" for run in (before, after) if run.environment.load]
    busy = [x for x in (before, after) if (x.environment.load or 0) > x.environment.cores / 2]
    if busy:
        warnings.append(f"the machine was busy (load {', '.join(loads)}): times are not quiet")
    return Comparison(
        changes=tuple(changes),
        only_before=tuple(c.name for c in before.cases if after.of(c.name) is None),
        only_after=tuple(c.name for c in after.cases if before.of(c.name) is None),
        lost=tuple(lost),
        warnings=tuple(warnings),
    )


def _differences(one: Case, other: Case) -> list[str]:
    a, b = one.problem.model_dump(), other.problem.model_dump()
    return [f"{key} {a[key]} and {b[key]}" for key in a if a[key] != b[key]]


def _lost(one: Case, other: Case) -> list[str]:
    """Contenders that were timed before and are not now."""
    found = []
    for result in one.measured:
        now = other.of(result.name)
        if now is None or now.status is not result.status:
            why = now.reason if now is not None else "not in the run"
            found.append(f"{one.name}: {result.name} was measured before; now: {why}")
    return found


def _changes(one: Case, other: Case, threshold: float, alpha: float) -> list[Change]:
    dense = _common_dense(one, other)
    found = []
    for result in one.measured:
        now = other.of(result.name)
        if now is None or result.seconds is None or now.seconds is None:
            continue
        if result.role is not Role.fpsattn and dense is not None:
            continue  # what it is measured by
        samples = [_samples(case, dense, r) for case, r in ((one, result), (other, now))]
        found.append(_judged(one.name, result.name, dense or "", samples, threshold, alpha))
    return found


def _common_dense(one: Case, other: Case) -> str | None:
    """The fastest dense contender of the first run that both have."""
    both = [
        r
        for r in one.measured
        if r.role in (Role.eager, Role.baseline) and r.keep is None and r.seconds is not None
    ]
    both = [r for r in both if (now := other.of(r.name)) is not None and now.seconds is not None]
    fastest = min(both, key=lambda r: r.seconds.median if r.seconds else math.inf, default=None)
    return fastest.name if fastest else None


def _samples(case: Case, dense: str | None, result: Result) -> list[float]:
    """Higher is faster: speedups, or calls a second where there is nothing to compare with."""
    assert result.seconds is not None
    against = case.of(dense)
    if against is None or against.seconds is None:
        return [1 / x for x in result.seconds.samples]
    pairs = zip(against.seconds.samples, result.seconds.samples, strict=True)
    return [a / b for a, b in pairs]


def _judged(
    case: str,
    contender: str,
    against: str,
    samples: Sequence[Sequence[float]],
    threshold: float,
    alpha: float,
) -> Change:
    before, after = samples
    medians = [statistics.median(x) for x in samples]
    change = medians[1] / medians[0]
    p = mann_whitney(before, after)
    verdict = Verdict.same
    if least_p(len(before), len(after)) > alpha:
        verdict = Verdict.unknown if abs(math.log(change)) > math.log1p(threshold) else Verdict.same
    elif p <= alpha and change < 1 - threshold:
        verdict = Verdict.slower
    elif p <= alpha and change > 1 + threshold:
        verdict = Verdict.faster
    return Change(case, contender, against, medians[0], medians[1], change, p, verdict)


# ---- the test


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the hypothesis that both come from one distribution.

    Mann and Whitney, "On a test of whether one of two random variables is stochastically larger
    than the other", 1947. Exact for up to 20 samples each, ties counted as halves and rounded
    towards no difference.
    """
    n, m = len(a), len(b)
    u = sum((x > y) + (x == y) / 2 for x in a for y in b)
    u = min(u, n * m - u)
    if max(n, m) > EXACT:
        mean, spread = n * m / 2, math.sqrt(n * m * (n + m + 1) / 12)
        return min(1.0, math.erfc(max(0.0, mean - u - 0.5) / spread / math.sqrt(2)))
    below = sum(_ways(n, m, k) for k in range(math.ceil(u) + 1))
    return min(1.0, 2 * below / math.comb(n + m, n))


@cache
def _ways(n: int, m: int, u: int) -> int:
    """In how many orders of n and m samples exactly u pairs are the other way round."""
    if u < 0:
        return 0
    if n == 0 or m == 0:
        return int(u == 0)
    return _ways(n - 1, m, u - m) + _ways(n, m - 1, u)


def least_p(n: int, m: int) -> float:
    """The smallest p that so many samples can have: every one on its own side."""
    return 2 / math.comb(n + m, n)


# ---- where runs are


def load(source: str, file: str | None = None) -> Run:
    """A run by its file, or by a git ref: the file committed there.

    file: the path within the repository, for a ref; `REF:PATH` names it too.

    Raises:
        UserError: there is no such file, no such ref, or no record in it.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return Run.load(path)
        ref, _, inside = source.partition(":")
        inside = inside or (file or "")
        if path.suffix == ".json" and not inside:
            raise UserError(f"{source}: no such file")
        if not inside:
            raise UserError(
                f"{source}: no such file; for a git ref, name the record in it: --file "
                f"bench/results/NAME.json, or {source}:bench/results/NAME.json"
            )
        return Run.parse(_committed(ref, inside), f"{inside} at {ref}")
    except RecordError as error:
        raise UserError(str(error)) from error


def _committed(ref: str, path: str) -> str:
    if ref.startswith("-"):
        raise UserError(f"{ref}: not a git ref")
    try:
        done = subprocess.run(
            ("git", "show", "--end-of-options", f"{ref}:{path}"),
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{ref}: git cannot be asked: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(f"{path} at {ref}: {said[-1] if said else 'git has no such file'}")
    return done.stdout
