"""What tuning is worth on the demo model, and whether its predictions hold.

    python bench/tune.py               # bench/results/tune.json and its picture, about an hour
    python bench/tune.py --check       # judges what is there, and measures nothing

For each of three seeds (other prompts, other noise) a calibration, and on prompts that it has not
seen the true error of the final latents: of the tuned policies at keep 0.25, of every single mode
of equal cost in all heads, of every built-in policy, and of what is tuned for the same cost. Then,
for the first seed, predicted against true error of 20 policies. Every run is kept as soon as it is
done, in build/tune; the command goes on where it was interrupted. Exit status: 0 where every target
is met, 1 where one is missed or was not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fpsc.bench.environment import environment  # noqa: E402
from fpsc.bench.markdown import markdown  # noqa: E402
from fpsc.files import replacing  # noqa: E402
from fpsc.grid import layout  # noqa: E402
from fpsc.policy import Policy, find, plan, presets, resolve  # noqa: E402
from fpsc.tune import choose, landscape, modes, predict, subjects, write  # noqa: E402
from fpsc.tune.budget import Budget  # noqa: E402
from fpsc.tune.calibrate import FILE, Settings, calibrate  # noqa: E402
from fpsc.tune.choose import Wishes  # noqa: E402
from fpsc.tune.parts import Parts  # noqa: E402
from fpsc.tune.record import Calibration  # noqa: E402
from fpsc.tune.subjects import Subject  # noqa: E402
from fpsc.tune.validate import Validator, held_out  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "tune.json"
PICTURE = ROOT / "docs" / "pictures" / "tune-rank.png"
WORK = ROOT / "build" / "tune"

SEEDS, HELD_OUT, STEPS = (0, 1, 2), 3, 20
KEEP = 0.25
POLICIES = 20
"""Of the rank correlation."""

MOST_SECONDS, MOST_AGAIN, LEAST_RANK = 600.0, 5.0, 0.9


def say(what: str, done: int = 0, total: int = 0) -> None:
    print(f"  {what}" + (f" ({done}/{total})" if total else ""), flush=True)


# ---- the parts


def commands() -> dict[str, float]:
    """Seconds of the public commands: from nothing, and from the stored calibration."""
    parts, folder = Parts(WORK, {"steps": STEPS}), WORK / "command"
    found = parts.facts("commands.json")
    if found is None:
        code = "import sys; from fpsc.cli import app; sys.exit(app())"
        run = [sys.executable, "-c", code, "tune"]
        seconds = []
        for more in (
            ["demo", "--budget", f"keep={KEEP}", "--fresh", "--within", "1000"],
            ["--from", str(folder / FILE), "--budget", "keep=0.4"],
        ):
            began = time.perf_counter()
            subprocess.run([*run, *more, "--out", str(folder)], cwd=ROOT, check=True)
            seconds.append(round(time.perf_counter() - began, 2))
        found = {"tune": seconds[0], "again": seconds[1]}
        parts.note("commands.json", found)
    return dict(found)


def keep_of(policy: Policy, calibration: Calibration) -> float:
    """Mean keep of a policy over the run, its layers and heads, whatever its modes."""
    run = calibration.run
    table = resolve(policy, layers=run.layers, heads=run.heads, fp8=True)
    keep = table.keep(plan(policy, layout(run.grid, policy.tile_for(run.grid))))
    return float(np.mean([keep[table.row_of(noise)] for noise in run.steps]))


def applied(name: str) -> Policy:
    """A built-in policy, also where the demo's video is shorter than it is meant for."""
    value = find(name).document.value
    # Of one structure with the candidates: dtypes that do not occur are there, unused.
    unused = {"unused": {"keep": 1.0, "dtype": "bf16"}, "unused-fp8": {"keep": 1.0, "dtype": "fp8"}}
    changes = {"modes": {**value["modes"], **unused}, "limits": {"min_tokens": 0}}
    return Policy.from_dict({**value, **changes})


def built_in() -> dict[str, Policy]:
    """By name; of those that say the same one."""
    found: dict[str, Policy] = {}
    for name in sorted(presets()):
        policy = applied(name)
        if name != modes.DENSE and not any(landscape.alike(policy, p) for p in found.values()):
            found[name] = policy
    return found


def tuned_name(keep: float) -> str:
    return f"tuned-{keep:.4f}".replace(".", "_")


def tuned(calibration: Calibration, keep: float, folder: Path) -> dict[str, tuple[Policy, float]]:
    """The table and the phases for a keep, with the errors that are predicted."""
    chosen = choose.choose(calibration, Budget("keep", keep), Wishes())
    name = tuned_name(keep)
    table = write.write_table(
        folder / f"{name}.yaml", calibration, chosen.choice, chosen.simple, {}
    )
    found = {name: (table, chosen.predicted.error)}
    if chosen.simple is not None and chosen.simple_predicted is not None:
        path = folder / f"{name}-phases.yaml"
        policy = write.write_phases(path, calibration, chosen.simple, {})
        found[f"{name}-phases"] = policy, chosen.simple_predicted.error
    return found


