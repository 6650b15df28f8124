"""Reading, finding, editing and writing policies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fpsc.grid import plan_tile
from fpsc.policy import Policy, PolicyError, find, presets

WAN = """\
# yaml-language-server: $schema=./fpsc-policy-1.json
# A comment at the top.
fpsc: 1
name: wan2.1-t2v-14b-720p
for:                                  # what it was tuned on
  model: Wan-AI/Wan2.1-T2V-14B-Diffusers
  grid: [21, 45, 80]
  weights: base                       # base | jointly-tuned
tile: auto                            # or [t, y, x]
modes:
  # Three of them.
  dense:  {keep: 1.0, dtype: bf16}
  gentle: {pattern: near, keep: 0.50, dtype: fp8}   # half
  fast:   {pattern: window, window: [3, 3, 11], dtype: fp8, scales: {qk: tile, v: channel}}
schedule:                             # from noise to clean
  - {noise: 1.00..0.90, use: dense}   # composition
  - {noise: 0.90..0.40, use: gentle}
  - {noise: 0.40..0.00, use: fast}
except:                               # later lines win
  - {layers: [0, 39], use: dense}
  - {layers: 12..18, heads: [3, 7], noise: 0.90..0.40, use: fast}
limits: {min_tokens: 4096, unsupported: dense}
measured: {}                          # written by tools
# A comment at the end.
"""


def comments(text: str) -> list[str]:
    return [line[line.index("#") :] for line in text.splitlines() if "#" in line]


def test_the_policy_of_the_design_is_read() -> None:
    policy = Policy.load(WAN)
    assert policy.name == "wan2.1-t2v-14b-720p"
    assert policy.tuned_on.grid == (21, 45, 80)
    assert list(policy.modes) == ["dense", "gentle", "fast"]
    assert policy.modes["fast"].window == (3, 3, 11)
    assert policy.modes["gentle"].keep == 0.5
    assert [str(p.noise) for p in policy.schedule] == ["1.00..0.90", "0.90..0.40", "0.40..0.00"]
    assert policy.rules[0].layers == ((0, 0), (39, 39))
    assert policy.rules[1].layers == ((12, 18),)
    assert policy.limits.min_tokens == 4096
    assert policy.tile_for((21, 45, 80)) == plan_tile((21, 45, 80))


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_saving_what_was_loaded_changes_no_byte(tmp_path: Path, newline: str) -> None:
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_bytes(WAN.replace("\n", newline).encode())
    Policy.load(source).save(target)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.yaml", "b.yaml"]


def test_an_edit_keeps_every_comment_and_all_else(tmp_path: Path) -> None:
    before = Policy.load(WAN)
    after = before.with_values(
        {
            "modes.gentle.keep": 0.25,
            "schedule.2.use": "dense",
            "measured": {"device": "H200", "speedup": {"attention": 3.1}},
        }
    )
    assert (before.modes["gentle"].keep, after.modes["gentle"].keep) == (0.5, 0.25)
    assert after.schedule[2].use == "dense"
    after.save(tmp_path / "wan.yaml")
    text = (tmp_path / "wan.yaml").read_text()
    assert comments(text) == comments(WAN)
    again = Policy.load(tmp_path / "wan.yaml")
    assert again.spec == after.spec
    assert again.spec.measured == {"device": "H200", "speedup": {"attention": 3.1}}
    changed = {"modes", "schedule", "measured"}
    assert again.spec.model_dump(exclude=changed) == before.spec.model_dump(exclude=changed)


def test_a_rule_stays_on_its_line() -> None:
    text = Policy.load(WAN).with_values({"name": "other"}).document.text
    assert "  - {layers: 12..18, heads: [3, 7], noise: 0.90..0.40, use: fast}\n" in text
    assert "name: other\n" in text


def test_an_edit_that_breaks_the_policy_is_refused_with_its_place() -> None:
    policy = Policy.load(WAN)
    with pytest.raises(
        PolicyError, match=r":13:\d+: modes\.gentle\.keep: expected a number above 0"
    ):
        policy.with_values({"modes.gentle.keep": 7})
    with pytest.raises(KeyError, match=r"modes\.none\.keep: no such place in <policy>"):
        policy.with_values({"modes.none.keep": 0.5})
    with pytest.raises(KeyError, match=r"schedule\.9: no such place"):
        policy.with_values({"schedule.9": {}})


def test_a_policy_from_python_is_written_as_people_write_it(tmp_path: Path) -> None:
    value = {
        "fpsc": 1,
        "name": "mine",
        "for": {"grid": [3, 4, 5]},
        "modes": {"dense": {"keep": 1.0}, "near": {"pattern": "near", "keep": 0.5}},
        "schedule": [
            {"noise": "1.00..0.50", "use": "dense"},
            {"noise": "0.50..0.00", "use": "near"},
        ],
        "except": [{"layers": "0..3", "use": "dense"}],
    }
    policy = Policy.from_dict(value)
    policy.save(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    assert "  near: {pattern: near, keep: 0.5}\n" in text
    assert "  - {noise: 0.50..0.00, use: near}\n" in text
    assert Policy.load(tmp_path / "mine.yaml").spec == policy.spec


def test_saving_replaces_a_file_in_one_step(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "p.yaml"
    target.write_text("old")

    def fail(self, other):
        raise OSError("disk")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        Policy.load(WAN).save(target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["p.yaml"]


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_and_carry_their_name(name: str) -> None:
    policy = find(name)
    assert policy.name == name
    if policy.tuned_on.weights != "jointly-tuned":
        first = policy.modes[policy.schedule[0].use]
        assert first.keep == 1, "untrained weights need early noise dense"
        assert first.dtype == "bf16"
    assert comments(policy.with_values({"name": name}).document.text) == comments(
        policy.document.text
    )


def test_the_dense_preset_is_the_identity() -> None:
    policy = find("dense")
    assert [(m.pattern, m.keep, m.dtype) for m in policy.modes.values()] == [(None, 1.0, "bf16")]
    assert policy.limits.min_tokens == 0
    assert policy.rules == []


def test_the_generic_preset() -> None:
    assert find("generic").limits.min_tokens == 4096
    assert "not measured" in find("generic").document.text


def test_find_takes_paths_text_and_policies(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    path.write_text(WAN.replace("name: wan2.1-t2v-14b-720p\n", ""))
    assert find(path).name == "local"
    assert find(str(path)).source == str(path)
    assert find(WAN).name == "wan2.1-t2v-14b-720p"
    policy = find("dense")
    assert find(policy) is policy


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + WAN.encode())
    assert find(tmp_path / "bom.yaml").name == "wan2.1-t2v-14b-720p"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gneric",
            r'^gneric: no such policy, neither a file nor one of .*; did you mean "generic"\?$',
        ),
        ("nowhere/wan.yaml", r"^nowhere/wan\.yaml: no such policy, neither a file nor one of "),
        ("", r'^"": no such policy'),
        ("bad\x00name", r"no such policy"),
    ],
    ids=["misspelt", "missing", "empty", "nul"],
)
def test_what_cannot_be_found(name: str, expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        find(name)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.yaml: cannot be read: No such file"):
        Policy.load(tmp_path / "none.yaml")
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        Policy.load(tmp_path)


def test_mismatches_name_the_field() -> None:
    policy = Policy.load(WAN)
    model = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert policy.mismatches(model=model, grid=(21, 45, 80), weights="base") == []
    assert policy.mismatches() == []
    assert policy.mismatches(model="x", grid=[13, 30, 52]) == [
        f"model: wan2.1-t2v-14b-720p was tuned on {model}, this is x",
        "grid: wan2.1-t2v-14b-720p was tuned on [21, 45, 80], this is [13, 30, 52]",
    ]
    assert find("generic").mismatches(model="x", grid=(1, 2, 3)) == []


def test_the_page_for_authors_is_true(checkout: Path) -> None:
    page = (checkout / "docs" / "policy.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert Policy.load(example).spec == Policy.load(WAN).spec
    broken = example.replace("pattern: near", "pattern: naer")
    with pytest.raises(PolicyError) as caught:
        Policy.load(broken)
    message = str(caught.value).partition("modes.gentle.pattern")[2]
    assert message in " ".join(page.split())
    for name in presets():
        assert f"`{name.removesuffix('-tuned')}`" in page
