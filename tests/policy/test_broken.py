"""A gallery of broken policies: each with its line, its column and what its author is told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from fpsc.policy import Policy, PolicyError
from fpsc.policy.document import MAX_BYTES, parse

GOOD = """\
fpsc: 1
name: t
for: {model: m, grid: [21, 45, 80], weights: base}
tile: auto
modes:
  dense:  {keep: 1.0, dtype: bf16}
  gentle: {pattern: near, keep: 0.50, dtype: fp8}
  fast:   {pattern: window, window: [3, 3, 1], dtype: fp8, scales: {qk: tile, v: channel}}
schedule:
  - {noise: 1.00..0.90, use: dense}
  - {noise: 0.90..0.40, use: gentle}
  - {noise: 0.40..0.00, use: fast}
except:
  - {layers: [0, 39], use: dense}
  - {layers: 12..18, heads: [3, 7], noise: 0.90..0.40, use: fast}
limits: {min_tokens: 4096, unsupported: dense}
measured: {}
"""


def gallery() -> list[tuple[str, str, list[str]]]:
    """(old, new, lines of the message) of every paragraph of broken.txt."""
    text = (Path(__file__).parent / "broken.txt").read_text(encoding="utf-8")
    cases = []
    for paragraph in text.split("\n\n")[1:]:
        old, new, *lines = paragraph.strip("\n").split("\n")
        assert (old[0], new[0]) == ("-", "+")
        old, new = (line[2:].encode().decode("unicode_escape") for line in (old, new))
        cases.append((old, new, [line[2:] for line in lines]))
    return cases


def message(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        Policy.load(text)
    return str(caught.value).replace("<policy>:", "").split("\n")


def test_the_gallery_starts_from_a_good_policy() -> None:
    assert Policy.load(GOOD).name == "t"
    assert len(gallery()) >= 90


@pytest.mark.parametrize(("old", "new", "expected"), gallery())
def test_a_broken_policy_is_explained(old: str, new: str, expected: list[str]) -> None:
    assert old in GOOD
    assert message(GOOD.replace(old, new, 1)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n", ['1:1: expected a mapping that starts with "fpsc: 1", found nothing']),
        ("- 1\n", ['1:1: expected a mapping that starts with "fpsc: 1", found [1]']),
        ("policy\n", ['1:1: expected a mapping that starts with "fpsc: 1", found "policy"']),
        (
            "fpsc: 1\n",
            [
                '1:1: "modes" is missing: expected a mapping of 1 to 32 modes, for example '
                "dense: {keep: 1.0}",
                '1:1: "schedule" is missing: expected a list of phases like '
                "{noise: 1.00..0.90, use: dense}",
            ],
        ),
        ("x" * MAX_BYTES + "\n", [" larger than 256 KiB; a policy is a few KiB of rules"]),
        ("keep: " + "1" * 5000 + "\n", [" not YAML: Exceeds the limit (4300 digits) for integer"]),
    ],
    ids=["empty", "list", "word", "no modes", "too large", "endless number"],
)
def test_what_is_hardly_a_policy(text: str, expected: list[str]) -> None:
    found = message(text)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"fpsc: 1\nname: caf\xe9\n", "p.yaml:2:10: not UTF-8: byte 0xe9; save the file as UTF-8"),
        ("fpsc: 1\n".encode("utf-16"), "p.yaml:1:1: not UTF-8: byte 0xff; save the file as UTF-8"),
    ],
    ids=["latin-1", "utf-16"],
)
def test_other_encodings(data: bytes, expected: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(data, "p.yaml")
    assert str(caught.value) == expected


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert message("\n".join(lines) + "\n") == [
        "1:5: anchors are not used here; write the value out"
    ]


def test_deep_nesting_is_refused_before_it_recurses() -> None:
    assert message("measured: " + "[" * 50_000 + "\n") == ["1:26: nested deeper than 16 levels"]


def test_too_many_modes_and_rows() -> None:
    modes = "".join(f"  m{i}: {{keep: 1.0}}\n" for i in range(33))
    phase = "schedule:\n  - {noise: 1.00..0.00, use: m0}\n"
    (found,) = message(f"fpsc: 1\nmodes:\n{modes}{phase}")
    assert found.startswith("3:3: modes: expected a mapping of 1 to 32 modes")

    levels = [1 - i / 65 for i in range(65)] + [0]
    phases = "".join(f"  - {{noise: {a:.4f}..{b:.4f}, use: m}}\n" for a, b in pairwise(levels))
    assert message(f"fpsc: 1\nmodes:\n  m: {{keep: 1.0}}\nschedule:\n{phases}") == [
        "5:3: schedule: the ranges of schedule and except cut noise in 65 rows; a table has 64 at "
        "most, so let rules share their edges"
    ]


def test_a_long_list_of_problems_is_cut() -> None:
    rules = "".join("  - {layers: 0, use: nothing}\n" for _ in range(15))
    head = "fpsc: 1\nmodes:\n  m: {keep: 1.0}\nschedule:\n  - {noise: 1..0, use: m}\nexcept:\n"
    found = message(head + rules)
    assert len(found) == 11
    assert found[-1] == " and 5 more"


def test_an_error_carries_its_place_as_values() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.load(GOOD.replace("keep: 0.50", "keep: 5"))
    error = caught.value
    assert (error.file, error.line, error.column) == ("<policy>", 7, 33)
    assert len(error.problems) == 1
    assert isinstance(error, ValueError)


def test_values_from_python_have_a_path_and_no_line() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(
            {"fpsc": 1, "modes": {"m": {"keep": 2}}, "schedule": [{"noise": "1..0", "use": "m"}]}
        )
    assert str(caught.value).startswith("<policy>: modes.m.keep: expected a number above 0")
    assert caught.value.line is None
