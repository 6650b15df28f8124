"""Attention that a library computes: rewritten where all of its arguments are understood.

What an argument means is read from its name. One that is not known here must have the value that
turns it off; else the call is named and left alone.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fpsc.passes.calls import AttentionCall
from fpsc.passes.edit import Sketch, unsupported
from fpsc.passes.graph import example, op_name, qualified_name, same, shape, writers_of
from fpsc.passes.masks import keys_that_take_part

_NATIVE = (
    "let the model call scaled_dot_product_attention (in diffusers: "
    'model.set_attention_backend("native")) before compiling'
)
_LIBRARIES = {
    "flash_attn": "flash-attn",
    "sageattn": "SageAttention",
    "sage_attention": "SageAttention",
    "memory_efficient_attention": "xFormers",
    "_native_multi_head_attention": "nn.MultiheadAttention's fast path",
}
_ATEN = frozenset(
    [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math",
    ]
)
_MEANING = {
    "q": "query", "query": "query", "k": "key", "key": "key", "v": "value", "value": "value",
    "softmax_scale": "scale", "scale": "scale", "sm_scale": "scale",
    "dropout_p": "dropout", "p": "dropout", "causal": "causal", "is_causal": "causal",
    "attn_mask": "mask", "attn_bias": "mask",
    "cu_seqlens_q": "starts_q", "cu_seqlens_k": "starts_k",
    "max_seqlen_q": "longest_q", "max_seqlen_k": "longest_k",
}  # fmt: skip
_FREE = frozenset(
    [
        "deterministic", "return_attn_probs", "return_softmax", "return_lse", "num_splits",
        "pack_gqa", "sm_margin", "op", "compute_log_sumexp", "return_debug_mask", "zero_tensors",
        "return_softmax_lse", "compute_logsumexp",
    ]
)  # fmt: skip
"""Arguments that do not change the output."""
_OFF: dict[str, tuple[object, ...]] = {
    "window_size": ((-1, -1), [-1, -1], (None, None)),
    "window_size_left": (-1, None),
    "window_size_right": (-1, None),
    "softcap": (0, 0.0),
    "attention_chunk": (0,),
}


def is_library(node: fx.Node) -> bool:
    """Whether a node is an attention that a library computes."""
    name = op_name(node)
    if name in _ATEN or name in ("flex_attention", "multi_head_attention_forward"):
        return True
    return "backward" not in name and any(f in qualified_name(node) for f in _LIBRARIES)


def read_library(node: fx.Node) -> AttentionCall:
    """The attention that a library's call computes."""
    name = op_name(node)
    if name == "flex_attention":
        return _read_flex(node)
    if name == "multi_head_attention_forward":
        return _guarded(node, "nn.MultiheadAttention", _read_multihead)
    if name in _ATEN:
        return _guarded(node, f"aten.{name}", _read_call)
    library = next(v for fragment, v in _LIBRARIES.items() if fragment in qualified_name(node))
    if library in ("flash-attn", "xFormers"):
        return _guarded(node, library, _read_call)
    reason = f"attention is computed by {library}, which is not rewritten; {_NATIVE}"
    return unsupported(node, library, reason)


class _Refused(Exception):
    """Why a call cannot be rewritten."""


def _guarded(
    node: fx.Node, library: str, read: Callable[[fx.Node, str], AttentionCall]
) -> AttentionCall:
    try:
        return read(node, library)
    except _Refused as reason:
        return unsupported(
            node, library, f"attention is computed by {library}: {reason}; {_NATIVE}"
        )


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that were not given."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        known = target._schema.arguments
        named = {a.name: a.default_value for a in known if a.has_default_value()}
        named.update(zip([a.name for a in known], node.args, strict=False))
        return {**named, **node.kwargs}
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise _Refused("its signature is not known") from None
    bound.apply_defaults()
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind == parameter.VAR_KEYWORD:
            named.update(bound.arguments[parameter.name])
            del named[parameter.name]
    return named


def _output_of(node: fx.Node) -> fx.Node:
    """The node that holds the attention's output: the call or its first result."""
    if isinstance(example(node), torch.Tensor):
        return node
    first = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    if len(first) != 1:
        raise _Refused("its output is not taken out of its results in one place")
    if any(u.users for u in node.users if u is not first[0]):
        raise _Refused("its other results (the weights or their log-sum) are used too")
    return first[0]


