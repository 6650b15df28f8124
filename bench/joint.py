"""Joint fine-tuning on the demo's model: what training in FP8 and sparsity wins, and which part.

    python bench/joint.py --list                   # every run, and whether it is done
    python bench/joint.py --run joint-s0 sparse-s0
    python bench/joint.py --all                    # whatever is missing, some minutes each
    python bench/joint.py --survey                 # what many policies cost without training
    python bench/joint.py --table                  # tables and pictures of docs/joint.md
    python bench/joint.py --check                  # judges what is there, and runs nothing

Each run is a variant with a seed, in a process of its own, and writes one file to
bench/results/joint/ when it is whole. A run that was stopped or killed goes on where it was: its
checkpoints, weights and clips are in --work, which git ignores. So the experiment can be spread
over days, or over machines that share both folders. Exit status of --check: 0 where every mark is
met, 1 where one is missed or was not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from bench.tuning.record import RecordError, SettingsError  # noqa: E402
from bench.tuning.variants import Run, Scale, runs  # noqa: E402
from fpsc.errors import UserError  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "joint"
WORK = ROOT / "runs" / "joint"


def carry_out(run: Run, scale: Scale, work: Path, results: Path) -> None:
    """Do a run in this process, with a bar for each of its parts."""
    from bench.tuning.carry_out import carry_out as whole

    with telling() as tell:
        whole(run, scale, work, tell).save(results / f"{run.name}.json")


def look_around(results: Path) -> None:
    """Measure what policies cost without training, in this process."""
    from bench.tuning.survey import survey
    from bench.tuning.tables import SURVEY

    with telling() as tell:
        survey(results / SURVEY, tell)


@contextmanager
def telling() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each part of what is going on."""
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(part: str, finished: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = progress.add_task(part, total=total)
            progress.update(tasks[part], completed=finished, total=total)

        yield tell


def apart(names: list[str], work: Path, results: Path) -> int:
    """Each run in a process of its own, with nothing compiled by the one before."""
    for name in names:
        command = [sys.executable, __file__, "--run", name]
        command += ["--work", str(work), "--results", str(results)]
        ended = subprocess.run(command)
        if ended.returncode:
            return ended.returncode
    return 0


def done(results: Path) -> Set[str]:
    """The runs that have their record."""
    from bench.tuning.tables import Experiment

    return Experiment.load(results).records.keys()


def listed(plan: dict[str, Run], results: Path, as_json: bool) -> None:
    finished = done(results)
    state = {name: name in finished for name in plan}
    if as_json:
        print(json.dumps({"runs": [{"name": n, "done": d} for n, d in state.items()]}, indent=1))
        return
    for name, whole in state.items():
        print(f"{'done' if whole else '-':5}{name:26}{plan[name].variant.title}")


def write_page(scale: Scale, work: Path, results: Path, page: Path) -> None:
    """The tables of the page, and the pictures for which there is enough."""
    from bench.readme import written
    from bench.tuning.pictures import draw
    from bench.tuning.tables import Experiment
    from fpsc.files import replacing

    found = draw(Experiment.load(results), scale, work, page.parent / "pictures")
    for name, drawn in found.items():
        print(f"{'written' if drawn else 'not enough to draw'}: docs/pictures/{name}")
    text = written(page.read_text(encoding="utf-8"), ROOT, page.name)
    with replacing(page) as beside:
        beside.write_text(text, encoding="utf-8")
    print(f"written: {page.relative_to(ROOT)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="every run, and whether it is done")
    what.add_argument("--run", nargs="+", metavar="NAME", help="these, also where they are done")
    what.add_argument("--all", action="store_true", help="every run that is not done")
    what.add_argument("--survey", action="store_true", help="loss of many policies, not trained")
    what.add_argument("--table", action="store_true", help="write docs/joint.md")
    what.add_argument("--check", action="store_true", help="judge what is there")
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints, weights and clips")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the records")
    parser.add_argument("--json", action="store_true", help="of --list and --check: one object")
    given = parser.parse_args(arguments)
    scale = Scale()
    plan = runs(scale)
    try:
        if given.list:
            listed(plan, given.results, given.json)
        elif given.survey:
            look_around(given.results)
        elif given.table:
            write_page(scale, given.work, given.results, ROOT / "docs" / "joint.md")
        elif given.check:
            from bench.tuning.tables import Experiment, judge

            return 0 if judge(Experiment.load(given.results), as_json=given.json) else 1
        elif given.all:
            finished = done(given.results)
            missing = [name for name in plan if name not in finished]
            return apart(missing, given.work, given.results)
        else:
            unknown = [name for name in given.run if name not in plan]
            if unknown:
                known = ", ".join(plan)
                parser.error(f"no run is called {', '.join(unknown)}; expected {known}")
            if len(given.run) > 1:
                return apart(given.run, given.work, given.results)
            carry_out(plan[given.run[0]], scale, given.work, given.results)
    except (RecordError, SettingsError, UserError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
