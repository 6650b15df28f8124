"""Which configuration a kernel runs with: timed once, kept in a file. No GPU: its clock is fake."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fpsc.kernels.saved import padded_head_dim
from fpsc.kernels.select import HEAD_DIMS
from fpsc.kernels.triton import configs, interpreter, tune
from fpsc.kernels.triton.configs import BACKWARD, BLOCK, FORWARD, Config, candidates

DEVICE = torch.device("cuda", 0)
AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
KERNELS = (*FORWARD, *BACKWARD)


@dataclass
class FakeGPU:
    """Times that configurations take, and what is asked of it."""

    milliseconds: dict[str, float]
    broken: set[str]
    capturing: bool = False
    name: str = "NVIDIA Test"
    now: float = 0.0

    def __post_init__(self) -> None:
        self.ran: list[str] = []

    def run(self, config: Config) -> None:
        if config.name in self.broken:
            raise RuntimeError(f"out of resource: {config.name}")
        self.ran.append(config.name)
        self.now += self.milliseconds.get(config.name, 100.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGPU]:
    """A machine with a Hopper, as far as torch says, and an empty cache."""
    fake = FakeGPU({}, set())

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = fake.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    for name, value in {
        "Event": Event,
        "synchronize": lambda *_: None,
        "is_current_stream_capturing": lambda: fake.capturing,
        "get_device_name": lambda device: fake.name,
        "get_device_capability": lambda device: HOPPER,
        "get_device_properties": lambda device: type("P", (), {"multi_processor_count": 132})(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(interpreter, "ACTIVE", False)
    monkeypatch.setenv("FPSC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FPSC_AUTOTUNE", raising=False)
    forget()
    yield fake
    forget()


def forget() -> None:
    """As a new process."""
    tune._chosen.clear()
    for cached in (tune.capability, tune.multiprocessors, tune._identity):
        cached.cache_clear()


def choose(gpu: FakeGPU, kernel: str = "fp8", dp: int = 128, dtype=torch.bfloat16) -> Config:
    return tune.choose(kernel, DEVICE, dtype, dp, gpu.run)


OFFERED = candidates("fp8", HOPPER, 128)
FIRST, SECOND = OFFERED[:2]


@pytest.mark.parametrize("capability", [AMPERE, (8, 6), ADA, HOPPER, BLACKWELL, CONSUMER])
def test_candidates(capability):
    """A few for every kernel and head dim, all of which fit a tile, and the kernels' loops."""
    for dp in {padded_head_dim(d) for d in HEAD_DIMS}:
        for kernel in KERNELS:
            for permuted in (None, True, False):
                found = candidates(kernel, capability, dp, permuted=permuted)
                assert 1 <= len(found) <= 4 and len(set(found)) == len(found)
                assert not any(c.reorder and permuted for c in found)
                for c in found:
                    pairs = c.BN == 2 * BLOCK and kernel == "fp8" and c.specialise
                    assert BLOCK % c.BM == 0 and (BLOCK % c.BN == 0 or pairs)
                    assert c.warps in (4, 8)
                    assert c.BM >= 16 and c.BN >= 16, "what a product takes at least"
                    assert not c.specialise or (capability == HOPPER and c.warps == 4)
                    assert kernel in FORWARD or not (c.specialise or c.persistent)
    assert configs.permutes_v(capability) == (capability != HOPPER)


def test_gluon_is_one_more_candidate_on_hopper(gpu, monkeypatch):
    """The last one: where nothing may be timed, the first runs, which is Triton's."""
    for dp in (32, 64, 128, 256):
        gluon = candidates("fp8_gluon", HOPPER, dp)
        assert all(c.gluon for c in gluon) and bool(gluon) == (dp in configs.GLUON_HEAD_DIMS)
        assert candidates("fp8_hopper", HOPPER, dp) == candidates("fp8", HOPPER, dp) + gluon
        assert not any(c.gluon for c in candidates("fp8", HOPPER, dp))
    for capability in (ADA, BLACKWELL, CONSUMER):
        assert not any(c.gluon for c in candidates("fp8_hopper", capability, 128))
    assert not any(c.gluon for c in candidates("fp8_hopper", HOPPER, 128, permuted=True))
    (best, *_) = candidates("fp8_gluon", HOPPER, 128)
    gpu.milliseconds = {best.name: 1.0}
    monkeypatch.setenv("FPSC_AUTOTUNE", "0")
    assert choose(gpu, "fp8_hopper") == FIRST and not FIRST.gluon
    monkeypatch.delenv("FPSC_AUTOTUNE")
    assert choose(gpu, "fp8_hopper") == best
    assert not choose(gpu, "fp8").gluon, "by name it is Triton's"
    gpu.broken = {best.name}
    forget()
    tune.cache_file().unlink()
    assert not choose(gpu, "fp8_hopper").gluon