def _read_call(node: fx.Node, library: str) -> AttentionCall:
    """SDPA's own variants, flash-attn and xFormers."""
    found: dict[str, Any] = {}
    for name, value in arguments_of(node).items():
        if name in _MEANING:
            found[_MEANING[name]] = value
        elif name not in _FREE and value is not None and value not in _OFF.get(name, ()):
            raise _Refused(f"its argument {name} is {value}")
    qkv = [found.get(name) for name in ("query", "key", "value")]
    if not all(isinstance(n, fx.Node) and shape(n) for n in qkv):
        raise _Refused("its queries, keys and values are not tensors of the graph")
    out = _output_of(node)
    dropout, scale = found.get("dropout", 0.0), found.get("scale")
    if not isinstance(dropout, int | float) or not isinstance(scale, int | float | None):
        raise _Refused("its dropout or scale is computed by the graph")
    given: dict[str, Any] = {"causal": bool(found.get("causal", False)), "dropout": float(dropout)}
    given["scale"] = None if scale is None else float(scale)
    sketch = Sketch(out)
    if library.startswith("aten."):
        mask = found.get("mask")
        return sketch.attention(out, library, _three(qkv), lambda n: n, mask=mask, **given)
    if found.get("mask") is not None:
        raise _Refused("it has an attn_bias")
    if any("fp8" in str(getattr(example(n), "dtype", "")) for n in qkv):
        raise _Refused("it computes in FP8")
    rank = len(shape(qkv[0]) or ())
    batch = _sequences(found, qkv) if rank == 3 else None
    if rank == 3 and batch is not None:
        qkv = [sketch.call("unflatten", n, 0, (batch, -1)) for n in qkv]
    elif rank != 4:
        raise _Refused(f"its queries have {rank} axes, expected [batch, tokens, heads, head_dim]")
    elif "starts_q" in found:
        raise _Refused("it has both a batch axis and cu_seqlens")

    def restore(n: fx.Node) -> fx.Node:
        n = sketch.call("transpose", n, 1, 2)
        return n if batch is None else sketch.call("flatten", n, 0, 1)

    qkv = [sketch.call("transpose", n, 1, 2) for n in qkv]
    return sketch.attention(out, library, _three(qkv), restore, **given)


def _three(nodes: list[Any]) -> tuple[fx.Node, fx.Node, fx.Node]:
    q, k, v = nodes
    return q, k, v


def _sequences(found: dict[str, Any], qkv: list[Any]) -> int | None:
    """How many sequences of equal length fill packed tokens; None without `cu_seqlens`.

    Only what the graph shows counts: `cu_seqlens` must be a constant of it. The values of an input
    may be others at the next call.
    """
    if "starts_q" not in found:
        return None
    counts = []
    for name, tensor in (("starts_q", qkv[0]), ("starts_k", qkv[1])):
        starts = _constant(found[name])
        tokens = (shape(tensor) or [0])[0]
        if starts is None:
            raise _Refused(
                "its cu_seqlens are not constants of the graph, and it cannot be shown that the "
                "sequences are all of one length and fill the tokens"
            )
        steps = {b - a for a, b in pairwise(starts)}
        if starts[0] != 0 or len(steps) != 1 or not same(starts[-1], tokens):
            raise _Refused(f"its cu_seqlens {starts} are not sequences of one length that fill it")
        counts.append(len(starts) - 1)
    if counts[0] != counts[1]:
        raise _Refused("queries and keys have different numbers of sequences")
    return counts[0]


def _constant(node: object) -> list[int] | None:
    """Values of an integer tensor that the graph makes from numbers."""
    while isinstance(node, fx.Node) and op_name(node) in ("to", "int", "contiguous", "cuda"):
        node = node.args[0]
    if not isinstance(node, fx.Node) or writers_of(node):
        return None
    numbers: object = None
    if op_name(node) == "tensor":
        numbers = node.args[0]
    elif op_name(node) == "arange" and all(isinstance(a, int) for a in node.args):
        numbers = list(range(*node.args))  # type: ignore[arg-type]
        if "step" in node.kwargs or "end" in node.kwargs or "start" in node.kwargs:
            return None
    if not isinstance(numbers, list | tuple) or len(numbers) < 2:
        return None
    return list(numbers) if all(isinstance(n, int) for n in numbers) else None  # type: ignore[arg-type]


def _read_flex(node: fx.Node) -> AttentionCall:
    """FlexAttention without a score_mod and without a mask is plain attention."""
    library = "FlexAttention"
    query, key, value, score_mod, blocks, scale = node.args[:6]
    module = node.graph.owning_module
    try:
        if not all(isinstance(n, fx.Node) for n in (query, key, value)) or module is None:
            raise _Refused("its queries, keys and values are not tensors of the graph")
        if not isinstance(blocks, tuple | list) or not _returns_scores(module, score_mod):
            raise _Refused("it changes the scores (score_mod)")
        if not _empty_blocks(module, blocks, query, key):
            raise _Refused(
                "it has a block mask, which is left as it is; where it stands "
                "for key padding or for nothing"
            )
        if not isinstance(scale, int | float):
            raise _Refused("its scale is computed by the graph")
        out = _output_of(node)
    except _Refused as reason:
        return unsupported(
            node, library, f"attention is computed by {library}: {reason}; {_NATIVE}"
        )
    sketch = Sketch(out)
    return sketch.attention(
        out, library, _three([query, key, value]), lambda n: n, scale=float(scale)
    )


