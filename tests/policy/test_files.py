"""What a policy takes from other files: bases, tables; and how it is written back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fpsc.policy import Policy, PolicyError, find, presets, resolve
from fpsc.policy import document as doc
from fpsc.policy.load import BESIDE
from fpsc.policy.tables import NO_CHOICE, write

BASE = """\
# The base.
fpsc: 1
name: base
modes:
  dense:  {keep: 1.0}              # all of it
  gentle: {pattern: near, keep: 0.50, dtype: fp8}
schedule:
  - {noise: 1.00..0.50, use: dense}    # early
  - {noise: 0.50..0.00, use: gentle}
measured: {speedup: 3}
"""


def put(folder: Path, **files: str) -> Path:
    """Write files, NAME=text for NAME.yaml; returns the path of `a.yaml`."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "a.yaml"


def refusal(path: Path) -> str:
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    return str(caught.value).replace(f"{path.parent}/", "")


# ---- $import


def test_a_base_is_changed_number_by_number(tmp_path: Path) -> None:
    text = "fpsc: 1\n$import: base.yaml\nmodes:\n  gentle: {keep: 0.25}\n"
    policy = Policy.load(put(tmp_path, base=BASE, a=text))
    assert (policy.modes["gentle"].pattern, policy.modes["gentle"].keep) == ("near", 0.25)
    assert [p.use for p in policy.schedule] == ["dense", "gentle"]
    assert (policy.name, policy.spec.measured) == ("a", {})
    assert policy.where(("schedule", 1)) == f"{tmp_path}/base.yaml:9 schedule[1]"
    assert policy.where(("modes", "gentle", "keep")).endswith("a.yaml:4 modes.gentle.keep")


def test_a_list_is_replaced_as_a_whole_and_a_built_in_policy_is_a_base() -> None:
    text = "fpsc: 1\n$import: generic\nschedule:\n  - {noise: 1.00..0.00, use: fast}\n"
    policy = Policy.load(text)
    assert [p.use for p in policy.schedule] == ["fast"]
    assert policy.modes == find("generic").modes


def test_a_mistake_is_shown_in_the_file_that_holds_it(tmp_path: Path) -> None:
    own = "fpsc: 1\n$import: base.yaml\nmodes:\n  gentle: {keep: 7}\n"
    message = refusal(put(tmp_path, base=BASE, a=own))
    assert message.startswith("a.yaml:4:18: modes.gentle.keep: expected a number above 0")
    message = refusal(put(tmp_path, base=BASE.replace("near", "naer"), a=own))
    assert "base.yaml:6:21: modes.gentle.pattern: expected a pattern" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../base.yaml", '"../base.yaml" leads out of the folder of the policy'),
        ("/etc/base.yaml", '"/etc/base.yaml" leads out of the folder of the policy'),
        ("sub/../../base.yaml", "leads out of the folder of the policy"),
        ("none.yaml", 'no file "none.yaml" in the folder of the policy'),
        ("link.yaml", '"link.yaml" is a link out of the folder of the policy'),
        ("gneric", 'no built-in policy "gneric"; did you mean "generic"?'),
        ("a.yaml", '"a.yaml" imports this policy in turn'),
        ("b.yaml", '"a.yaml" imports this policy in turn'),
        ("c.yaml", "a chain of more than 8 imports"),
        ("d.yaml", "no file"),
    ],
)
def test_what_cannot_be_imported(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    inner = tmp_path / "inner"
    chain = {f"c{i}": f"fpsc: 1\n$import: c{i + 1}.yaml\n" for i in range(9)}
    more = {"b": "fpsc: 1\n$import: a.yaml\n", "c": "fpsc: 1\n$import: c0.yaml\n"}
    path = put(inner, a=f"fpsc: 1\n$import: {name}\n", **chain, **more)
    (inner / "d.yaml").mkdir()
    (inner / "link.yaml").symlink_to(tmp_path / "base.yaml")
    message = refusal(path)
    assert expected in message
    assert message.split(": ")[0].endswith(":2:10")  # the name, in the file that imports


def test_an_edit_of_what_is_imported_is_written_where_it_is_imported(tmp_path: Path) -> None:
    path = put(tmp_path, base=BASE, a="# Mine.\nfpsc: 1\n$import: base.yaml\n")
    changes = {"modes.gentle.keep": 0.25, "schedule.0.use": "gentle"}
    Policy.load(path).with_values(changes).save(path)
    again = Policy.load(path)
    assert again.modes["gentle"].keep == 0.25
    assert [p.use for p in again.schedule] == ["gentle", "gentle"]
    assert path.read_text().startswith("# Mine.\nfpsc: 1\n$import: base.yaml\n")
    assert (tmp_path / "base.yaml").read_text() == BASE


def test_a_policy_beside_weights_stands_alone(tmp_path: Path) -> None:
    own = "fpsc: 1\n$import: base.yaml\nname: mine\nmodes:\n  gentle: {keep: 0.25}  # less\n"
    policy = Policy.load(put(tmp_path, base=BASE, a=own))
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="refers to files in its folder"):
        policy.save(tmp_path / "weights" / "a.yaml")
    saved = policy.save_beside(tmp_path / "weights")
    assert os.listdir(tmp_path / "weights") == [BESIDE]
    text = saved.read_text()
    assert "$import" not in text
    assert "# less" in text and "# early" in text
    assert Policy.load(saved).spec.model_dump(exclude={"import_"}) == policy.spec.model_dump(
        exclude={"import_"}
    )
    assert find(tmp_path / "weights").name == "mine"  # the folder stands for it


