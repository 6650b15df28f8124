"""Find a diffusers model's configuration, and build the model without memory for its weights."""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpsc.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ("config.json", "transformer/config.json")  # a model's folder, a pipeline's folder


@dataclass(frozen=True)
class ModelSpec:
    """A diffusers model that is described but not built."""

    class_name: str
    config: dict[str, Any]
    origin: str  # where the configuration came from, for messages
    saved: bool = False  # written by diffusers, perhaps by another version of it


def find_model(model: str, config: str | None = None) -> ModelSpec:
    """Read the configuration that `model` names.

    Args:
        model: a folder with config.json (or transformer/config.json), such a file, a class name
            of diffusers, or the id of a repository on the hub.
        config: for a class name, a JSON file or inline JSON; the class's defaults without it.

    Raises:
        UserError: nothing of that name exists, the JSON is not an object, or names no class.
    """
    path = Path(model).expanduser()
    if config is None and path.is_dir():
        found = next((path / name for name in _CONFIGS if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} holds neither {' nor '.join(_CONFIGS)}")
        return _from_file(found)
    if config is None and path.is_file():
        return _from_file(path)
    if re.fullmatch(r"[A-Za-z_]\w*", model):
        values = {} if config is None else _parse(config)
        return ModelSpec(model, values, "its defaults" if config is None else "--config")
    if config is not None:
        raise UserError(f"--config needs the name of a class of diffusers as MODEL, not {model!r}")
    if path.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise UserError(
            f"{model} is not a file, a folder, a class of diffusers or a hub id (owner/name)"
        )
    return _from_hub(model)


def class_of(spec: ModelSpec) -> Any:
    """The class of a model.

    Raises:
        UserError: diffusers has no such class.
    """
    import diffusers

    model_class: Any = getattr(diffusers, spec.class_name, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)
    if not is_model:
        names = [name for name in dir(diffusers) if "Transformer" in name]
        near = difflib.get_close_matches(spec.class_name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"diffusers {diffusers.__version__} has no model class {spec.class_name}{hint}"
        )
    return model_class


def build(spec: ModelSpec, dtype: torch.dtype) -> torch.nn.Module:
    """Build the model on the meta device: shapes and dtypes only, whatever its size.

    Floating-point weights get `dtype`, except those that the class keeps in float32 when it
    loads them (`_keep_in_fp32_modules`). The model is in eval mode, without gradients.

    Raises:
        UserError: diffusers has no such class, or the class does not accept the configuration.
    """
    model_class = class_of(spec)
    values = {key: value for key, value in spec.config.items() if not key.startswith("_")}
    known = set(model_class._get_init_keys(model_class))
    unknown = sorted(set(values) - known)
    if unknown and not spec.saved:  # in a saved one diffusers ignores them, with a warning
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{spec.class_name} has no setting {unknown[0]!r} ({spec.origin}){hint}")
    try:
        with torch.device("meta"):
            model = model_class.from_config(values)
    except Exception as error:
        raise UserError(
            f"{spec.class_name} rejects the configuration from {spec.origin}: {error}"
        ) from error
    return _cast(model, dtype).eval().requires_grad_(False)


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """What `from_pretrained(torch_dtype=dtype)` does to the dtypes of parameters and buffers."""
    in_fp32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        keep = any(part in name.split(".") for part in in_fp32)
        if parameter.is_floating_point() and not keep:
            parameter.data = parameter.data.to(dtype)
    return model


def _from_file(path: Path) -> ModelSpec:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return _with_class(_load(text, str(path)), str(path))


def _parse(config: str) -> dict[str, Any]:
    if config.lstrip().startswith("{"):
        return _load(config, "--config")
    path = Path(config).expanduser()
    if not path.is_file():
        raise UserError(f"--config {config}: neither a file nor inline JSON, as '{{...}}'")
    return _load(path.read_text(encoding="utf-8"), str(path))


def _load(text: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{origin}: expected a JSON object, found {type(value).__name__}")
    return value


def _with_class(values: dict[str, Any], origin: str) -> ModelSpec:
    name = values.get("_class_name")
    if not isinstance(name, str):
        raise UserError(
            f"{origin} has no _class_name: give the class as MODEL and this file as --config"
        )
    return ModelSpec(name, values, origin, saved=True)


def _from_hub(repo: str) -> ModelSpec:
    """Fetch one small JSON file; no weights and no code."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in reversed(_CONFIGS):
        try:
            return _from_file(Path(hf_hub_download(repo, name)))
        except LocalEntryNotFoundError as error:  # no network, and not in the local cache
            raise UserError(
                f"{repo} is not a file or a folder here, and the hub cannot be reached"
            ) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # offline, gated, absent: the library has a class for each
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"cannot fetch {repo}/{name} from the hub: {reason}") from error
    raise UserError(f"{repo} on the hub holds neither {' nor '.join(_CONFIGS)}")