def uniform(calibration: Calibration, name: str) -> tuple[Policy, float]:
    mode = calibration.names.index(name)
    error = predict.of_choice(calibration, choose.uniform(calibration, mode)).error
    return modes.policy(calibration.facts.modes, [(1.0, 0.0, name)]), error


def random_policy(calibration: Calibration, number: int, folder: Path) -> tuple[Policy, float]:
    """A mode drawn for every cell, from three that are drawn first."""
    run, rng = calibration.run, np.random.default_rng(number)
    of = rng.choice(len(run.keep), 3, replace=False)
    choice = rng.choice(of, (run.bins, run.layers, run.heads))
    policy = write.write_table(folder / f"random-{number}.yaml", calibration, choice, None, {})
    return policy, predict.of_choice(calibration, choice).error


def predicted(calibration: Calibration, policy: Policy) -> float | None:
    try:
        return predict.of_policy(calibration, policy).error
    except predict.NotMeasured:
        return None


def many(calibration: Calibration, folder: Path) -> dict[str, tuple[Policy, float]]:
    """20 policies of all kinds, from hardly sparse to very sparse."""
    found: dict[str, tuple[Policy, float]] = {}
    for keep in (0.12, 0.18, 0.25, 0.35, 0.5, 0.7):
        found |= dict([next(iter(tuned(calibration, keep, folder).items()))])
    names = [
        *("near-0_125", "near-0_25", "near-0_5", "near-0_75", "frame-0_25", "column-0_25"),
        *("radial-0_5", "near-0_25-fp8", "dense-fp8"),
    ]
    found |= {f"uniform-{name}": uniform(calibration, name) for name in names}
    for name in ("demo", "generic", "generic-tuned"):
        policy = applied(name)
        found[f"preset-{name}"] = policy, predict.of_policy(calibration, policy).error
    while len(found) < POLICIES:
        number = len(found)
        found[f"random-{number}"] = random_policy(calibration, number, folder)
    return found


