"""The records as tables, and the marks that joint training is judged by."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.committed import Target
from bench.tuning import survey
from bench.tuning.record import Record, RecordError
from bench.tuning.variants import CONTROL, DENSE, VARIANTS, Run, Scale, Variant, runs
from fpsc.bench.markdown import NONE, markdown
from fpsc.demo.model import FLOW_SHIFT, GRID
from fpsc.grid import TokenGrid
from fpsc.policy import Policy
from fpsc.policy.accounting import account
from fpsc.policy.axis import levels
from fpsc.policy.models import ModelSize
from fpsc.policy.schema import Sampling

LARGEST_GAP, SMALLEST_RATIO, LARGEST_KEEP, FEWEST_SEEDS = 0.02, 3.0, 0.25, 3
JUDGED = "joint"
SURVEY = "survey.json"
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"


def recorded(run: Run, folder: Path, scale: Scale | None = None) -> Record | None:
    """The record of a run, None where it has not been run.

    Raises:
        RecordError: it cannot be read, or was made with other settings.
    """
    path = folder / f"{run.name}.json"
    if not path.is_file():
        return None
    record, expected = Record.load(path), run.settings(scale or Scale())
    for name, value in expected.items():
        if record.settings.get(name) != value:
            raise RecordError(
                f"{path}: was made with another {name} than {run.name} has now: expected {value}, "
                f"found {record.settings.get(name)}; delete it and run it again"
            )
    return record


@dataclass(frozen=True)
class Spread:
    """The mean over seeds, and the standard deviation between them; None of one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        found = list(values)
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


class Experiment:
    """All records, and what follows from them."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self.records = records

    @classmethod
    def load(cls, folder: Path, scale: Scale | None = None) -> Experiment:
        """The records of a folder that belong together: of the variants as they are now.

        Raises:
            RecordError: one cannot be read, or was made with other settings.
        """
        plan = runs(scale or Scale())
        return cls({name: found for name in plan if (found := recorded(plan[name], folder, scale))})

    def of(self, variant: str) -> list[Record]:
        """The runs of a variant, by seed."""
        found = [record for record in self.records.values() if record.variant == variant]
        return sorted(found, key=lambda record: record.seed)

    def baseline(self, record: Record) -> Record | None:
        """The run whose dense loss a run's loss is compared with: of the same seed, and with as
        much training; for what is not trained, the weights that all start from."""
        name = CONTROL if record.training else DENSE
        return self.records.get(f"{name}-s{record.seed}")

    def gap(self, record: Record, level: int | None = None) -> float | None:
        """How much larger the loss as run is than the baseline's, as a fraction of that.

        level: at this noise level only.
        """
        baseline = self.baseline(record)
        if baseline is None:
            return None
        return _mean(record.losses.as_run, level) / _mean(baseline.losses.dense, level) - 1

    def to_start(self, record: Record) -> float | None:
        """The same to the weights that all start from."""
        start = self.records.get(f"{DENSE}-s{record.seed}")
        if start is None:
            return None
        return _mean(record.losses.as_run) / _mean(start.losses.dense) - 1

    def gaps(self, variant: str, level: int | None = None) -> Spread | None:
        found = (self.gap(record, level) for record in self.of(variant))
        return Spread.of(gap for gap in found if gap is not None)

    def to_starts(self, variant: str) -> Spread | None:
        found = (self.to_start(record) for record in self.of(variant))
        return Spread.of(gap for gap in found if gap is not None)

    def distances(self, variant: str) -> list[float]:
        """Of each run, the mean distance to the dense model's sets from other noise."""
        return [
            statistics.fmean(d.value for d in record.samples.distances.values())
            for record in self.of(variant)
            if record.samples.distances
        ]

    def floor(self) -> list[float]:
        """The distances between every two sets of the dense model: its seed-to-seed spread."""
        return [
            distance.value
            for record in self.of(DENSE)
            for other, distance in record.samples.distances.items()
            if record.seed < other
        ]


def _mean(table: tuple[tuple[float, ...], ...], level: int | None = None) -> float:
    return statistics.fmean(
        value for row in table for value in (row if level is None else row[level : level + 1])
    )


