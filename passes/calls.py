"""What the spellings of attention become: one dataclass for the later passes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class AttentionCall:
    """One attention in a graph, whatever its spelling.

    Attributes:
        node: the node whose value is the attention's output.
        spelling: `sdpa`, or the name of what computes it.
        query, key, value: nodes of shape [B, H, N, D]; None where the spelling is not understood.
        mask: `attn_mask`, or None. causal, dropout, scale: as SDPA defines them.
        unsupported: why this spelling cannot be rewritten, with the fix; "" when it can.
        twin: an SDPA call that was inserted beside `node` and computes the same; None when `node`
            is an SDPA call itself.
        restored: the twin's result in the layout of `node`.
    """

    node: fx.Node
    spelling: str
    query: fx.Node | None = None
    key: fx.Node | None = None
    value: fx.Node | None = None
    mask: object = None
    causal: bool = False
    dropout: float = 0.0
    scale: float | None = None
    unsupported: str = ""
    twin: fx.Node | None = None
    restored: fx.Node | None = None

    @property
    def sdpa(self) -> fx.Node:
        """The SDPA node that stands for this attention: what is replaced."""
        return self.node if self.twin is None else self.twin
