"""One scale for all of V in a head, in place of one a channel: what the experiment compares with.

No policy offers it: on this format it saves nothing. The CPU kernel rounds V in one function, and
this replaces that function for as long as a variant runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from fpsc.kernels import cpu
from fpsc.kernels.reference import quantisation_scale


@contextmanager
def v_scale(kind: str) -> Iterator[None]:
    """`channel` changes nothing; `tensor` takes one scale for each head's V, on CPU.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("channel", "tensor"):
        raise ValueError(f"expected channel or tensor as the scale of V, found {kind!r}")
    if kind == "channel":
        yield
        return
    with mock.patch.object(cpu, "_round_per_channel_", _round_together_):
        yield


def _round_together_(v_MD: Tensor) -> Tensor:
    if len(v_MD) == 0:
        return v_MD.new_ones(v_MD.shape[1])
    s = quantisation_scale(v_MD.abs().nan_to_num_(nan=0.0).amax())
    cpu._round_scaled_(v_MD, s)
    return s.expand(v_MD.shape[1])