def keep_of(variant: Variant) -> float:
    """Mean keep over the steps of the demo's sampler, counted from the lists."""
    steps = levels(Sampling(scheduler="UniPCMultistepScheduler", steps=20, shift=FLOW_SHIFT))
    size = ModelSize(name="demo", layers=6, heads=3, head_dim=64, grid=TokenGrid(*GRID))
    found = account(Policy.from_dict(variant.run), size, steps).run_keep()
    assert found is not None
    return found


HEAD = (
    "variant", "keep", "runs", "loss gap", "to the start", "PSNR", "SSIM", "distance",
    "as prompted",
)  # fmt: skip


def variants_table(experiment: Experiment, *, ablation: bool) -> str:
    """A row for each variant; a dash where nothing has been run."""
    chosen = [v for v in VARIANTS.values() if v.ablation is ablation]
    if ablation:  # beside what they are compared with
        chosen = [VARIANTS["untrained"], VARIANTS["joint"], *chosen]
    return markdown(HEAD, [_row(experiment, variant) for variant in chosen])


SHORT = {
    "variant": "weights", "keep": "keep", "to the start": "validation loss, to dense",
    "distance": "distance to dense clips", "as prompted": "as prompted",
}  # fmt: skip
"""The columns that README shows, and their heads there."""


def short_table(experiment: Experiment) -> str:
    """What joint training wins, in as few rows and columns as say it."""
    chosen = (DENSE, CONTROL, VARIANTS[JUDGED].untrained, JUDGED)
    rows = (dict(zip(HEAD, _row(experiment, VARIANTS[name]), strict=True)) for name in chosen)
    return markdown(tuple(SHORT.values()), [tuple(row[c] for c in SHORT) for row in rows])


def marks_table(experiment: Experiment) -> str:
    """What was promised, and whether it holds."""
    rows = [
        (t.name, t.expected, t.found, "yes" if t.met else "**no**") for t in targets(experiment)
    ]
    return markdown(("mark", "expected", "found", "met"), rows)


def _row(experiment: Experiment, variant: Variant) -> tuple[str, ...]:
    records = experiment.of(variant.name)
    reference = variant.name == DENSE
    return (
        variant.title,
        f"{keep_of(variant):.2f}",
        str(len(records)) if records else NONE,
        NONE if reference else _percent(experiment.gaps(variant.name)),
        NONE if reference else _percent(experiment.to_starts(variant.name)),
        _spread(_over(records, lambda r: _finite(r.samples.psnr)), "{:.1f} dB"),
        _spread(_over(records, lambda r: r.samples.ssim), "{:.3f}"),
        _spread(Spread.of(experiment.distances(variant.name)), "{:.4f}"),
        _spread(_over(records, lambda r: r.samples.accuracy.values()), "{:.1%}"),
    )


def _over(records: list[Record], values: Callable[[Record], Iterable[float]]) -> Spread | None:
    """The mean of each run's values, over the runs."""
    each = [list(values(record)) for record in records]
    return Spread.of(statistics.fmean(found) for found in each if found)


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def levels_table(experiment: Experiment) -> str:
    """The loss gap at each noise level, of every variant that is not dense."""
    noise = next((record.losses.noise for record in experiment.records.values()), ())
    chosen = [v for v in VARIANTS.values() if v.name != DENSE]
    rows = [
        (v.title, *(_percent(experiment.gaps(v.name, level)) for level in range(len(noise))))
        for v in chosen
    ]
    return markdown(("variant", *(f"noise {level:g}" for level in noise)), rows)


def floor_table(experiment: Experiment) -> str:
    """The dense model against itself."""
    floor, head = experiment.floor(), ("sets of the dense model", "distance between two of them")
    if not floor:
        return markdown(head, [(NONE, NONE)])
    words = f"{statistics.fmean(floor):.4f} ({min(floor):.4f} to {max(floor):.4f})"
    return markdown(head, [(str(len(experiment.of(DENSE))), words)])


GAPS, CLIPS = "joint-gaps.png", "joint-clips.png"
"""The pictures of docs/joint.md, in docs/pictures."""


def drawable(experiment: Experiment) -> bool:
    """Whether there is enough for a picture of the gaps."""
    return experiment.gaps("untrained") is not None