def _body(module: fx.GraphModule, node: object) -> fx.Graph | None:
    inner = getattr(module, str(node.target), None) if isinstance(node, fx.Node) else None
    return inner.graph if isinstance(inner, fx.GraphModule) else None


def _returned(graph: fx.Graph) -> object:
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    return result[0] if isinstance(result, tuple | list) and len(result) == 1 else result


def _returns_scores(module: fx.GraphModule, score_mod: object) -> bool:
    graph = _body(module, score_mod)
    return graph is not None and _returned(graph) is next(iter(graph.nodes))


def _empty_blocks(module: fx.GraphModule, blocks: Any, query: object, key: object) -> bool:
    """Whether a block mask is the one block that flex_attention makes when it is given none."""
    graph = _body(module, blocks[-1])
    if graph is None:
        return False
    result = _returned(graph)
    always = isinstance(result, fx.Node) and (
        op_name(result) in ("new_ones", "ones")
        or (op_name(result) in ("full", "new_full") and result.args[-1] in (True, 1))
    )
    count, index, sizes = blocks[2], blocks[3], blocks[-3:-1]
    one = isinstance(count, fx.Node) and op_name(count) == "ones" and _is_one(count)
    first = isinstance(index, fx.Node) and op_name(index) == "zeros" and _is_one(index)
    whole = all(isinstance(s, int) and s >= 1 << 20 for s in sizes)
    lengths = [(shape(n) or [0] * 4)[2] for n in (query, key)]
    fits = all(not isinstance(n, int) or n <= min(sizes) for n in lengths)
    return always and one and first and whole and fits and blocks[4] is None


def _is_one(node: fx.Node) -> bool:
    return all(same(s, 1) for s in shape(node) or [0])


def _read_multihead(node: fx.Node, library: str) -> AttentionCall:
    """`F.multi_head_attention_forward`: its projections become nodes around an SDPA call."""
    given = arguments_of(node)
    query, key, value = (given[n] for n in ("query", "key", "value"))
    heads, width = given["num_heads"], given["embed_dim_to_check"]
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if given[name] is not None:
            raise _Refused(f"it has {name}")
    if given["add_zero_attn"]:
        raise _Refused("it has add_zero_attn")
    if given["attn_mask"] is not None or given["is_causal"]:
        raise _Refused("it has an attn_mask")
    sizes = shape(query)
    if sizes is None or len(sizes) != 3 or not isinstance(heads, int):
        raise _Refused("it has no batch axis")
    if not isinstance(width, int) or width % heads:
        raise _Refused("its width is not a number of heads")
    out = _output_of(node)
    sketch = Sketch(out)
    mask = _padding(sketch, given["key_padding_mask"])
    q, k, v = (
        sketch.call("permute", sketch.call("unflatten", n, 2, (heads, -1)), 1, 2, 0, 3)
        for n in _projections(sketch, given, (query, key, value), width)
    )
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]

    def restore(n: fx.Node) -> fx.Node:
        flat = sketch.call("flatten", sketch.call("permute", n, 2, 0, 1, 3), 2)
        return sketch.call(F.linear, flat, weight, bias)

    dropout = float(given["dropout_p"]) if given["training"] else 0.0
    return sketch.attention(out, library, (q, k, v), restore, mask=mask, dropout=dropout)


def _projections(
    sketch: Sketch, given: dict[str, Any], sources: tuple[fx.Node, ...], width: int
) -> list[fx.Node]:
    """Queries, keys and values of nn.MultiheadAttention, [N, B, E]."""
    bias = given["in_proj_bias"]
    separate = bool(given["use_separate_proj_weight"])
    if not separate and len(set(sources)) == 1:
        packed = sketch.call(F.linear, sources[0], given["in_proj_weight"], bias)
        chunks = sketch.call("chunk", packed, 3, -1)
        return [sketch.item(chunks, i) for i in range(3)]
    projected = []
    for i, (source, name) in enumerate(zip(sources, "qkv", strict=True)):
        rows = slice(i * width, (i + 1) * width)
        weight = (
            given[f"{name}_proj_weight"] if separate else sketch.item(given["in_proj_weight"], rows)
        )
        part = None if bias is None else sketch.item(bias, rows)
        projected.append(sketch.call(F.linear, source, weight, part))
    return projected


def _padding(sketch: Sketch, mask: object) -> fx.Node | None:
    """`key_padding_mask` ([B, N], True or -inf: not a key) as SDPA's mask, [B, 1, 1, N]."""
    if mask is None:
        return None
    value = example(mask)
    if not isinstance(mask, fx.Node) or not isinstance(value, torch.Tensor) or value.ndim != 2:
        raise _Refused("it has a key_padding_mask that is not [batch, tokens]")
    if value.dtype == torch.bool:
        keys: fx.Node | None = sketch.call(torch.logical_not, mask)
    else:
        keys = keys_that_take_part(sketch, mask)
    if keys is None:
        raise _Refused("it has an additive key_padding_mask; pass it as bool")
    return sketch.item(keys, (slice(None), None, None))
