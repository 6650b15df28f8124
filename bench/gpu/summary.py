"""The results as tables, and the marks that they are judged by."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.gpu.models import HEADLINE
from fpsc.bench.fits import break_evens, fits_of
from fpsc.bench.record import Result, Role, Run, ratio
from fpsc.cli.bench.output import show_case, show_curves

PASS, MISSED, NOT_MEASURED = "PASS", "MISSED", "not measured"
CODES = {PASS: 0, MISSED: 1, NOT_MEASURED: 4}
CORRECTNESS = {
    "public_line": "0: the public line with real kernels",
    "matrix": "1: the kernels against the reference",
    "graphs": "2: CUDA graphs of the op",
    "timings": "3: what is timed",
    "ceilings": "4: ceilings and shares",
    "profile": "5: kernels apart, memory",
    "models": "6: whole models",
}

Document = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """found: what was measured, in words; verdict: PASS, MISSED or "not measured"."""

    name: str
    expected: str
    found: str
    verdict: str


def summarise(paths: Iterable[Path]) -> int:
    """Print tables and marks; the exit code: 0 all pass, 1 some missed, 4 some not measured."""
    documents = [json.loads(path.read_text()) for path in paths]
    console = Console(width=None if sys.stdout.isatty() else 140)
    for document in documents:
        console.print(heading(document), markup=False, highlight=False)
        if document["part"] == "timings":
            for record in document["records"]:
                if record.get("contenders"):
                    console.print(timing_table(record))
        elif document["part"] in ("ceilings", "profile"):
            console.print(profile_table(document))
        elif document["part"] == "models":
            show_models(document, console)
        for line in unwell(document):
            console.print(line, markup=False, highlight=False)
    found = marks(documents)
    table = Table("mark", "expected", "found", "", title="marks")
    for mark in found:
        colour = {PASS: "green", MISSED: "red"}.get(mark.verdict, "yellow")
        table.add_row(mark.name, mark.expected, mark.found, f"[{colour}]{mark.verdict}[/]")
    console.print(table)
    verdicts = {mark.verdict for mark in found}
    return next((CODES[v] for v in (MISSED, NOT_MEASURED) if v in verdicts), 0)


# ---- tables


def heading(document: Document) -> str:
    there, counts = document["environment"], Counter(r["status"] for r in document["records"])
    counted = ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing"
    left = f", {len(document['skipped'])} skipped" if document["skipped"] else ""
    return (
        f"\n{document['part']}: {counted}{left} ({there['device']}, torch {there['torch']}, "
        f"triton {there['triton']}, source {there['source']}, {there['time']})"
    )


def unwell(document: Document) -> list[str]:
    """What is wrong, failed, cut or skipped."""
    lines = [
        f"  {record['status']}: {record['name']}: {'; '.join(record.get('problems', []))}"
        for record in document["records"]
        if record["status"] != "ok"
    ]
    if document["running"]:
        lines.append(f"  cut during: {document['running']}")
    return lines + [f"  skipped: {name}" for name in document["skipped"]]


def timing_table(record: Record) -> Table:
    columns = ("", "ms", "quartiles", "TFLOP/s visited", "to the best bf16", "error")
    table = Table(*columns, title=record["name"], caption=f"best: {record['best_baseline']}")
    for name, found in record["contenders"].items():
        ms, ratio = found["ms"], found.get("to_best")
        table.add_row(
            name,
            f"{ms['median']:.3f}",
            f"{ms['q1']:.3f}..{ms['q3']:.3f}",
            f"{found['tflops']:.0f}",
            f"{ratio['median']:.2f}x" if ratio else "",
            str(found["error"]),
        )
    for name, reason in record["not_timed"].items():
        table.add_row(name, "", reason.splitlines()[0][:70])
    return table


def profile_table(document: Document) -> Table:
    table = Table("case", "result", title=document["part"])
    for record in document["records"]:
        shown = {
            key: record[key]
            for key in ("ceilings", "bytes_per_second", "ms", "rates", "held_bytes", "saved")
            if key in record
        }
        if shown:
            text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in shown.items())
            table.add_row(record["name"], text)
    return table


# ---- marks


def marks(documents: list[Document]) -> list[Mark]:
    """Every mark, measured or not."""
    return [
        *(correctness(documents, part, name) for part, name in CORRECTNESS.items()),
        speedup(documents, "headline forward", "fpsc keep 1", 1.5),
        speedup(documents, "headline forward", "fpsc keep 0.125", 7.1),
        speedup(documents, "headline forward", "fpsc keep 0.1", 10.0),
        rate(documents, "fpsc keep 1", 900.0),
        ceiling(documents, "fpsc keep 1", 0.5),
        prologue(documents, 0.125, 0.8),
        speedup(documents, "headline backward", "fpsc keep 0.25", 2.0),
        both_ways(documents, "fpsc keep 0.25", 3.0),
        memory(documents),
        *whole_models(documents),
    ]


def correctness(documents: list[Document], part: str, name: str) -> Mark:
    """Every case of a part ran and is right."""
    records = [r for d in documents if d["part"] == part for r in d["records"]]
    left = [
        case
        for d in documents
        if d["part"] == part
        for case in [*d["skipped"], *([d["running"]] if d["running"] else [])]
    ]
    bad = [r for r in records if r["status"] in ("wrong", "error")]
    left += [r["name"] for r in records if r["status"] == "cut"]
    found = f"{len(records) - len(bad)} of {len(records)} right"
    found += f", {len(left)} not run" if left else ""
    if bad:
        return Mark(name, "every case right", found, MISSED)
    verdict = NOT_MEASURED if left or not records or not on_gpu(documents, part) else PASS
    return Mark(name, "every case right", found if records else "", verdict)


def on_gpu(documents: list[Document], part: str) -> bool:
    """A smoke test on CPU judges nothing."""
    return all("capability" in d["environment"] for d in documents if d["part"] == part)


def speedup(documents: list[Document], case: str, contender: str, expected: float) -> Mark:
    """The ratio to the fastest BF16 attention of the same run."""
    name = f"{case}, {contender}, to the best bf16 kernel"
    record = _record(documents, "timings", case)
    found = record and record.get("contenders", {}).get(contender, {}).get("to_best")
    if not record or not found:
        return Mark(name, f"{expected}x", _why(record, contender), NOT_MEASURED)
    text = f"{found['median']:.2f}x ({found['q1']:.2f}..{found['q3']:.2f}) of {_best(record)}"
    absent = ", ".join(record["not_timed"])
    text += f"; not timed: {absent}" if absent else ""  # the best may be missing
    return Mark(name, f"{expected}x", text, PASS if found["median"] >= expected else MISSED)


def both_ways(documents: list[Document], contender: str, expected: float) -> Mark:
    """Forward and backward together, to the BF16 attention that is fastest at both together."""
    name = f"headline forward and backward, {contender}, to the best bf16 kernel"
    records = [_record(documents, "timings", f"headline {way}") for way in ("forward", "backward")]
    timed = [record["contenders"] if record else {} for record in records]
    totals = {
        one: sum(contenders[one]["ms"]["median"] for contenders in timed)
        for one in timed[0].keys() & timed[1].keys()
    }
    baselines = [one for one in totals if timed[0][one]["baseline"]]
    if contender not in totals or not baselines:
        missing = next((r for r, t in zip(records, timed, strict=True) if contender not in t), None)
        return Mark(name, f"{expected}x", _why(missing, contender), NOT_MEASURED)
    best = min(baselines, key=totals.__getitem__)
    found = totals[best] / totals[contender]
    text = f"{found:.2f}x of {best}, {totals[best]:.2f} ms"
    return Mark(name, f"{expected}x", text, PASS if found >= expected else MISSED)


def rate(documents: list[Document], contender: str, expected: float) -> Mark:
    """TFLOP/s of the whole forward over visited tiles, prologue included."""
    name = f"headline forward, {contender}, on the tiles it visits"
    record = _record(documents, "timings", "headline forward")
    found = record and record.get("contenders", {}).get(contender)
    if not record or not found:
        return Mark(name, f"{expected:.0f} TFLOP/s", _why(record, contender), NOT_MEASURED)
    verdict = PASS if found["tflops"] >= expected else MISSED
    return Mark(name, f"{expected:.0f} TFLOP/s", f"{found['tflops']:.0f} TFLOP/s", verdict)


def prologue(documents: list[Document], keep: float, expected: float) -> Mark:
    """Its rate for the fewest bytes that it could move, of a copy's."""
    name = "headline prologue, of the bandwidth of a copy"
    record = _record(documents, "ceilings", f"share of forward, keep {keep:g}")
    found = record and record.get("rates", {}).get("prologue")
    if not record or not found:
        return Mark(name, f"{expected:.0%}", _why(record, "prologue"), NOT_MEASURED)
    share = found["of copy"]
    text = f"{share:.1%} ({found['bytes_per_second'] / 1e12:.2f} TB/s)"
    return Mark(name, f"{expected:.0%}", text, PASS if share >= expected else MISSED)


