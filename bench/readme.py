"""The tables of README.md and docs/ that quote measurements, written from the committed JSON.

    python bench/readme.py           # rewrites every table between markers
    python bench/readme.py --check   # changes nothing; fails where a table is not that of its JSON

A table stands between two markers, the first of which names the JSON, relative to the root:

    <!-- table: bench/results/attention.json -->
    <!-- end of table -->

The JSON is a record of `fpsc bench`. What other scripts here wrote has several tables, named behind
a #:

    <!-- table: bench/results/joint#variants -->
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fpsc.bench.markdown import table  # noqa: E402
from fpsc.bench.record import RecordError, Run  # noqa: E402
from fpsc.files import replacing  # noqa: E402

MARKED = re.compile(
    r"^(<!-- table: (\S+) -->\n)(.*?)^(<!-- end of table -->)$", re.DOTALL | re.MULTILINE
)
MARKER = re.compile(r"^<!-- (table:|end of table)", re.MULTILINE)  # indented, it is an example


def table_of(name: str, root: Path) -> str:
    """The table of a JSON file; `name` is relative to the root.

    Raises:
        SystemExit: there is no such file, or it is none that has a table.
    """
    place, has_parts, part = name.partition("#")
    if has_parts:
        return part_of(name, root / place, part)
    try:
        return table(Run.load(root / name))
    except RecordError as error:
        sys.exit(f"{name}: expected a record of `fpsc bench`: {error}")


def part_of(name: str, place: Path, part: str) -> str:
    """One of several tables: of a folder of records of bench/joint.py, or of a file of another
    script.

    Raises:
        SystemExit: there is no such table, or a record cannot be read.
    """
    from bench import gradients, kernel_tables, l2, tune  # they import torch
    from bench.tuning import record, tables

    of_files = {"tune": tune, "gradients": gradients, "sass": kernel_tables, "l2": l2}
    parts = of_files[place.stem].PARTS if place.stem in of_files else tables.PARTS
    if part not in parts:
        sys.exit(f"{name}: expected one of {', '.join(parts)} behind the #, found {part!r}")
    try:
        return parts[part](place)
    except (record.RecordError, OSError, ValueError) as error:
        sys.exit(f"{name}: {error}")


def written(text: str, root: Path = ROOT, page: str = "the page") -> str:
    """A page with its tables as the JSON says.

    Raises:
        SystemExit: a marker has no partner, or its file no table.
    """
    if len(MARKER.findall(text)) != 2 * len(MARKED.findall(text)):
        sys.exit(
            f"{page}: a marker of a table has no partner: <!-- table: FILE --> and, after it, "
            "<!-- end of table -->"
        )
    return MARKED.sub(lambda m: f"{m[1]}{table_of(m[2], root)}{m[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where it would")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    arguments = parser.parse_args()
    stale = []
    for path in (arguments.root / "README.md", *sorted((arguments.root / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(arguments.root))
        new = written(text, arguments.root, name)
        if new == text:
            continue
        stale.append(name)
        if not arguments.check:
            with replacing(path) as beside:
                beside.write_text(new, encoding="utf-8")
            print(f"written: {name}")
    if arguments.check and stale:
        sys.exit(f"not as the JSON says: {', '.join(stale)}; run python bench/readme.py")


if __name__ == "__main__":
    main()
