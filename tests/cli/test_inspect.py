"""`fpsc inspect`: where a model comes from, what is found in it, and what bad input is told."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fpsc.cli import app
from fpsc.policy import find

WAN = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "ffn_dim": 64,
    "text_dim": 32,
    "freq_dim": 16,
}
SMALL = ["--config", json.dumps(WAN), "--grid", "3,4,6", "--text-tokens", "7"]


def inspect(*arguments: str) -> Any:  # click's Result, which typer does not export
    return CliRunner().invoke(app, ["inspect", *arguments])


def found(*arguments: str) -> dict[str, Any]:
    result = inspect(*arguments, "--json")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def error(*arguments: str) -> str:
    """The message of a call that must fail as a user's mistake does."""
    result = inspect(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.stderr.split())


def test_wan_self_attention_is_replaced_and_cross_attention_is_kept() -> None:
    report = found("WanTransformer3DModel", *SMALL, "--policy", "dense")
    rows = [(s["role"], s["replaced"], s["grid"], s["q_shape"]) for s in report["sites"]]
    video = ("video", True, [3, 4, 6], [1, 2, 72, 64])
    cross = ("cross", False, None, [1, 2, 72, 64])
    assert rows == [video, cross] * 2
    assert all(site["reason"] for site in report["sites"] if not site["replaced"])
    assert (report["graphs"], report["graph_breaks"], report["problem"]) == (1, {}, None)


def test_min_tokens_of_the_policy_keeps_short_clips_dense() -> None:
    result = inspect("WanTransformer3DModel", *SMALL, "--policy", "generic", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1  # nothing is replaced
    assert report["replaced"] == 0
    assert "min_tokens" in report["sites"][0]["reason"]


def test_batch_and_dtype_reach_the_model() -> None:
    report = found("WanTransformer3DModel", *SMALL, "--batch", "2", "--dtype", "float32")
    assert report["sites"][0]["q_shape"] == [2, 2, 72, 64]
    assert report["dtype"] == "float32"


def test_frames_and_pixels_give_the_grid() -> None:
    size = ["--frames", "9", "--height", "64", "--width", "96"]
    report = found("WanTransformer3DModel", *SMALL[:2], *size)
    assert report["grid"] == [3, 4, 6]
    assert report["sites"][0]["q_shape"][2] == 72


def test_stride_of_the_vae_with_48_channels() -> None:
    config = json.dumps({**WAN, "in_channels": 48, "out_channels": 48})
    size = ["--frames", "9", "--height", "64", "--width", "96"]
    assert found("WanTransformer3DModel", "--config", config, *size)["grid"] == [3, 2, 3]


def test_per_token_timestep_given_by_hand() -> None:
    report = found("WanTransformer3DModel", *SMALL, "--input", "timestep=1x72:int64")
    assert [site["role"] for site in report["sites"]] == ["video", "cross"] * 2


@pytest.mark.parametrize("inside", ["", "transformer"])
def test_model_from_a_folder(inside: str, tmp_path: Path) -> None:
    """A model's folder, and a pipeline's folder; settings that the class no longer has are fine."""
    (tmp_path / inside).mkdir(exist_ok=True)
    config = {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.0", **WAN, "old": 1}
    (tmp_path / inside / "config.json").write_text(json.dumps(config))
    report = found(str(tmp_path), "--grid", "3,4,6", "--policy", "dense")
    assert (report["model"], report["replaced"]) == ("WanTransformer3DModel", 2)
    saved = find("dense").save_beside(tmp_path / inside)
    assert found(str(tmp_path), "--grid", "3,4,6")["policy"] == str(saved)


def test_table_groups_equal_sites() -> None:
    result = inspect("WanTransformer3DModel", *SMALL, "--policy", "dense")
    assert result.exit_code == 0
    assert result.output.count("replaced") == 2  # one row, and the sum
    assert "replaced 2 of 4 attentions" in result.output
    every = inspect("WanTransformer3DModel", *SMALL, "--policy", "dense", "--all")
    assert every.output.count("replaced") == 3


@pytest.mark.parametrize(
    ("name", "config", "role"),
    [
        (
            "HunyuanVideoTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "text_embed_dim": 16,
                "pooled_projection_dim": 8,
                "rope_axes_dim": [2, 4, 10],
            },
            "joint",
        ),
        (
            "CogVideoXTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "text_embed_dim": 16,
                "time_embed_dim": 8,
                "max_text_seq_length": 7,
                "use_rotary_positional_embeddings": True,
            },
            "joint",
        ),
        (
            "LTXVideoTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "caption_channels": 16,
                "cross_attention_dim": 32,
            },
            "video",
        ),
    ],
)
def test_other_families_run_on_examples(name: str, config: dict[str, Any], role: str) -> None:
    """Joint sequences, frames before channels, packed tokens."""
    arguments = ["--config", json.dumps(config), "--grid", "3,4,6", "--policy", "dense"]
    report = found(name, *arguments)
    assert report["problem"] is None
    assert role in {site["role"] for site in report["sites"]}