# ---- tables

EDGES, MODES = [1.0, 0.5, 0.25, 0.0], ["dense", "gentle"]


def tabled(folder: Path, cells: np.ndarray, extra: str = "", **changes: Any) -> Path:
    text = BASE + "table: t.safetensors\n" + extra
    given: dict[str, Any] = {"edges": EDGES, "modes": MODES, "cells": cells, **changes}
    write(folder / "t.safetensors", **given)
    return put(folder, a=text)


def test_choices_win_over_the_schedule_and_rules_over_choices(tmp_path: Path) -> None:
    cells = np.full((3, 2, 4), NO_CHOICE, np.uint8)
    cells[0, 0, 1], cells[2, 1, :] = 1, 0
    rule = "except:\n  - {layers: 1, heads: 3, use: gentle}\n"
    policy = Policy.load(tabled(tmp_path, cells, rule))
    assert policy.edges == [0.5, 0.25]
    table = resolve(policy, layers=2, heads=4, fp8=True)
    found = [
        [[table.describe(r, n, h).mode[0] for h in range(4)] for n in range(2)] for r in (0, 2)
    ]
    assert found == [[list("dgdd"), list("dddg")], [list("gggg"), list("dddg")]]
    assert table.describe(0, 0, 1).rule.endswith("a.yaml:11 table")
    assert table.describe(2, 1, 3).rule.endswith("a.yaml:13 except[0]")
    with pytest.raises(PolicyError, match=r"a\.yaml:11:8: table: t\.safetensors is for 2 layers"):
        resolve(policy, layers=3, heads=4, fp8=True)