def ceiling(documents: list[Document], contender: str, expected: float) -> Mark:
    """The rate of the whole forward over visited tiles, prologue included, of the FP8 product's."""
    name = f"headline forward, {contender}, of the FP8 matrix product"
    timed = _document(documents, "timings", "headline forward")
    products = _document(documents, "ceilings", "matrix products")
    if timed is None or products is None:
        return Mark(name, f"{expected:.0%}", "", NOT_MEASURED)
    devices = [d["environment"]["device"] for d in (timed, products)]
    if devices[0] != devices[1]:
        return Mark(name, f"{expected:.0%}", f"on {' and '.join(devices)}", NOT_MEASURED)
    record = _record([timed], "timings", "headline forward")
    found = record and record.get("contenders", {}).get(contender)
    limits = _record([products], "ceilings", "matrix products")
    if not found or not limits or "ceilings" not in limits:
        return Mark(name, f"{expected:.0%}", _why(record, contender), NOT_MEASURED)
    share = found["tflops"] / limits["ceilings"]["fp8"]
    text = f"{share:.1%} ({found['tflops']:.0f} of {limits['ceilings']['fp8']:.0f} TFLOP/s)"
    return Mark(name, f"{expected:.0%}", text, PASS if share >= expected else MISSED)


def memory(documents: list[Document]) -> Mark:
    """Autograd holds less than with BF16; by how much is measured, and has no mark of its own."""
    name = "memory that training holds, fp8 cells against bf16"
    record = _record(documents, "profile", "memory")
    if not record or "saved" not in record:
        return Mark(name, "less", _why(record, "memory"), NOT_MEASURED)
    verdict = PASS if record["saved"] > 0 else MISSED
    return Mark(name, "less", f"{record['saved']:.1%} less", verdict)


