"""What a run leaves: weights that diffusers loads without fpsc, and their policy beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsc.models.build import class_of
from fpsc.policy import Policy
from fpsc.train.checkpoint import whole_folder, write_tensors
from fpsc.train.processes import Processes
from fpsc.train.sharding import whole
from fpsc.train.subject import ADAPTER, Subject

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_METADATA = "lora_adapter_metadata"
PREFIX = "transformer"
"""What LoRA weights of diffusers begin with, by the part of a pipeline that they are for."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(subject: Subject, policy: Policy, folder: Path, processes: Processes) -> None:
    """Write the weights as they are now, and the policy; every process must call it.

    Full: a folder for `from_pretrained`. LoRA: a folder for `load_lora_weights` of a pipeline and
    `load_lora_adapter` of a model. The policy says that it is for jointly tuned weights.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    dtype = DTYPES[subject.config.spec.save_as]
    with whole_folder(folder, processes.main) as beside:
        if subject.config.spec.method == "lora":
            _lora(subject, dtype, beside, processes)
        else:
            _full(subject, dtype, beside, processes)
        if processes.main:
            tuned(policy).save_beside(beside)
    processes.wait()


def tuned(policy: Policy) -> Policy:
    """A policy that says that it is for jointly tuned weights."""
    if "for" in policy.document.value:
        return policy.with_values({"for.weights": "jointly-tuned"})
    return policy.with_values({"for": {"weights": "jointly-tuned"}})


def _full(subject: Subject, dtype: torch.dtype, folder: Path, processes: Processes) -> None:
    state = {name: whole(tensor) for name, tensor in subject.model.state_dict().items()}
    if not processes.main:
        return
    kind = class_of(subject.source.spec)
    with torch.device("meta"):
        plain = kind.from_config(dict(subject.model.config))
    state = {name: _as(tensor, dtype) for name, tensor in state.items()}
    plain.load_state_dict(state, assign=True)
    plain.save_pretrained(folder, safe_serialization=True)


def _lora(subject: Subject, dtype: torch.dtype, folder: Path, processes: Processes) -> None:
    from peft.utils import get_peft_model_state_dict

    state = {name: whole(tensor) for name, tensor in subject.parameters.items()}
    if not processes.main:
        return
    named = get_peft_model_state_dict(subject.model, state_dict=state, adapter_name=ADAPTER)
    adapter: dict[str, Any] = subject.model.peft_config[ADAPTER].to_dict()
    plain = {key: list(v) if isinstance(v, set) else v for key, v in adapter.items()}
    described = {f"{PREFIX}.{key}": value for key, value in plain.items()}
    write_tensors(
        {f"{PREFIX}.{name}": _as(tensor, dtype) for name, tensor in named.items()},
        folder / LORA_FILE,
        {"format": "pt", LORA_METADATA: json.dumps(described, indent=2, sort_keys=True)},
    )


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