@pytest.mark.parametrize(("triton_is", "offered"), [((3, 6), False), ((3, 7), True)], ids=str)
def test_reordered_keys_are_never_the_default(gpu, monkeypatch, triton_is, offered):
    """Offered where Triton compiles them, and run only where they were measured to be faster."""
    monkeypatch.setattr(configs, "_triton_version", lambda: triton_is)
    for dp in configs.HOPPER_REORDERED:
        found = candidates("fp8", HOPPER, dp)
        assert [c.reorder for c in found] == [False] * 2 + [True, True] * offered
        assert any(c.BN > BLOCK for c in found) is offered
        assert not any(c.reorder for c in candidates("input", HOPPER, dp))
    if offered:
        gpu.milliseconds = {found[-1].name: 1.0}
        monkeypatch.setenv("FPSC_AUTOTUNE", "0")
        assert choose(gpu) == FIRST
        monkeypatch.delenv("FPSC_AUTOTUNE")
        assert choose(gpu) == found[-1]


def test_a_measurement_may_ask_for_one_candidate(gpu, monkeypatch):
    monkeypatch.setattr(tune, "ONLY", OFFERED[-1])
    assert choose(gpu) == OFFERED[-1] and gpu.ran == []
    monkeypatch.setattr(tune, "ONLY", Config(32, 32, 4, 1))
    assert choose(gpu) in OFFERED and gpu.ran, "it is none of them"


def test_names_tell_configurations_apart():
    every = {c for dp in (32, 128, 256) for k in KERNELS for c in candidates(k, HOPPER, dp)}
    assert len({c.name for c in every}) == len(every)


def test_specialised_where_v_is_not_permuted():
    assert all(c.specialise for c in candidates("fp8", HOPPER, 128, permuted=False))
    assert not any(c.specialise for c in candidates("fp8", HOPPER, 128, permuted=True))


def test_the_fastest_is_kept(gpu):
    gpu.milliseconds = {FIRST.name: 3.0, SECOND.name: 2.0}
    assert choose(gpu) == SECOND
    assert {gpu.ran.count(c.name) for c in OFFERED} == {1 + tune.ROUNDS}
    gpu.ran.clear()
    assert choose(gpu) == SECOND and gpu.ran == []  # from memory
    forget()
    gpu.milliseconds = {FIRST.name: 1.0}
    assert choose(gpu) == SECOND and gpu.ran == []  # from the file
    content = json.loads(tune.cache_file().read_text())
    (answer,) = content.values()
    assert answer["config"] == asdict(SECOND)
    assert [t["milliseconds"] for t in answer["timed"]] == [3.0, 2.0, *[100.0] * len(OFFERED[2:])]


def test_candidates_are_timed_in_turns(gpu):
    """So that a clock that changes meanwhile treats them alike."""
    choose(gpu)
    names = [c.name for c in OFFERED]
    assert gpu.ran == names * (1 + tune.ROUNDS)


def test_one_candidate_is_not_timed(gpu):
    (only,) = candidates("query_gradients", HOPPER, 256)
    assert choose(gpu, "query_gradients", 256) == only
    assert gpu.ran == [] and not tune.cache_file().exists()


def test_every_key_has_its_answer(gpu):
    gpu.milliseconds = {FIRST.name: 1.0}
    assert choose(gpu) == FIRST
    gpu.milliseconds = {SECOND.name: 1.0}
    assert choose(gpu, dtype=torch.float16) == SECOND
    assert choose(gpu, dp=64) == candidates("fp8", HOPPER, 64)[1]
    assert choose(gpu) == FIRST
    assert len(json.loads(tune.cache_file().read_text())) == 3


@pytest.mark.parametrize("change", ["device", "triton", "sources"])
def test_an_answer_is_of_its_device_triton_and_sources(gpu, change, monkeypatch, tmp_path):
    gpu.milliseconds = {SECOND.name: 1.0}
    assert choose(gpu) == SECOND
    gpu.milliseconds = {FIRST.name: 1.0}
    forget()
    if change == "device":
        gpu.name = "NVIDIA Other"
    elif change == "triton":
        monkeypatch.setattr(triton, "__version__", "3.99.0")
    else:
        (tmp_path / "kernel.py").write_text("# another one")
        monkeypatch.setattr(tune, "__file__", str(tmp_path / "tune.py"))
    assert choose(gpu) == FIRST
    assert len(json.loads(tune.cache_file().read_text())) == 2