@settings(max_examples=30)
@given(data=st.data())
def test_every_cell_is_the_tables_choice_or_the_schedules(data: st.DataObject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    layers, heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    n = 3 * layers * heads
    picks = data.draw(st.lists(st.sampled_from([0, 1, NO_CHOICE]), min_size=n, max_size=n))
    cells = np.array(picks, np.uint8).reshape(3, layers, heads)
    policy = Policy.load(tabled(folder, cells))
    table = resolve(policy, layers=layers, heads=heads, fp8=True)
    schedule = np.array([0, 1, 1])[:, None, None]
    expected = np.where(cells == NO_CHOICE, schedule, cells)
    assert (table.cells[:, :3].numpy().transpose(1, 0, 2) == expected).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cells": np.zeros((2, 2, 4))}, "expected choices of shape [3, layers, heads]"),
        ({"cells": np.zeros((3, 0, 4))}, "expected choices of shape [3, layers, heads]"),
        ({"cells": np.zeros((3, 8))}, "expected choices of uint8 [noise, layers, heads], found U8"),
        ({"cells": np.full((3, 2, 4), 2)}, "expected choices below 2"),
        ({"modes": ["dense", "gentel"]}, 'no mode "gentel" in the policy; did you mean "gentle"?'),
        ({"modes": [1]}, "expected metadata modes: a list in JSON, found '[1]'"),
        (
            {"edges": [0.9, 0.5, 0.2, 0]},
            "expected noise from 1 down to 0, found [0.9, 0.5, 0.2, 0]",
        ),
        ({"edges": [1, 0.5, 0.5, 0]}, "expected noise from 1 down to 0"),
        ({"edges": []}, "expected noise from 1 down to 0"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = tabled(tmp_path, **{"cells": np.zeros((3, 2, 4)), **changes})
    message = refusal(path)
    assert message.startswith("a.yaml:11:8: table: t.safetensors: ")
    assert expected in message


def test_a_rule_past_the_table_is_shown_at_the_rule(tmp_path: Path) -> None:
    rules = "except:\n  - {layers: [0, 2], heads: 0..4, use: dense}\n"
    assert refusal(tabled(tmp_path, np.zeros((3, 2, 4)), rules)).split("\n") == [
        "a.yaml:13:14: except[0].layers: layer 2 does not exist; t.safetensors has 2 layers (0..1)",
        "a.yaml:13:29: except[0].heads: head 4 does not exist; t.safetensors has 4 heads (0..3)",
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not a safetensors file"),
        (b"\x80\x04\x95not a pickle, please", "not a safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (None, "no such file in the folder of the policy"),
    ],
    ids=["empty", "pickle", "huge header", "missing"],
)
def test_what_is_no_table(tmp_path: Path, data: bytes | None, expected: str) -> None:
    if data is not None:
        (tmp_path / "t.safetensors").write_bytes(data)
    message = refusal(put(tmp_path, a=BASE + "table: t.safetensors\n"))
    assert message.startswith(f"a.yaml:11:8: table: t.safetensors: {expected}")


def test_other_tensors_are_no_table(tmp_path: Path) -> None:
    path = put(tmp_path, a=BASE + "table: t.safetensors\n")
    save_file({"choices": np.zeros((3, 2, 4), np.uint8)}, tmp_path / "t.safetensors")
    assert 'expected metadata format: "fpsc-table-1", found nothing' in refusal(path)
    metadata = {"format": "fpsc-table-1", "modes": json.dumps(MODES), "noise": json.dumps(EDGES)}
    for tensors, expected in (
        ({"choice": np.zeros((3, 2, 4), np.uint8)}, 'expected one tensor "choices", found choice'),
        ({"choices": np.zeros((3, 2, 4), np.int64)}, "found I64 [3, 2, 4]"),
    ):
        save_file(tensors, tmp_path / "t.safetensors", metadata)
        assert expected in refusal(path)


def test_a_table_goes_where_its_policy_goes(tmp_path: Path) -> None:
    policy = Policy.load(tabled(tmp_path, np.zeros((3, 2, 4))))
    (tmp_path / "weights").mkdir()
    again = Policy.load(policy.save_beside(tmp_path / "weights"))
    assert again.same_as(policy)
    assert sorted(os.listdir(tmp_path / "weights")) == [BESIDE, "t.safetensors"]
    assert not again.same_as(Policy.load(tabled(tmp_path, np.ones((3, 2, 4)))))


# ---- components


def test_a_component_has_its_own_part_and_the_rest_in_common(tmp_path: Path) -> None:
    parts = """\
components:
  transformer_2:
    schedule:
      - {noise: 1.00..0.00, use: gentle}
    except:
      - {layers: 9, use: dense}
"""
    policy = Policy.load(put(tmp_path, a=BASE + parts))
    part = policy.component("transformer_2")
    assert policy.components == ["transformer_2"]
    assert policy.component("transformer") is policy
    assert ([p.use for p in policy.schedule], [p.use for p in part.schedule]) == (
        ["dense", "gentle"],
        ["gentle"],
    )
    assert part.modes == policy.modes
    with pytest.raises(PolicyError, match=r"a\.yaml:16:18: .*transformer_2\.except\[0\]\.layers"):
        resolve(part, layers=2, heads=1, fp8=True)


# ---- written back


def test_only_lines_that_hold_a_change_are_other_bytes(tmp_path: Path) -> None:
    """Aligned by hand, as people do; the library would lay all of it out anew."""
    text = """\
fpsc:   1
name:   'mine'          # single quotes

modes:
    dense:   {keep:   1.0}          # four spaces
    gentle:  { pattern: near,   keep: 0.50 }    # spaces inside
    wide:
        pattern: window
        window:  [ 3, 3,  1 ]   # a box

schedule:
- {noise: 1.00..0.50,   use: dense}     # no indentation
-   noise: 0.50..0.00
    use:   gentle
# the end
"""
    path = put(tmp_path, a=text)
    Policy.load(path).with_values({"modes.gentle.keep": 0.25}).save(path)
    old, new = text.splitlines(), path.read_text().splitlines()
    assert [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b] == [5]
    assert "keep: 0.25" in new[5] and "# spaces inside" in new[5]
    Policy.load(path).with_values({"modes.gentle.keep": 0.25}).save(path)
    assert path.read_text().splitlines() == new
    measured = Policy.load(path).with_values({"measured": {"device": "H100", "speedup": 2.5}})
    assert [line for line in measured.document.text.splitlines() if line not in new] == [
        "measured: {device: H100, speedup: 2.5}"
    ]


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_keeps_every_byte_but_the_change(name: str) -> None:
    policy = find(name)
    before = policy.document.text.splitlines()
    after = policy.with_values({"name": "other"}).document.text.splitlines()
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [
        (f"name: {name}", "name: other")
    ]


@settings(max_examples=30)
@given(
    spaces=st.lists(st.integers(1, 4), min_size=12, max_size=12),
    keep=st.integers(1, 99),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_any_alignment_survives_an_edit(spaces: list[int], keep: int, newline: str) -> None:
    gap = [" " * n for n in spaces]
    text = newline.join(
        [
            f"fpsc:{gap[0]}1{gap[1]}# one",
            "modes:",
            f"  a:{gap[2]}{{keep:{gap[3]}1.0}}{gap[4]}# two",
            f"  b:{gap[5]}{{pattern:{gap[6]}near,{gap[7]}keep:{gap[8]}0.5}}",
            "schedule:",
            f"  -{gap[9]}{{noise: 1.00..0.00,{gap[10]}use: a}}{gap[11]}# three",
            "",
        ]
    )
    after = doc.edited(doc.parse(text.encode(), "p"), {"modes.b.keep": keep / 100})
    old, new = text.split(newline), after.text.split(newline)
    assert [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b] in ([3], [])
    assert after.value["modes"]["b"]["keep"] == keep / 100


def test_a_hundred_megabytes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as f:
        f.truncate(100 << 20)
    assert refusal(path) == "a.yaml: larger than 256 KiB; a policy is a few KiB of rules"
