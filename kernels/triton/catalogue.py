"""Every way in which the kernels are launched, for compiling them ahead of time.

Types and constants are those that `fpsc.kernels.triton.attention` and `prologue` launch with.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from fpsc.kernels.gluon import forward as gluon
from fpsc.kernels.triton import backward, backward_fp8, forward, pack, schedule
from fpsc.kernels.triton.configs import (
    BACKWARD,
    BLOCK,
    FP8_BACKWARD,
    Config,
    candidates,
    pack_warps,
    permutes_v,
)
from fpsc.kernels.triton.variants import CAPABILITIES, FP8_CAPABILITIES, Variant

HEAD_DIMS = (32, 64, 128, 256)  # padded
FP8_TILES = {f"{x}_ptr" for x in ("q", "k", "v", "y", "turned", "k_turned")}
OPERANDS = ("q", "k", "v")

FLOAT32 = {
    "partial_ptr", "mean_ptr", "v_scale_ptr", "q_scale_ptr", "shift_ptr", "scale_ptr",
    "largest_ptr", "lse_ptr", "delta_ptr", "lse2_ptr", "rstd_ptr", "offset_ptr", "norm_ptr",
    "tile_ptr", "row_ptr",
}  # fmt: skip
NUMBERS = {"scale", "softmax_scale", "epsilon"}
NOTHING_BEFORE = {
    "rstd_ptr": None, "weight_ptr": None, "bias_ptr": None, "cos_ptr": None, "sin_ptr": None,
    "NORM": 0, "ROTATION": 0, "NORM_STRIDE": 0, "WEIGHTS": 1, "WIDE": False,
}  # fmt: skip


def variants() -> Iterator[Variant]:
    """All of them, one for each capability; a name is unique on each."""
    for capability in CAPABILITIES:
        for dp in HEAD_DIMS:
            yield from _products(capability, "bf16", dp)
            yield from _gluon(capability, "bf16", dp)
        yield from _products(capability, "fp16", 128, first_only=True)
        yield from _prologue(capability)


def _products(
    capability: int, element: str, dp: int, first_only: bool = False
) -> Iterator[Variant]:
    """The kernels with matrix products, in every configuration offered."""
    cc = divmod(capability, 10)
    for kernel in ("fp8", "input", *BACKWARD, *FP8_BACKWARD):
        if kernel in ("fp8", *FP8_BACKWARD) and capability not in FP8_CAPABILITIES:
            continue
        orders = {permutes_v(cc), True} if kernel == "fp8" else {False}
        for permuted in sorted(orders):  # on Hopper also permuted, for measurements
            configs = candidates(kernel, cc, dp, permuted=permuted)
            for config in configs[:1] if first_only else configs:
                yield _product(kernel, capability, element, dp, config, permuted)
            if kernel == "fp8" and permuted == permutes_v(cc):
                yield _product(kernel, capability, element, dp, configs[0], permuted, offset=True)


def _product(
    kernel: str,
    capability: int,
    element: str,
    dp: int,
    config: Config,
    permuted: bool,
    offset: bool = False,
) -> Variant:
    """offset: it also leaves what a backward with FP8 products needs beside."""
    name = f"{kernel}-{element}-{dp}-{config.name}" + "-permuted" * permuted + "-offset" * offset
    arguments = config.arguments()
    options = {key: arguments.pop(key) for key in ("num_warps", "num_stages")}
    arguments |= {"D": dp, "DP": dp, "BLOCK": BLOCK}
    shared: dict[str, Any] = {
        "name": name,
        "options": options,
        "head_dim": dp,
        "capabilities": (capability,),
        "product": "fp8" if "fp8" in kernel else element,
    }
    if kernel in (*BACKWARD, *FP8_BACKWARD):
        function = getattr(backward if kernel in BACKWARD else backward_fp8, kernel)
        keys = config.BN if kernel.startswith("query") else config.BM
        if kernel in BACKWARD:
            signature = _signature(function, element, **arguments, SKIP_FP8=False)
        else:
            arguments |= {"EACH": 1} if kernel.startswith("key") else {}
            signature = _signature(function, element, **arguments)
            signature |= dict.fromkeys(FP8_TILES & signature.keys(), "*fp8e4nv:16")
        return Variant(kernel=function, signature=signature, role="backward", keys=keys, **shared)
    arguments |= {**config.schedule(), "FP8": kernel == "fp8", "visits_ptr": None}
    arguments["offset_ptr"] = "*fp32:16" if offset else None
    signature = _signature(forward.attend, element, PERMUTED=permuted, **arguments)
    if kernel == "fp8":
        signature |= {f"{x}_ptr": "*fp8e4nv:16" for x in OPERANDS}
    else:
        signature |= {"q_scale_ptr": None, "v_scale_ptr": None, "shift_ptr": None}
    return Variant(
        kernel=forward.attend,
        signature=signature,
        role="forward",
        keys=config.BN,
        specialised=config.specialise,
        **shared,
    )


def _gluon(capability: int, element: str, dp: int) -> Iterator[Variant]:
    """The Gluon kernel, where it serves."""
    configs = candidates("fp8_gluon", divmod(capability, 10), dp)
    for config, offset in product(configs, (False, True)):
        half = BLOCK // 2
        signature = _signature(
            gluon.attend, element, offset_ptr="*fp32:16" if offset else None, D=dp, DP=dp,
            STAGES=config.stages, PAIRS=config.BN > BLOCK,
            q_desc=_descriptor([half, dp]), k_desc=_descriptor([half // 2, 1, 2, dp]),
            v_desc=_descriptor([dp, BLOCK]),
        )  # fmt: skip
        yield Variant(
            name=f"fp8-{element}-{dp}-{config.name}" + "-offset" * offset,
            kernel=gluon.attend,
            signature=signature,
            options=config.launch(),
            role="forward",
            head_dim=dp,
            product="fp8",
            keys=config.BN,
            specialised=True,
            language="gluon",
            capabilities=(capability,),
        )


def _descriptor(block: list[int]) -> str:
    """The type of a tensor descriptor of e4m3, made on the host."""
    return f"tensordesc<fp8e4nv{block},{gluon.shared_layout(block)!r}>"


def _prologue(capability: int, element: str = "bf16", dp: int = 128) -> Iterator[Variant]:
    """The kernels around the products: one each for Q, K and V, plain and with all that is in
    front of them."""
    fp8 = capability in FP8_CAPABILITIES
    sizes = {"D": dp, "DP": dp, "BLOCK": BLOCK}
    turned = {
        "rstd_ptr": "*fp32:16", "weight_ptr": f"*{element}:16", "bias_ptr": None,
        "cos_ptr": "*fp32:16", "sin_ptr": "*fp32:16", "NORM": 2, "ROTATION": 1, "NORM_STRIDE": dp,
        "WEIGHTS": 1, "WIDE": False,
    }  # fmt: skip
    kinds = (False, True) if fp8 else (False,)
    plain: dict[str, Any] = {
        "options": {"num_warps": pack_warps(dp)}, "role": "prologue", "head_dim": dp,
        "capabilities": (capability,),
    }  # fmt: skip
    for operand, letter in enumerate(OPERANDS):
        for quantised in kinds:
            for before, suffix in ((NOTHING_BEFORE, ""), (turned, "-norm-rotation")):
                if operand == 2 and suffix:
                    continue
                out = "fp8e4nv" if quantised else element
                given = {
                    **sizes, **before, "y_ptr": f"*{out}:16", "meta_ptr": "*fp32:16",
                    "OPERAND": operand, "FP8": quantised,
                    "PERMUTED": quantised and operand == 2,
                }  # fmt: skip
                signature = _signature(pack.pack_tiles, element, **given)
                kind = "fp8" if quantised else "input"
                yield Variant(
                    name=f"pack-{letter}-{kind}-{element}-{dp}{suffix}",
                    kernel=pack.pack_tiles, signature=signature,
                    **plain | {"options": {"num_warps": pack_warps(dp, two=bool(suffix))}},
                )  # fmt: skip
    signature = _signature(pack.token_statistics, element, D=dp, DP=dp, ROWS=32)
    yield Variant(
        name=f"token-statistics-{element}-{dp}", kernel=pack.token_statistics, signature=signature,
        **plain,
    )  # fmt: skip
    signature = _signature(pack.compact_keys, element, BLOCK=BLOCK)
    yield Variant(name="compact-keys", kernel=pack.compact_keys, signature=signature, **plain)
    signature = _signature(pack.compact_lists, element, WIDTH=128)
    options = {**plain, "options": {"num_warps": 1}}
    yield Variant(name="compact-lists", kernel=pack.compact_lists, signature=signature, **options)
    signature = _signature(schedule.order_heads, element, WIDTH=64)
    yield Variant(name="order-heads", kernel=schedule.order_heads, signature=signature, **options)
    signature = _signature(schedule.count_classes, element, **schedule.WORK)
    yield Variant(name="count-classes", kernel=schedule.count_classes, signature=signature, **plain)
    work: dict[str, Any] = {**schedule.WORK, "COLUMNS": schedule.COLUMNS, "visits_ptr": None}
    signature = _signature(schedule.list_work, element, **work)
    yield Variant(name="list-work", kernel=schedule.list_work, signature=signature, **plain)
    around = {**plain, "role": "backward"}
    signature = _signature(backward.gradient_tiles, element, **sizes)
    yield Variant(
        name=f"gradient-tiles-{element}-{dp}", kernel=backward.gradient_tiles,
        signature=signature, **around,
    )  # fmt: skip
    if not fp8:
        return
    for before, suffix in ((NOTHING_BEFORE, ""), (turned, "-norm-rotation")):
        signature = _signature(pack.statistics, element, D=dp, DP=dp, ROWS=32, **before)
        yield Variant(
            name=f"statistics-{element}-{dp}{suffix}", kernel=pack.statistics,
            signature=signature, **plain,
        )  # fmt: skip
        signature = _signature(pack.group_maxima, element, **sizes, **before, OPERAND=1)
        yield Variant(
            name=f"group-maxima-{element}-{dp}{suffix}", kernel=pack.group_maxima,
            signature=signature,
            **plain | {"options": {"num_warps": pack_warps(dp, two=bool(suffix))}},
        )  # fmt: skip
    signature = _signature(pack.finish_statistics, element, DP=dp, ROWS=32)
    yield Variant(
        name=f"finish-statistics-{dp}", kernel=pack.finish_statistics, signature=signature, **plain
    )
    for operand, letter in enumerate(OPERANDS):
        signature = _signature(
            backward.widen_tiles, element, x_ptr="*fp8e4nv:16", DP=dp, BLOCK=BLOCK,
            OPERAND=operand, PERMUTED=operand == 2,
        )  # fmt: skip
        yield Variant(
            name=f"widen-{letter}-{element}-{dp}", kernel=backward.widen_tiles,
            signature=signature, **around,
        )  # fmt: skip
        signature = _signature(
            backward_fp8.turn_tiles, element, x_ptr="*fp8e4nv:16", y_ptr="*fp8e4nv:16", DP=dp,
            BLOCK=BLOCK, OPERAND=operand, PERMUTED=permutes_v(divmod(capability, 10)),
        )  # fmt: skip
        yield Variant(
            name=f"turn-{letter}-{dp}", kernel=backward_fp8.turn_tiles, signature=signature,
            **around,
        )  # fmt: skip
    signature = _signature(
        backward_fp8.quantise_gradients, element, **sizes, y_ptr="*fp8e4nv:16",
    )  # fmt: skip
    yield Variant(
        name=f"quantise-gradients-{element}-{dp}", kernel=backward_fp8.quantise_gradients,
        signature=signature, **around | {"options": {"num_warps": pack_warps(dp, two=True)}},
    )  # fmt: skip


def _signature(kernel: Any, element: str, **given: Any) -> dict[str, Any]:
    """Types of a kernel's arguments by their names; `given` are constants, or other types."""
    found: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in given:
            found[name] = given[name]
        elif name == "meta_ptr":
            found[name] = "*i64:16"
        elif name == "mask_ptr":
            found[name] = "*u8:16"
        elif name in FLOAT32:
            found[name] = "*fp32:16"
        elif name in NUMBERS:
            found[name] = "fp32"
        elif name.rpartition("_")[2] == "ptr" and name.partition("_")[0] in (
            "q", "k", "v", "x", "y", "out", "dout", "dq", "dk", "dv",
        ):  # fmt: skip
            found[name] = f"*{element}:16"
        elif name.rpartition("_")[2] in ("ptr", "idx"):
            found[name] = "*i32:16"
        elif (len(name) == 3 and name[1] == "_") or name.startswith(("dout_", "out_", "stride_")):
            found[name] = "i64"
        else:
            found[name] = "i32"
    return found