def test_an_answer_that_is_no_longer_offered_is_found_again(gpu):
    choose(gpu)
    content = json.loads(tune.cache_file().read_text())
    for answer in content.values():
        answer["config"]["BM"] = 48
    tune.cache_file().write_text(json.dumps(content))
    forget()
    gpu.ran.clear()
    assert choose(gpu) in OFFERED and gpu.ran


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '"x"', '{"a": 1}', "\x00\xff", "KEY: 1", "KEY: {}"]
)
def test_a_corrupt_file_is_replaced(gpu, content):
    """Also where the answer itself is not what it should be."""
    gpu.milliseconds = {SECOND.name: 1.0}
    choose(gpu)
    (key,) = json.loads(tune.cache_file().read_text())
    if content.startswith("KEY: "):
        content = f"{{{json.dumps(key)}: {content[5:]}}}"
    tune.cache_file().write_text(content, encoding="latin-1")
    forget()
    assert choose(gpu) == SECOND
    assert json.loads(tune.cache_file().read_text())[key]["config"] == asdict(SECOND)


def test_a_folder_that_cannot_be_written(gpu, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FPSC_CACHE_DIR", str(tmp_path / "file"))
    gpu.milliseconds = {SECOND.name: 1.0}
    with caplog.at_level(logging.WARNING, "fpsc"):
        assert choose(gpu) == SECOND
    assert "cannot write" in caplog.text and "timed again next time" in caplog.text
    gpu.ran.clear()
    assert choose(gpu) == SECOND and gpu.ran == []


def test_a_write_that_fails_leaves_the_file_and_no_other(gpu, monkeypatch):
    """As where the disk is full half way."""
    choose(gpu)
    before = tune.cache_file().read_text()

    def full(content: Any, file: Any, **_: Any) -> None:
        file.write('{"half')
        raise OSError("no space left on device")

    monkeypatch.setattr(tune.json, "dump", full)
    choose(gpu, dp=64)
    assert tune.cache_file().read_text() == before
    assert list(tune.cache_file().parent.iterdir()) == [tune.cache_file()]


@pytest.mark.parametrize("why", ["capturing", "told not to"])
def test_nothing_is_timed(gpu, why, monkeypatch):
    gpu.milliseconds = {SECOND.name: 1.0}
    if why == "capturing":
        gpu.capturing = True
    else:
        monkeypatch.setenv("FPSC_AUTOTUNE", "0")
    assert choose(gpu) == FIRST
    assert gpu.ran == [] and not tune.cache_file().exists()
    gpu.capturing = False
    monkeypatch.delenv("FPSC_AUTOTUNE", raising=False)
    assert choose(gpu) == SECOND, "the default of then was kept"
    gpu.capturing = True
    forget()
    assert choose(gpu) == SECOND, "what the file says holds at all times"


def test_what_cannot_be_launched_is_left_out(gpu, caplog):
    gpu.milliseconds = {FIRST.name: 1.0, SECOND.name: 2.0}
    gpu.broken = {FIRST.name}
    with caplog.at_level(logging.INFO, "fpsc"):
        assert choose(gpu) == SECOND
    assert "left out" in caplog.text and f"out of resource: {FIRST.name}" in caplog.text


def test_nothing_can_be_launched(gpu):
    gpu.broken = {c.name for c in OFFERED}
    with pytest.raises(RuntimeError, match=r"no configuration of fp8 .* can be launched") as caught:
        choose(gpu)
    assert all(f"out of resource: {c.name}" in str(caught.value) for c in OFFERED)
    assert not tune.cache_file().exists()


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FPSC_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune.cache_file() == tmp_path / "fpsc" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tune.cache_file() == Path.home() / ".cache" / "fpsc" / "tuned.json"
    monkeypatch.setenv("FPSC_CACHE_DIR", str(tmp_path / "own"))
    assert tune.cache_file() == tmp_path / "own" / "tuned.json"


def test_the_interpreter_has_one_configuration():
    if not interpreter.ACTIVE:
        pytest.skip("kernels are compiled here: TRITON_INTERPRET=0")
    found = tune.choose("fp8", torch.device("cpu"), torch.float32, 64, lambda config: None)
    assert found == configs.INTERPRETED
