"""Load a diffusers pipeline, or the parts of it that are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpsc.errors import UserError


def load_pipeline(
    model: str, dtype: Any, device: str, *, without: tuple[str, ...] = (), otherwise: str = ""
) -> Any:
    """Load a pipeline; never from the network, and no code or pickle of its folder.

    Args:
        model: a folder, or a hub id that is in the cache.
        dtype: a torch dtype, or one for each component and `default`.
        without: components whose names begin so are not loaded.
        otherwise: what to do instead, for the error about a folder that is no pipeline.

    Raises:
        UserError: there is no such pipeline here, or the device takes none.
    """
    from diffusers import DiffusionPipeline

    path = Path(model).expanduser()
    if path.exists() and not (path / "model_index.json").is_file():
        raise UserError(f"{path} is no diffusers pipeline (no model_index.json){otherwise}")
    name = str(path) if path.exists() else model
    try:
        parts = DiffusionPipeline.load_config(name, local_files_only=True)
        unused = [part for part in parts if part.startswith(without)] if without else []
        pipe = DiffusionPipeline.from_pretrained(
            name,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            **dict.fromkeys(unused),
        )
    except (OSError, ValueError) as error:
        hint = "" if path.exists() else f"; to fetch it: hf download {model}"
        raise UserError(f"{model} is no pipeline here: {error}{hint}") from error
    try:
        return pipe.to(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: {error}") from error