def test_missing_argument_is_named() -> None:
    message = error("LTX2VideoTransformer3DModel", "--config", '{"num_layers": 1}')
    assert "'audio_hidden_states'" in message
    assert "--input audio_hidden_states=" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["WanTransformer3D"], "did you mean WanTransformer3DModel"),
        (["AutoencoderTiny"], "no example is known for the argument 'sample'"),
        (["./absent"], "is not a file, a folder, a class of diffusers or a hub id"),
        (["owner/name"], "the hub cannot be reached"),
        (["WanTransformer3DModel", "--config", '{"num_layer": 2}'], "did you mean num_layers?"),
        (["WanTransformer3DModel", "--config", '{"a": }'], "--config, line 1, column 7: not JSON"),
        (["WanTransformer3DModel", "--config", "[2]"], "neither a file nor inline JSON"),
        (["WanTransformer3DModel", "--config", '{"num_layers": "two"}'], "rejects the config"),
        (["./x.json", "--config", "{}"], "--config needs the name of a class"),
        (["WanTransformer3DModel", "--policy", "densee"], "no such policy"),
        (["WanTransformer3DModel", "--grid", "3,4"], "expected three positive integers"),
        (["WanTransformer3DModel", "--grid", "3,0,4"], "expected three positive integers"),
        (["WanTransformer3DModel", "--frames", "81"], "--height, --width missing"),
        (
            ["WanTransformer3DModel", "--grid", "3,4,6", "--frames", "81"],
            "exclude each other",
        ),
        (
            ["WanTransformer3DModel", "--frames", "80", "--height", "480", "--width", "832"],
            "--frames 80: WanTransformer3DModel takes 4 n + 1 frames",
        ),
        (
            ["WanTransformer3DModel", "--frames", "81", "--height", "481", "--width", "832"],
            "--height 481: WanTransformer3DModel takes multiples of 16",
        ),
        (
            ["SanaVideoTransformer3DModel", "--frames", "81", "--height", "480", "--width", "832"],
            "give --grid T,Y,X",
        ),
        (["WanTransformer3DModel", "--input", "time=1:int64"], "has no such argument"),
        (["WanTransformer3DModel", "--input", "timestep=1:int63"], "expected NAME=SHAPE"),
        (["WanTransformer3DModel", "--input", "timestep"], "expected NAME=SHAPE"),
        (["WanTransformer3DModel", *SMALL, "--input", "timestep=1x7:int64"], "did not run"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_told_what_to_do(arguments: list[str], expected: str) -> None:
    assert expected in error(*arguments)


def test_errors_are_json_on_request() -> None:
    result = inspect("WanTransformer3D", "--json")
    assert result.exit_code == 2
    assert "did you mean" in json.loads(result.stdout)["error"]


def test_broken_config_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "a": 1,\n}')
    assert f"{path}, line 3" in error(str(path))
    path.write_text("{}")
    assert "has no _class_name" in error(str(path))


def test_14b_needs_neither_its_memory_nor_minutes(checkout: Path) -> None:
    """Wan 2.1 14B at 720p: 28 GB of weights in bfloat16, less than 3 GB here."""
    code = "from fpsc.cli import app; app()"
    size = ["--frames", "81", "--height", "720", "--width", "1280"]
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "WanTransformer3DModel", *size, "--json"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    report = json.loads(done.stdout)
    assert (report["grid"], report["replaced"], len(report["sites"])) == ([21, 45, 80], 40, 80)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3e6  # kB; the largest child