def pictures_lines(experiment: Experiment) -> str:
    """The pictures that have been drawn."""
    lines = {
        GAPS: "The loss gap of each variant, and of the paper's order by noise level",
        CLIPS: "A clip of each variant from the same noise",
    }
    there = [name for name in lines if (PICTURES / name).is_file()] if drawable(experiment) else []
    return "\n".join(f"![{lines[name]}](pictures/{name})\n" for name in there)


PARTS: dict[str, Callable[[Path], str]] = {
    "variants": lambda folder: variants_table(Experiment.load(folder), ablation=False),
    "ablations": lambda folder: variants_table(Experiment.load(folder), ablation=True),
    "levels": lambda folder: levels_table(Experiment.load(folder)),
    "floor": lambda folder: floor_table(Experiment.load(folder)),
    "short": lambda folder: short_table(Experiment.load(folder)),
    "marks": lambda folder: marks_table(Experiment.load(folder)),
    "pictures": lambda folder: pictures_lines(Experiment.load(folder)),
    "survey": lambda folder: survey.table(folder / SURVEY),
}
"""The tables of docs/joint.md, from a folder of records, by their name behind the folder's."""


def _percent(spread: Spread | None) -> str:
    if spread is None:
        return NONE
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.1f}"
    return f"{100 * spread.mean:+.1f}{deviation} %"


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return NONE
    if spread.deviation is None:
        return form.format(spread.mean)
    deviation = form.format(spread.deviation).removesuffix(" dB")
    unit = " dB" if form.endswith(" dB") else ""
    return f"{form.removesuffix(' dB').format(spread.mean)} ± {deviation}{unit}"


def targets(experiment: Experiment) -> Iterator[Target]:
    """What joint training was promised to reach, and whether it does."""
    variant = VARIANTS[JUDGED]
    seeds = len(experiment.of(JUDGED))
    yield Target("seeds", f"{FEWEST_SEEDS} or more", str(seeds), seeds >= FEWEST_SEEDS)

    modes = variant.run["modes"].values()
    keeps = [mode["keep"] for mode in modes]
    met = max(keeps) <= LARGEST_KEEP and all(mode["dtype"] == "fp8" for mode in modes)
    found = f"keep {min(keeps):g} to {max(keeps):g}, {', '.join({m['dtype'] for m in modes})}"
    yield Target("policy", f"keep {LARGEST_KEEP} or less, fp8", found, met)

    untrained = experiment.to_starts(variant.untrained)
    for dense, joint in (
        ("the dense weights", experiment.to_starts(JUDGED)),
        ("dense trained on alike", experiment.gaps(JUDGED)),
    ):
        name, expected = f"loss gap to {dense}, jointly tuned", f"at most {LARGEST_GAP:.0%}"
        if joint is None:
            yield Target(name, expected, "not run", False)
        else:
            yield Target(name, expected, _percent(joint), joint.mean <= LARGEST_GAP)
        name, expected = f"the same, untrained to tuned, {dense}", f"{SMALLEST_RATIO:g}x or more"
        if joint is None or untrained is None:
            yield Target(name, expected, "not run", False)
        else:
            ratio = untrained.mean / joint.mean if joint.mean > 0 else math.inf
            found = f"{_percent(untrained)} to {_percent(joint)}"
            yield Target(name, expected, f"{ratio:.1f}x: {found}", ratio >= SMALLEST_RATIO)

    distances, floor = experiment.distances(JUDGED), experiment.floor()
    name = "distance to the dense model's clips"
    if not distances or not floor:
        yield Target(name, "within its own from seed to seed", "not run", False)
    else:
        mean = statistics.fmean(distances)
        expected = f"at most {max(floor):.4f}, the largest between two of its sets"
        yield Target(name, expected, f"{mean:.4f}", mean <= max(floor))


def judge(experiment: Experiment, *, as_json: bool = False) -> bool:
    """Print the marks; whether all are met."""
    found = list(targets(experiment))
    if as_json:
        print(json.dumps({"marks": [asdict(target) for target in found]}, indent=1))
    else:
        for target in found:
            verdict = "met" if target.met else "MISSED"
            print(f"{verdict}: {target.name}: expected {target.expected}, found {target.found}")
    return all(target.met for target in found)
