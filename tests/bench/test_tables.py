"""Tables of documents are those of the committed JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fpsc.bench.markdown import markdown, table
from fpsc.bench.record import Fit, Point, Role, Split
from fpsc.cli import app
from tests.bench.command import python
from tests.bench.records import case, problem, result, run

MARKED = "before\n<!-- table: run.json -->\n{}<!-- end of table -->\nafter\n"


def test_committed_tables_are_those_of_the_committed_json(checkout: Path) -> None:
    done = python(checkout, "bench/readme.py", "--check")
    assert done.returncode == 0, done.stderr


def test_a_row_for_each_result_of_fpsattn() -> None:
    found = run([case("a"), case("b", slower=5.0, problem=problem(reduced=()))])
    lines = table(found).splitlines()
    assert lines[0].startswith("| case | contender |") and len(lines) == 4
    assert lines[2] == (
        "| a (reduced) | fpsattn keep 0.25 | 250 ms | 4.00× of Inductor | 6.00× | 2.0e-02 |"
    )
    assert "| b | fpsattn keep 0.25 | 1.25 s | 0.80× of Inductor | 1.20× |" in lines[3]


def test_where_the_time_goes_and_how_cost_grows_stand_below() -> None:
    split = Split(attention=0.3, linear=0.15, rest=0.05)
    fast = result("fpsattn keep 0.25", [0.25] * 5, Role.fpsattn, split=split)
    points = tuple(Point(x=x, seconds=x / 10, case="a") for x in (1.0, 2.0, 4.0))
    fit = Fit(
        axis="tokens",
        contender="fpsattn",
        points=points,
        exponent=1.5,
        exponent_range=(1.4, 1.6),
        factor=0.1,
        overhead=0.002,
        r2=1.0,
    )
    found = run([case("a", results=[fast])]).model_copy(update={"fits": (fit,)})
    speeds, splits, fits = table(found).split("\n\n")
    assert speeds.startswith("| case |")
    assert splits.splitlines()[2] == (
        "| fpsattn keep 0.25 | 300 ms, 60% | 150 ms, 30% | 50.0 ms, 10% | 2.50× |"
    )
    assert fits.splitlines()[2] == "| tokens | fpsattn | 1.50 | 1.40 to 1.60 | 2.00 ms |"


def test_a_bar_in_a_name_is_no_column() -> None:
    assert markdown(("a",), [("x|y",)]).splitlines()[-1] == "| x\\|y |"


def root_with(tmp_path: Path, page: str) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(page, encoding="utf-8")
    (tmp_path / "README.md").write_text("nothing\n", encoding="utf-8")
    run([case("a")]).save(tmp_path / "run.json")
    return tmp_path


def test_tables_are_checked_and_written(checkout: Path, tmp_path: Path) -> None:
    root = root_with(tmp_path, MARKED.format("| old |\n"))
    page = root / "docs" / "page.md"
    stale = python(checkout, "bench/readme.py", "--root", root, "--check")
    assert stale.returncode == 1 and "docs/page.md" in stale.stderr
    assert "| old |" in page.read_text(encoding="utf-8")
    assert python(checkout, "bench/readme.py", "--root", root).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert text == MARKED.format(table(run([case("a")])))
    assert (root / "README.md").read_text() == "nothing\n"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table: run.json -->\n", "no partner"),
        ("<!-- end of table -->\n", "no partner"),
        ("<!-- table: run.json -->\n" * 2 + "<!-- end of table -->\n", "no partner"),
        ("<!-- table: no.json -->\n<!-- end of table -->\n", "no.json"),
    ],
)
def test_a_marker_that_cannot_be_followed_is_named(
    page: str, message: str, checkout: Path, tmp_path: Path
) -> None:
    done = python(checkout, "bench/readme.py", "--root", root_with(tmp_path, page))
    assert done.returncode == 1 and message in done.stderr
    assert (tmp_path / "docs" / "page.md").read_text(encoding="utf-8") == page


def test_an_indented_marker_is_an_example(checkout: Path, tmp_path: Path) -> None:
    page = "    <!-- table: bench/results/NAME.json -->\n    <!-- end of table -->\n"
    done = python(checkout, "bench/readme.py", "--root", root_with(tmp_path, page), "--check")
    assert done.returncode == 0, done.stderr


def test_the_command_prints_the_same_table(tmp_path: Path) -> None:
    record = run([case("a")])
    record.save(tmp_path / "a.json")
    done = CliRunner().invoke(app, ["bench", "table", str(tmp_path / "a.json")])
    assert done.exit_code == 0 and done.stdout == table(record)
    done = CliRunner().invoke(app, ["bench", "table", str(tmp_path / "a.json"), "--json"])
    assert json.loads(done.stdout)["markdown"] == table(record)
    done = CliRunner().invoke(app, ["bench", "table", str(tmp_path / "none.json")])
    assert done.exit_code == 2 and "none.json" in done.stderr
