"""What is learned from the dense model as it was before training: its output, its attentions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from fpsc.compiling import repeated_blocks
from fpsc.errors import UserError
from fpsc.train.objective import Noisy
from fpsc.train.sharding import shard
from fpsc.train.subject import Subject

TAPPED = "_fpsc_tapped"


class Teacher:
    """The dense model, from which gradients do not flow.

    With LoRA it is the model itself without its adapters; else a copy of it, made before anything
    is compiled or spread.

    Args:
        attention: whether the outputs of video attentions are wanted too.
        noisy: a batch, to find them with.

    Raises:
        UserError: the model has no attention over all its tokens.
    """

    def __init__(self, subject: Subject, *, attention: bool, noisy: Noisy) -> None:
        self._subject = subject
        self._own = subject.config.spec.method == "full"
        self.model: nn.Module = (
            copy.deepcopy(subject.model).requires_grad_(False) if self._own else subject.model
        )
        self.taps: list[str] = []
        if attention:
            self.taps = video_attentions(subject, noisy)
            for model in {subject.model, self.model}:
                for name in self.taps:
                    model.get_submodule(name).register_forward_hook(_tap)

    def spread(self, mesh: DeviceMesh) -> None:
        """Spread a copy over processes, as its original is."""
        if self._own:
            shard(self.model, repeated_blocks(self.model), mesh)

    @torch.no_grad()
    def answer(self, noisy: Noisy) -> tuple[Tensor, list[Tensor]]:
        """Its prediction, and the outputs of its attentions."""
        with self._speaking():
            predicted = self._subject.predict(noisy)
            return predicted, self.tapped()

    def tapped(self) -> list[Tensor]:
        """The outputs of the student's attentions, or the teacher's while it speaks; taken once."""
        found = []
        for name in self.taps:
            module = self._subject.model.get_submodule(name)
            found.append(getattr(module, TAPPED))
            delattr(module, TAPPED)
        return found

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        subject = self._subject
        if self._own:
            student, subject.model = subject.model, self.model
            try:
                yield
            finally:
                subject.model = student
            return
        subject.model.disable_adapters()
        try:
            with subject.plain():
                yield
        finally:
            subject.model.enable_adapters()


def attention_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """float32 [B]: squared distances of attention outputs relative to the teacher's own squares,
    the mean over layers."""
    parts = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.float().flatten(1), b.float().flatten(1)
        parts.append((a - b).square().sum(1) / b.square().sum(1).clamp(min=1e-12))
    return torch.stack(parts).mean(0)


def _tap(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that leaves a module's output on it; also where the module is compiled."""
    first = output[0] if isinstance(output, tuple) else output
    setattr(module, TAPPED, first)


def video_attentions(subject: Subject, noisy: Noisy) -> list[str]:
    """Names of the modules whose attention has the tokens of the clip as queries and as keys.

    Seen in one dense forward, whatever the modules are called.

    Raises:
        UserError: there is none.
    """
    t, y, x = subject.grid(noisy.latents)
    watch = _Watch(t * y * x)
    names = {module: name for name, module in subject.model.named_modules()}
    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(watch.enter),
            module.register_forward_hook(watch.leave, always_call=True),
        )
    ]
    try:
        with subject.plain(), torch.no_grad(), watch:
            subject.predict(noisy)
    finally:
        for handle in handles:
            handle.remove()
    if not watch.found:
        raise UserError(
            f"distil.attention: no attention over the {t * y * x} tokens of a clip was seen in "
            f"{subject.source.spec.class_name}; set it to 0"
        )
    return [names[module] for module in watch.found]


class _Watch(TorchFunctionMode):
    """Notes in which module attention runs over at least so many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.found: list[nn.Module] = []
        self._stack: list[nn.Module] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args, strict=False))
            q, k = ({**named, **kwargs}[name] for name in ("query", "key"))
            if q.shape[-2] == k.shape[-2] >= self.tokens and self._stack[-1] not in self.found:
                self.found.append(self._stack[-1])
        return func(*args, **kwargs)
