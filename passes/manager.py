"""The passes in their order, from a Dynamo graph to a rewritten one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx

from fpsc.kernels.kinds import ALL_CELLS
from fpsc.passes.attempt import attempt
from fpsc.passes.before import Front, Fronts
from fpsc.passes.calls import AttentionCall
from fpsc.passes.graph import Program, example, module_path, product
from fpsc.passes.infer_grid import Found, Hints, Unfit, infer_grid
from fpsc.passes.match import Candidate, Role, match
from fpsc.passes.normalise import normalise
from fpsc.passes.rewrite import Rewritten, Target, rewrite
from fpsc.passes.thread import Weight, find_timestep, layer_weight


@dataclass(frozen=True)
class Limits:
    """What may be replaced, from the policy and from what the kernels can do.

    Attributes:
        min_tokens: shorter video spans stay dense.
        roles: others stay dense.
        head_dims: smallest and largest head_dim that the kernels take.
    """

    min_tokens: int = 0
    roles: frozenset[str] = frozenset({Role.VIDEO, Role.JOINT})
    head_dims: tuple[int, int] = (16, 256)


@dataclass
class Analysis:
    """All attention of a graph, and which of it will be replaced.

    Attributes:
        decisions: for every candidate the reason why it stays dense, or the target that replaces
            it.
        timestep: the graph's timestep input, if it has one.
    """

    program: Program
    candidates: list[Candidate]
    decisions: list[Target | str]
    timestep: fx.Node | None
    warnings: list[str] = field(default_factory=list)

    @property
    def targets(self) -> list[Target]:
        return [d for d in self.decisions if isinstance(d, Target)]

    def leave(self, reason: str) -> None:
        """Leave every target dense."""
        self.decisions = [reason if isinstance(d, Target) else d for d in self.decisions]

    @property
    def queries(self) -> list[torch.Tensor]:
        """Example of the queries of every target."""
        return [query_of(target) for target in self.targets]


def analyse(
    module: fx.GraphModule,
    hints: Hints | None = None,
    limits: Limits | None = None,
    argument_names: Sequence[str] = (),
    timestep: str | None = None,
    *,
    strict: bool = True,
) -> Analysis:
    """Find and classify every attention of a graph; changes nothing.

    Args:
        module: the graph that Dynamo hands to a backend.
        hints: what is known of the grid from outside.
        limits: what may be replaced.
        argument_names: positional arguments of the compiled module, without `self`.
        timestep: name of the argument that holds the timestep, where the user states it.
        strict: an error of ours is raised. Else what it met stays dense with the reason: one
            attention where it was read, all of them later on.
    """
    program, calls = normalise(module, strict=strict)

    def judge() -> Analysis:
        return _judge(program, calls, hints, limits, argument_names, timestep)

    def give_up(reason: str) -> Analysis:
        candidates = [Candidate(c, Role.OTHER, reason=c.unsupported or reason) for c in calls]
        return Analysis(program, candidates, [c.reason for c in candidates], None)

    return attempt(judge, give_up, "this graph", strict=strict)


def _judge(
    program: Program,
    calls: list[AttentionCall],
    hints: Hints | None,
    limits: Limits | None,
    argument_names: Sequence[str],
    timestep: str | None,
) -> Analysis:
    candidates = match(program, calls)
    grids = infer_grid(program, candidates, hints or Hints())
    candidates = [
        replace(c, role=g.role) if isinstance(g, Unfit) and g.role else c
        for c, g in zip(candidates, grids, strict=True)
    ]
    decisions = [
        _decide(program, candidate, found, limits or Limits())
        for candidate, found in zip(candidates, grids, strict=True)
    ]
    _one_head_count(decisions)
    found = find_timestep(program, argument_names, timestep)
    return Analysis(program, candidates, decisions, found)


def _one_head_count(decisions: list[Target | str]) -> None:
    """A table has one number of heads: sites with another number stay dense."""
    heads = [_heads(d) if isinstance(d, Target) else None for d in decisions]
    counts = Counter(h for h in heads if h is not None)
    if len(counts) > 1:
        most = counts.most_common(1)[0][0]
        for i, count in enumerate(heads):
            if count not in (None, most):
                decisions[i] = f"{count} heads, where most sites of this graph have {most}"


def _heads(target: Target) -> int:
    return int(query_of(target).shape[1])


def query_of(target: Target) -> torch.Tensor:
    """Example of a target's queries."""
    query = example(target.candidate.call.query)
    assert isinstance(query, torch.Tensor)
    return query


def _decide(
    program: Program, candidate: Candidate, found: Found | Unfit, limits: Limits
) -> Target | str:
    if isinstance(found, Unfit):
        return found.reason
    call = candidate.call
    assert call.query is not None
    query = example(call.query)
    assert isinstance(query, torch.Tensor)
    tokens, head_dim = product(found.grid), int(query.shape[-1])
    if isinstance(tokens, int) and tokens < limits.min_tokens:
        return (
            f"{tokens} video tokens, fewer than limits.min_tokens {limits.min_tokens} of the policy"
        )
    if candidate.role not in limits.roles:
        covered = " and ".join(sorted(limits.roles))
        return f"role {candidate.role}; the policy covers {covered} attention only (roles)"
    low, high = limits.head_dims
    if not low <= head_dim <= high:
        return f"head_dim {head_dim}; the kernels take {low} to {high}"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype}; the kernels take float32, bfloat16 and float16"
    return Target(candidate, found, layer_weight(program, call.query))


def weights_of(analysis: Analysis) -> list[Weight | None]:
    """The weights by which a call tells its layer: of the targets, or of what could be one."""
    if analysis.targets:
        return [target.weight for target in analysis.targets]
    return [
        layer_weight(analysis.program, c.call.query)
        for c in analysis.candidates
        if c.role in (Role.VIDEO, Role.JOINT) and c.call.query is not None
    ]


def read_fronts(analysis: Analysis, why_not: str = "", *, strict: bool = True) -> None:
    """Find out of each target what of its norms and rotations the op can do.

    Args:
        why_not: why the op shall do none of it; "" where it shall.
        strict: an error of ours is raised, else it is the reason why a target keeps them.
    """
    targets = analysis.targets
    fronts = Fronts(analysis.program) if targets and not why_not else None

    def read(target: Target) -> Front | str:
        if fronts is None:
            return why_not
        look = partial(fronts.read, target.candidate.call)
        return attempt(look, str, "what stands in front of this attention", strict=strict)

    analysis.decisions = [
        replace(d, front=read(d)) if isinstance(d, Target) else d for d in analysis.decisions
    ]


def apply(
    analysis: Analysis,
    convention: str | None,
    *,
    kinds: int = ALL_CELLS,
    kernel: str = "auto",
    fp8_backward: bool = False,
) -> Rewritten:
    """Rewrite a graph as analysed.

    Args:
        convention: how the timestep becomes a noise level; None when it is not known.
        kinds, kernel, fp8_backward: of the op (`fpsc.kernels.ops`).
    """
    return rewrite(
        analysis.program,
        analysis.targets,
        analysis.timestep,
        convention,
        kinds=kinds,
        kernel=kernel,
        fp8_backward=fp8_backward,
    )


def path_of(candidate: Candidate) -> str:
    """Where an attention stands in the model, for people."""
    return module_path(candidate.call.node) or candidate.call.node.name
