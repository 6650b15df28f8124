"""Models whose video attention no graph ever held.

Where Dynamo breaks a model's graph inside its attention (a `nonzero`, an `.item()`, a branch on
data), the attention runs eagerly between graphs, and a backend is never asked about it. Every graph
looks in order, and nothing is accelerated. So every forward of a model that takes a latent and a
timestep is expected to show a video attention, and its second forward says when none was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from warnings import warn

from torch import nn
from torch._dynamo.utils import counters

from fpsc import roots
from fpsc.passes.manager import Analysis
from fpsc.passes.match import Role
from fpsc.report import NothingReplacedWarning
from fpsc.runtime import ModelState

FLAGS: dict[str, Any] = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
"""Settings of Dynamo under which `.item()` and `nonzero` give symbols instead of graph breaks."""

_VIDEO = (Role.VIDEO, Role.JOINT, Role.FRAME)


def shows_video(analysis: Analysis) -> bool:
    """Whether a graph holds an attention that the report speaks of as the video's: of a video role,
    or of a spelling that is named and not understood."""
    return any(c.role in _VIDEO or c.call.query is None for c in analysis.candidates)


def takes_video(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a model has a timestep and a latent with five axes."""
    if roots.timestep_argument(module) is None:
        return False
    return roots.latent_of(roots.bind(module, args, kwargs)) is not None


class Watched:
    """A compiled graph without a video attention; its second call is the second forward.

    Args:
        compiled: what Inductor made of the graph.
        state: of the model, whose other graphs may hold the attention.
    """

    def __init__(self, compiled: Callable[..., Any], state: ModelState) -> None:
        self._compiled = compiled
        self._state: ModelState | None = state
        self._calls = 0

    def __call__(self, *args: Any) -> Any:
        if self._state is not None:
            self._calls += 1
            if self._calls == 2:
                warn_unseen(self._state)
                self._state = None
        return self._compiled(*args)


def warn_unseen(state: ModelState, flagged: bool = False) -> None:
    """Say once, and how to mend it, that no video attention of a model was seen.

    Args:
        flagged: whether `FLAGS` were set already.
    """
    root = state.root
    if state.saw_video or root is None:
        return
    state.saw_video = True  # said once
    name = type(root).__name__
    if flagged:
        fix = (
            "find the breaks with fpsc.compile(model, fullgraph=True), or compile the blocks alone "
            "with fpsc.compile(model, blocks=True)"
        )
    else:
        fix = (
            f"compile it with fpsc.compile(model), which sets {' and '.join(FLAGS)} of Dynamo for "
            "this model's calls, or with fullgraph=True, which does so too"
        )
    warn(
        f"fpsattn: {name} takes a latent and a timestep, and none of its graphs held a video "
        f"attention: it runs eagerly between them, and nothing was accelerated; {fix}.{_breaks()}",
        NothingReplacedWarning,
        3,
    )


def _breaks(most: int = 3) -> str:
    """The first line of the commonest reasons for which Dynamo broke graphs in this process."""
    reasons = [r.strip().splitlines()[0] for r, _ in counters["graph_break"].most_common(most) if r]
    return " Dynamo broke graphs at: " + "; ".join(reasons) if reasons else ""
