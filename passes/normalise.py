"""Pass 1: every spelling of attention that a graph may hold becomes one `AttentionCall`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fpsc.passes.graph import Program, argument, op_name, qualified_name, shape

_SDPA = "scaled_dot_product_attention"

# Kernels that other libraries put into a graph in place of SDPA: what they are, and how to get SDPA
# back.
_FOREIGN = {
    "flex_attention": "FlexAttention",
    "flash_attn": "flash-attn",
    "sageattn": "SageAttention",
    "sage_attention": "SageAttention",
    "memory_efficient_attention": "xFormers",
    "_native_multi_head_attention": "nn.MultiheadAttention's fast path",
    "multi_head_attention_forward": "nn.MultiheadAttention",
}
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__")


@dataclass(frozen=True)
class AttentionCall:
    """One attention in a graph, whatever its spelling.

    Attributes:
        node: the node whose value is the attention's output.
        spelling: `sdpa`, or the name of what computes it.
        query, key, value: nodes of shape [B, H, N, D]; None where the spelling is not understood.
        mask: `attn_mask`, or None. causal, dropout, scale: as SDPA defines them.
        unsupported: why this spelling cannot be rewritten, with the fix; "" when it can.
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


def find_attention(program: Program) -> list[AttentionCall]:
    """All attention calls of a program in execution order."""
    calls = (_read(node) for node in program.nodes)
    return [call for call in calls if call is not None]


def _read(node: fx.Node) -> AttentionCall | None:
    if node.op not in ("call_function", "call_method"):
        return None
    name = op_name(node)
    if name == _SDPA:
        return _read_sdpa(node)
    for fragment, library in _FOREIGN.items():
        if fragment in qualified_name(node):
            return AttentionCall(
                node,
                library,
                unsupported=(
                    f"attention is computed by {library}, which is not rewritten; let the model "
                    "call scaled_dot_product_attention (in diffusers: "
                    'model.set_attention_backend("native")) before compiling'
                ),
            )
    if name in ("softmax", "_softmax") and _is_manual_attention(node):
        return AttentionCall(
            node,
            "softmax(q k^T) v",
            unsupported=(
                "attention is written out as softmax(q k^T) v, which is not rewritten; "
                "call torch.nn.functional.scaled_dot_product_attention in the model"
            ),
        )
    return None


def _read_sdpa(node: fx.Node) -> AttentionCall:
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    scale = argument(node, 6, "scale") if "scale" not in node.kwargs else node.kwargs["scale"]
    dropout = argument(node, 4, "dropout_p", 0.0)
    unsupported = ""
    if any(not isinstance(x, float | int) for x in (dropout, scale if scale is not None else 0.0)):
        unsupported = "dropout_p or scale is computed by the graph; pass them as numbers"
    sizes = shape(query)
    if sizes is None or len(sizes) != 4:
        unsupported = f"query has shape {sizes}, expected [batch, heads, tokens, head_dim]"
    return AttentionCall(
        node,
        "sdpa",
        query,
        key,
        value,
        mask=argument(node, 3, "attn_mask"),
        causal=bool(argument(node, 5, "is_causal", False)),
        dropout=dropout if isinstance(dropout, float | int) else 0.0,
        scale=scale if isinstance(scale, float | int) else None,
        unsupported=unsupported,
    )


def _is_manual_attention(softmax: fx.Node) -> bool:
    """A softmax fed by a matrix product whose result goes into another one."""
    fed = _reaches(softmax, lambda n: list(n.all_input_nodes[:1]))
    feeds = _reaches(softmax, lambda n: list(n.users)[:1])
    return fed and feeds


def _reaches(node: fx.Node, step: Callable[[fx.Node], list[fx.Node]], limit: int = 8) -> bool:
    for _ in range(limit):
        following = step(node)
        if not following:
            return False
        node = following[0]
        if op_name(node) in _PRODUCTS:
            return True
    return False
