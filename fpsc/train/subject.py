"""The model that a run trains: loaded, with or without LoRA, compiled, and spread over processes.

Its blocks are compiled one by one, which is what FSDP2 and gradient checkpointing need: both work
between blocks. The backend then takes noise levels from a hook on the model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fpsc
from fpsc.compiling import compile_forwards, repeated_blocks
from fpsc.errors import UserError
from fpsc.families import family_of
from fpsc.models.build import ModelSpec, class_of, find_model
from fpsc.policy import Policy
from fpsc.report import Report
from fpsc.roots import latent_grids
from fpsc.runtime import states_in
from fpsc.train.arrangement import arrangement_of
from fpsc.train.config import Config
from fpsc.train.objective import Noisy
from fpsc.train.processes import Processes
from fpsc.train.sharding import shard

ADAPTER = "default"
"""The name of the adapter of `method: lora`, as diffusers calls the first one."""

NO_SILENCE: dict[str, Any] = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
"""Clips of many shapes are compiled one by one; past the limit Dynamo would run blocks eagerly,
which is dense, without a word."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        spec: its class and configuration.
        folder: that `from_pretrained` takes, or a hub id.
        subfolder: in it.
        pipeline: the folder of the pipeline that it is a part of, or None.
    """

    spec: ModelSpec
    folder: str
    subfolder: str | None
    pipeline: Path | None

    @property
    def scheduler(self) -> Mapping[str, Any] | None:
        """The configuration of the scheduler in its pipeline."""
        if self.pipeline is None:
            return None
        path = self.pipeline / "scheduler" / "scheduler_config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def find_source(config: Config) -> Source:
    """Where the model of a configuration is.

    Raises:
        UserError: there is no such model.
    """
    name = config.spec.model
    if name == "demo":
        from fpsc.demo.model import shipped_weights

        name = str(shipped_weights())
    name = config.beside(name)
    spec = find_model(name)
    found = Path(spec.origin).parent
    if Path(name).exists():
        pipeline = found.parent if (found.parent / "model_index.json").is_file() else None
        return Source(spec, str(found), None, pipeline)
    if not spec.saved:
        raise config.error(("model",), f"{name} is a class without weights; name a folder of them")
    return Source(spec, name, "transformer" if found.name == "transformer" else None, None)


class Subject:
    """A model in training.

    Attributes:
        model: the root, in fp32; a model of diffusers, whatever was done to its blocks.
        parameters: those that are trained, by name.
        source: where it comes from.
    """

    def __init__(self, config: Config, processes: Processes) -> None:
        self.config = config
        self.source = find_source(config)
        self._processes = processes
        self._only: torch.Size | None = None  # the size of latents that a run is bound to
        self.model = self._loaded()
        known = family_of(self.model)
        self.convention = known.convention if known else None
        spec = self.source.spec
        self._arrangement = arrangement_of(spec, self.model)
        if config.spec.method == "lora":
            self._add_adapters()
        self.model.to(processes.device)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _loaded(self) -> Any:
        source, spec = self.source, self.config.spec
        frozen_in_bf16 = spec.method == "lora" and spec.precision == "bf16"
        try:
            model = class_of(source.spec).from_pretrained(
                source.folder,
                subfolder=source.subfolder,
                torch_dtype=torch.bfloat16 if frozen_in_bf16 else torch.float32,
                use_safetensors=True,
                local_files_only=Path(source.folder).is_dir(),
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise self.config.error(("model",), f"cannot be loaded: {reason}") from error
        model.requires_grad_(spec.method == "full")
        if spec.checkpointing:
            try:
                model.enable_gradient_checkpointing()
            except ValueError:
                message = f"{self.name} has no gradient checkpointing; set it to false"
                raise self.config.error(("checkpointing",), message) from None
        return model.eval()

    def _add_adapters(self) -> None:
        from peft import LoraConfig

        spec = self.config.spec.lora
        names = [name for name, _ in self.model.named_modules()]
        for index, target in enumerate(spec.targets):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise self.config.error(
                    ("lora", "targets", index),
                    f'no module of {self.name} has a name that ends with "{target}"',
                )
        torch.manual_seed(self.config.spec.seed)  # the first matrices are drawn
        adapter = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
        self.model.add_adapter(adapter, adapter_name=ADAPTER)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @property
    def name(self) -> str:
        """The class of the model."""
        return self.source.spec.class_name

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """What the model repeats, or all of it where it repeats nothing."""
        return repeated_blocks(self.model) or [self.model]

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """(T, Y, X) of latents [B, C, F, H, W] with what stands beside them.

        Raises:
            UserError: the model does not take such latents.
        """
        grid = self._arrangement.grid(latents.shape)
        if grid is not None:
            return grid
        grids = latent_grids(self.model, self._arrangement.given(latents).shape)
        if not grids:
            raise UserError(f"{self.name} takes no latents of {list(latents.shape)}")
        return grids[0]

    # ---- to make it ready

    def compile(self, policy: Policy, latents: Tensor) -> None:
        """Compile the blocks with this backend. `set_policy` works from the first forward on.

        Args:
            latents: such as the model will get.
        """
        options: dict[str, Any] = {"policy": policy, "backward": self.config.spec.backward}
        # Of packed latents the backend sees no grid. They are then all of one.
        grid = self._arrangement.grid(latents.shape)
        if grid is not None:
            self._only = latents.shape[2:]
            options["grid"] = grid
        compile_forwards(self.blocks, options)

    def spread(self) -> None:
        """Spread the parameters over the processes, where there are several."""
        mesh = self._processes.mesh()
        if mesh is not None:
            shard(self.model, [b for b in self.blocks if b is not self.model], mesh)
            self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def check(self, reports: Sequence[Report]) -> None:
        """Whether every video self-attention was replaced.

        Raises:
            UserError: one was not, with the reason.
        """
        sites = [site for report in reports for site in report.sites]
        left = [s for s in sites if s.role in ("video", "joint") and not s.replaced]
        if left:
            reasons = "; ".join(dict.fromkeys(f"{site.name}: {site.reason}" for site in left))
            raise UserError(f"video self-attention was left dense: {reasons}")
        if not any(site.replaced for site in sites):
            found = "; ".join(dict.fromkeys(f"{s.name} ({s.role}): {s.reason}" for s in sites))
            raise UserError(
                f"no video self-attention was found in {self.name}, so there is "
                f"nothing to train for; `fpsc inspect` shows what is in it. {found}".strip()
            )

    def set_policy(self, policy: Policy) -> None:
        """Give the model other numbers, which its next forward sees."""
        with warnings.catch_warnings():  # what it was tuned on was said when it was compiled
            warnings.simplefilter("ignore")
            fpsc.set_policy(self.model, policy)

    @property
    def ran(self) -> bool:
        """Whether it has run compiled, so that it has a policy."""
        return bool(states_in(self.model))

    # ---- to use it

    def predict(self, noisy: Noisy) -> Tensor:
        """The model's output [B, C, F, H, W] for a batch on its device."""
        size = noisy.latents.shape[2:]
        if self._only not in (None, size):
            raise UserError(
                f"{noisy.batch.keys[0]}: expected latents of {list(self._only or ())}, as those of "
                f"the first clip, found {list(size)}; {self.name} takes clips of one size in a run"
            )
        with self.autocast(), torch._dynamo.config.patch(**NO_SILENCE):
            out: Tensor = self.model(
                hidden_states=self._arrangement.given(noisy.latents),
                timestep=noisy.timestep,
                **self._arrangement.arguments(size),
                **noisy.conditioning,
                return_dict=False,
            )[0]
        return self._arrangement.taken(out, size)

    def autocast(self) -> Any:
        """The precision of the run."""
        device = self._processes.device.type
        on = self.config.spec.precision == "bf16"
        return torch.autocast(device, dtype=torch.bfloat16, enabled=on)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model as diffusers made it: not compiled, dense."""
        compiled = {block: vars(block).pop("forward") for block in self.blocks if _has_own(block)}
        try:
            yield
        finally:
            for block, forward in compiled.items():
                block.forward = forward  # type: ignore[method-assign]


def _has_own(block: nn.Module) -> bool:
    return "forward" in vars(block)