def seed_result(seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    print(f"seed {seed}", flush=True)
    folder = WORK / f"seed-{seed}"
    subject: Subject = subjects.demo(seed, STEPS)
    settings = Settings(modes.default(), cost="pairs", seed=seed)
    calibration = calibrate(subject, settings, folder, tell=say)
    prompts = held_out(calibration, subject, HELD_OUT)
    runs = Parts(folder / "runs", {"prompts": prompts, "steps": STEPS})
    validator = Validator(subject, calibration, prompts, parts=runs, tell=say)
    policies: dict[str, tuple[Policy, float | None]] = dict(tuned(calibration, KEEP, folder))
    one = [n for n, k in zip(calibration.names, calibration.run.keep, strict=True) if k == KEEP]
    policies |= {f"uniform-{name}": uniform(calibration, name) for name in one}
    against: dict[str, str] = {}
    for name, policy in built_in().items():
        policies[f"preset-{name}"] = policy, predicted(calibration, policy)
        keep = round(keep_of(policy, calibration), 4)
        at_equal_cost = tuned(calibration, keep, folder)
        against[f"preset-{name}"] = next(iter(at_equal_cost))
        policies |= dict([next(iter(at_equal_cost.items()))])
    if seed == SEEDS[0]:
        policies |= many(calibration, folder)
    found = validator.run(policies)
    return {
        "seed": seed,
        "prompts": list(prompts),
        "gains": [float(f"{g:.4g}") for g in calibration.gains],
        "policies": {
            name: {
                "keep": round(keep_of(policies[name][0], calibration), 4),
                "errors": [float(f"{e:.5g}") for e in each.errors],
                "error": float(f"{each.error:.5g}"),
                "predicted": each.predicted and float(f"{each.predicted:.5g}"),
                "psnr_db": round(float(np.mean(each.psnr)), 3),
            }
            for name, each in found.items()
        },
        "against": against,
        "ranked": sorted(many(calibration, folder)) if seed == SEEDS[0] else [],
    }


# ---- what it comes to


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(x: Sequence[float]) -> np.ndarray:
        values = np.asarray(x)
        return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranked(record: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(predicted, found) of the 20 policies."""
    first = record["seeds"][0]
    each = [first["policies"][name] for name in first["ranked"]]
    return [x["predicted"] for x in each], [x["error"] for x in each]


def best_single(policies: dict[str, Any]) -> str:
    """The mode that in all heads at all noise has the least error at `KEEP`."""
    ones = [n for n, p in policies.items() if n.startswith("uniform") and p["keep"] == KEEP]
    return min(ones, key=lambda name: float(policies[name]["error"]))


def targets(record: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(what was promised, what was found, whether it is met)."""
    seconds = record["seconds"]
    yield (
        f"tune demo in {MOST_SECONDS:g} s",
        f"{seconds['tune']} s",
        seconds["tune"] <= MOST_SECONDS,
    )
    yield f"again in {MOST_AGAIN:g} s", f"{seconds['again']} s", seconds["again"] <= MOST_AGAIN
    for each in record["seeds"]:
        policies, seed = each["policies"], each["seed"]
        mine, best = policies[tuned_name(KEEP)]["error"], best_single(policies)
        other = policies[best]["error"]
        words = f"{mine:.4f}, and {best} {other:.4f}"
        yield f"seed {seed}: better than one mode at keep {KEEP}", words, mine < other
        for preset, name in each["against"].items():
            a, b = policies[name], policies[preset]
            words = f"{a['error']:.4f} at {a['keep']}, and {b['error']:.4f} at {b['keep']}"
            met = a["error"] < b["error"] and a["keep"] <= b["keep"] + 1e-6
            yield f"seed {seed}: better than {preset} at its cost", words, met
    a, b = ranked(record)
    rank = spearman(a, b)
    met = rank >= LEAST_RANK and len(a) == POLICIES
    yield f"rank correlation of {POLICIES} policies, {LEAST_RANK}", f"{rank:.3f} of {len(a)}", met


def at_keep(record: dict[str, Any]) -> str:
    """A row for each seed: tuned at `KEEP`, and the best single mode there."""
    name, rows = tuned_name(KEEP), []
    for each in record["seeds"]:
        policies = each["policies"]
        best = best_single(policies)
        mine, phases, other = policies[name], policies[f"{name}-phases"], policies[best]
        rows.append(
            (
                str(each["seed"]),
                *(f"{p['error']:.2f} ({p['psnr_db']:.1f} dB)" for p in (mine, phases, other)),
                best.removeprefix("uniform-").replace("_", "."),
                f"{mine['predicted']:.2f}",
            )
        )
    head = ("seed", "tuned", "tuned, in phases", "best single mode", "which is", "predicted")
    return markdown(head, rows)


def at_equal_cost(record: dict[str, Any]) -> str:
    """A row for each built-in policy: its error, and that of what was tuned for its keep; means
    over the seeds."""
    rows = []
    for preset in record["seeds"][0]["against"]:
        pairs = [
            (each["policies"][preset], each["policies"][each["against"][preset]])
            for each in record["seeds"]
        ]
        theirs, ours = (float(np.mean([pair[i]["error"] for pair in pairs])) for i in range(2))
        keep = pairs[0][0]["keep"]
        rows.append((preset.removeprefix("preset-"), f"{keep:.2f}", f"{theirs:.3f}", f"{ours:.3f}"))
    rows.sort(key=lambda row: float(row[1]))
    return markdown(("built-in policy", "keep", "its error", "tuned for this keep"), rows)


PARTS: dict[str, Callable[[Path], str]] = {
    "keep": lambda path: at_keep(json.loads(path.read_text(encoding="utf-8"))),
    "cost": lambda path: at_equal_cost(json.loads(path.read_text(encoding="utf-8"))),
}
"""The tables of docs/tune.md, by their name behind the file's (`bench.readme`)."""


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    first = record["seeds"][0]
    figure = Figure(figsize=(5.5, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    kinds = {"tuned": "#d1495b", "uniform": "#22577a", "preset": "#57a773", "random": "#e9b44c"}
    for (kind, colour), marker in zip(kinds.items(), "o^sD", strict=True):
        points = [first["policies"][n] for n in first["ranked"] if n.startswith(kind)]
        axes.plot(
            [p["predicted"] for p in points],
            [p["error"] for p in points],
            marker,
            color=colour,
            label=kind,
        )
    low, high = min(map(min, ranked(record))) / 1.5, max(map(max, ranked(record))) * 1.5
    axes.plot([low, high], [low, high], color="#59636e", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="predicted", ylabel="on held-out prompts")
    axes.set_title(
        f"Relative error of the final latents; rank correlation {spearman(*ranked(record)):.3f}",
        fontsize=10,
        loc="left",
    )
    axes.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110, metadata={"Software": None})


def judge() -> int:
    if not RESULTS.is_file():
        print(f"MISSED: {RESULTS} is not there")
        return 1
    verdicts = list(targets(json.loads(RESULTS.read_text())))
    for name, found, met in verdicts:
        print(f"{'met' if met else 'MISSED'}: {name}: {found}")
    return 0 if all(met for *_, met in verdicts) else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="measure nothing")
    if not parser.parse_args(arguments).check:
        seconds = commands()
        record = {
            "command": "python bench/tune.py",
            "steps": STEPS,
            "held_out": HELD_OUT,
            "environment": environment(torch.device("cpu")).model_dump(mode="json"),
            "seconds": seconds,
            "seeds": [seed_result(seed) for seed in SEEDS],
        }
        with replacing(RESULTS) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draw(record, PICTURE)
    return judge()


if __name__ == "__main__":
    sys.exit(main())