WHOLE = {
    ("eager", "fpsattn keep 0.125, FP8 linears"): 4.96,
    ("the best", "fpsattn keep 0.125"): 2.4,
    ("the best", "fpsattn keep 0.125, FP8 linears"): 3.5,
}
"""Of one denoising step at HEADLINE: what the speedup is of, whose, and how much is promised. The
best is the fastest that is dense and does not round."""


def whole_models(documents: list[Document]) -> list[Mark]:
    """One denoising step of Wan2.1-14B at 720p, with the bound that Amdahl's split leaves."""
    record = _record(documents, "models", HEADLINE)
    found = record and record.get("run") and Run.model_validate(record["run"]).of(HEADLINE)
    marks = []
    for (of, contender), least in WHOLE.items():
        name = f"{HEADLINE}, {contender}, to {of}"
        result = found and found.of(contender)
        others = (
            [r for r in found.measured if r.role in (Role.eager, Role.baseline)] if found else []
        )
        base = found and (found.eager if of == "eager" else min(others, key=_median, default=None))
        speedup = ratio(base, result) if base and result else None
        if speedup is None or base is None:
            why = result.reason if result else _why(record, contender)
            marks.append(Mark(name, f"{least}x", why, NOT_MEASURED))
            continue
        bound = f"; at most {base.split.bound():.2f}x by attention alone" if base.split else ""
        verdict = PASS if speedup.median >= least else MISSED
        marks.append(
            Mark(name, f"{least}x", f"{speedup.median:.2f}x of {base.name}{bound}", verdict)
        )
    return marks


def _median(result: Result) -> float:
    return result.seconds.median if result.seconds else float("inf")


def show_models(document: Document, console: Console) -> None:
    """The tables of `fpsc bench`; the fits of all scaling cases together."""
    runs = [Run.model_validate(r["run"]) for r in document["records"] if r.get("run")]
    cases = [case for run in runs for case in run.cases]
    for case in cases:
        show_case(case, console)
    show_curves(tuple(fits_of(cases)), tuple(break_evens(cases)), console)


def _best(record: Record) -> str:
    name = record["best_baseline"]
    return f"{name}, {record['contenders'][name]['ms']['median']:.2f} ms"


def _why(record: Record | None, contender: str) -> str:
    if not record:
        return ""
    reason = record.get("not_timed", {}).get(contender) or "; ".join(record.get("problems", []))
    return str(reason)[:120]


def _document(documents: list[Document], part: str, case: str) -> Document | None:
    """The newest document of a part that holds a case."""
    holding = [d for d in documents if d["part"] == part and _record([d], part, case)]
    return max(holding, key=lambda d: d["environment"]["time"], default=None)


def _record(documents: list[Document], part: str, case: str) -> Record | None:
    """The newest record whose name is, or begins with, that of a case."""
    named: Callable[[Record], bool] = lambda r: r["name"].split(":")[0] == case  # noqa: E731
    found = [r for d in documents if d["part"] == part for r in d["records"] if named(r)]
    return max(found, key=lambda r: r["at"], default=None)
