"""What was matched, what was not, and why: one `Report` for every graph that held an attention."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TextIO

from fpsc.passes.manager import Analysis, path_of
from fpsc.passes.match import Role
from fpsc.passes.rewrite import Target

if TYPE_CHECKING:
    from fpsc.runtime import ModelState

log = logging.getLogger("fpsc")


class _Standard(logging.StreamHandler[TextIO]):
    """To standard error, as long as the application has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


if log.level == logging.NOTSET:
    log.setLevel(logging.INFO)
    log.addHandler(_Standard())


class NothingReplacedWarning(UserWarning):
    """A graph with attention was compiled, and none of it was replaced."""


@dataclass(frozen=True)
class Site:
    """One attention call found in a graph.

    Attributes:
        name: path of the module that it stands in, for people.
        role: `video`, `joint`, `cross`, `frame` or `other`.
        replaced: whether `fpsc::attention` computes it now.
        reason: why it stays dense; "" when it was replaced.
        grid: (T, Y, X) of its video span; None when unknown. Symbolic sizes are strings.
        q_shape: sizes of its queries, [batch, heads, tokens, head_dim].
        grid_source: `graph`, `latent` or `options`; "" when unknown.
        prefix, suffix: text tokens before and after the video span.
        prologue: which norms and rotations the op does itself, or why none; "" where it was not
            replaced.
    """

    name: str
    role: str
    replaced: bool
    reason: str
    grid: tuple[int | str, int | str, int | str] | None
    q_shape: tuple[int | str, ...]
    grid_source: str = ""
    prefix: int | str = 0
    suffix: int | str = 0
    prologue: str = ""


@dataclass(frozen=True)
class Phase:
    """One row of the policy's table, as this model has used it.

    Attributes:
        noise: (from, to): includes the first, excludes the second.
        modes: names of the modes of its cells, most frequent first.
        keep: mean fraction of video key tiles visited, over layers and heads.
        forwards: batch elements that were computed with this row so far.
    """

    noise: tuple[float, float]
    modes: tuple[str, ...]
    keep: float
    forwards: int


@dataclass
class Report:
    """What became of the attentions of one compiled graph.

    Attributes:
        model: class of the model; "" when the graph belongs to no module.
        policy: name of the policy, and `policy_source`: why this one.
        layers: layers that the policy's table has for this model.
        timestep: where the noise level comes from.
        kernels: the implementations that compute the replaced sites, each with the reason.
        notes: what a user should know besides.
    """

    model: str
    policy: str
    policy_source: str
    sites: list[Site]
    timestep: str = ""
    layers: int = 0
    kernels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _state: weakref.ref[ModelState] | None = field(default=None, repr=False)

    @property
    def replaced(self) -> int:
        return sum(site.replaced for site in self.sites)

    @property
    def phases(self) -> list[Phase]:
        """The policy's rows with their use so far. Reads a counter from the device."""
        state = self._state() if self._state else None
        return state.phases() if state else []

    def attach(self, state: ModelState) -> None:
        """Let the report follow what the model does from now on."""
        self._state = weakref.ref(state)
        self.layers = state.layers

    def summary(self) -> str:
        """One line: what was replaced, what was left, by which policy, keep at the last noise."""
        video = [s for s in self.sites if s.role in (Role.VIDEO, Role.JOINT)]
        left = Counter(s.role for s in self.sites if not s.replaced)
        parts = [f"replaced {self.replaced} of {len(video)} video self-attentions"]
        if self.replaced and self.layers > self.replaced:
            parts[0] += f" (one graph for {self.layers} layers)"
        parts += [f"{n} {role} left dense" for role, n in left.items()]
        state = self._state() if self._state else None
        now = state.keep_now() if state else None
        tail = f"policy {self.policy}"
        if now is not None:
            tail += f"; keep {now[1]:.2f} at noise {now[0]:.2f}"
        return f"{self.model or 'graph'}: {', '.join(parts)}; {tail}"

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "policy": self.policy,
            "policy_source": self.policy_source,
            "timestep": self.timestep,
            "layers": self.layers,
            "kernels": self.kernels,
            "notes": self.notes,
            "sites": [asdict(s) for s in self.sites],
            "phases": [asdict(p) for p in self.phases],
        }

    def __str__(self) -> str:
        lines = [self.summary(), f"  policy {self.policy} ({self.policy_source})"]
        if self.timestep:
            lines.append(f"  timestep from {self.timestep}")
        lines += [f"  kernel {kernel}" for kernel in self.kernels]
        groups = Counter(
            (s.role, s.replaced, s.reason, s.grid, s.grid_source, s.q_shape, s.prologue)
            for s in self.sites
        )
        for (role, replaced, reason, grid, origin, q_shape, prologue), n in groups.items():
            place = f", grid {'x'.join(map(str, grid))} from {origin}" if grid else ""
            verdict = f"replaced; prologue {prologue}" if replaced else f"left dense: {reason}"
            lines.append(f"  {n} x {role} {list(q_shape)}{place}: {verdict}")
        for phase in self.phases:
            high, low = phase.noise
            lines.append(
                f"  noise {high:.2f}..{low:.2f}: {', '.join(phase.modes)}, keep {phase.keep:.2f}, "
                f"used {phase.forwards} times"
            )
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


_reports: list[Report] = []


def reports(clear: bool = False) -> list[Report]:
    """The match reports of this process, oldest first.

    Args:
        clear: forget them after returning them.
    """
    found = list(_reports)
    if clear:
        _reports.clear()
    return found


def record(report: Report) -> None:
    _reports.append(report)


def sites_of(analysis: Analysis) -> list[Site]:
    """The sites of an analysed graph, in execution order."""
    sites = []
    for candidate, decision in zip(analysis.candidates, analysis.decisions, strict=True):
        query = candidate.call.query
        value = query.meta.get("example_value") if query is not None else None
        replaced = isinstance(decision, Target)
        found = decision.found if isinstance(decision, Target) else None
        sites.append(
            Site(
                name=path_of(candidate),
                role=str(candidate.role),
                replaced=replaced,
                reason="" if isinstance(decision, Target) else decision,
                grid=tuple(map(_plain, found.grid)) if found else None,  # type: ignore[arg-type]
                q_shape=tuple(_plain(s) for s in value.shape) if value is not None else (),
                grid_source=found.origin if found else "",
                prefix=_plain(found.prefix) if found else 0,
                suffix=_plain(found.suffix) if found else 0,
                prologue=_prologue(decision) if isinstance(decision, Target) else "",
            )
        )
    return sites


def _prologue(target: Target) -> str:
    found = target.front
    return f"not fused: {found}" if isinstance(found, str) else f"fused ({found})"


def _plain(size: object) -> int | str:
    return size if isinstance(size, int) else str(size)
