"""Runs the source of a Gluon kernel on a CPU: its numbers, and its barriers under any schedule.

Gluon has no interpreter. Here its functions are executed as they stand, with other meanings of what
they call: a tensor is a NumPy array, layouts are nothing, and FP8 numbers are float32 that were
rounded. Each role of a program (`warp_specialize`) runs by itself until it meets a barrier, a copy
or a product; then a random number decides who goes on. Copies and products are finished at any time
after they were issued. What no schedule may do is an error that says who did it:

- `Deadlock`: all that is left waits, and for what;
- `Hazard`: memory read before a copy into it is complete, or written while a product reads it; a
  result used before anybody waited for it; a barrier with more arrivals than it counts.
"""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

UNSET = float("nan")


class Deadlock(Exception):
    """Nobody can go on."""


class Hazard(Exception):
    """What a schedule must not do."""


# ---- values


def e4m3(x: np.ndarray) -> np.ndarray:
    """Bytes of x to nearest even, finite."""
    rounded = torch.from_numpy(np.ascontiguousarray(x, np.float32)).clamp(-448, 448)
    return rounded.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def of_e4m3(x: np.ndarray) -> np.ndarray:
    """float32 of the bytes."""
    return torch.from_numpy(x.copy()).view(torch.float8_e4m3fn).float().numpy()


class Value:
    """A tensor or a number."""

    def __init__(self, x: Any) -> None:
        self.x = np.asarray(x)

    type = SimpleNamespace(layout=None)

    def __getitem__(self, key: Any) -> Value:
        return Value(self.x[key])

    def __index__(self) -> int:
        return int(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __neg__(self) -> Value:
        return Value(-self.x)

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.x.reshape(shape))

    def permute(self, order: list[int]) -> Value:
        return Value(self.x.transpose(order))

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        if isinstance(dtype, torch.dtype):  # of what is stored: rounded there
            return self
        if bitcast:
            return Value(self.x.view(dtype))
        return Value(self.x.astype(dtype))


def _operator(function: Callable[[Any, Any], Any]) -> Callable[[Value, Any], Any]:
    def apply(a: Value, b: Any) -> Any:
        return NotImplemented if isinstance(b, Pointer) else Value(function(a.x, raw(b)))

    return apply


def raw(x: Any) -> Any:
    return x.x if isinstance(x, Value) else x


for _name, _function in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide,
    "floordiv": np.floor_divide, "mod": np.mod, "and": np.bitwise_and, "rshift": np.right_shift,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}.items():  # fmt: skip
    setattr(Value, f"__{_name}__", _operator(_function))
    if _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
        swapped: Callable[[Any, Any], Any] = lambda a, b, function=_function: function(b, a)  # noqa: E731
        setattr(Value, f"__r{_name}__", _operator(swapped))


class Pointer:
    """Into a torch tensor, at one or many elements."""

    def __init__(self, tensor: torch.Tensor, at: Any = 0) -> None:
        self.tensor, self.at = tensor, np.asarray(at, np.int64)
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.tensor, self.at + raw(more))


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Value:
    at = pointer.at if mask is None else np.where(raw(mask), pointer.at, 0)
    flat = pointer.tensor.reshape(-1)
    if (at < 0).any() or (at >= len(flat)).any():
        raise Hazard(f"a load beyond the end of {tuple(pointer.tensor.shape)}")
    found = flat[torch.from_numpy(at)].numpy()
    return Value(found if mask is None else np.where(raw(mask), found, other).astype(found.dtype))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, x = np.broadcast_arrays(pointer.at, raw(value))
    real = np.broadcast_to(True if mask is None else raw(mask), at.shape)
    where = torch.from_numpy(at[real].astype(np.int64))
    # Results of attention are dense, but not contiguous: [B, H, N, D] of [B, N, H, D].
    storage = pointer.tensor.as_strided((pointer.tensor.numel(),), (1,))
    storage[where] = torch.from_numpy(x[real].astype(np.float32)).to(storage.dtype)


# ---- shared memory and barriers


@dataclass
class Slot:
    """A piece of shared memory that is copied at once, or part of one."""

    name: str
    copies: int = 0  # under way
    version: int = 0


class Memory:
    """A view of shared memory, and the slots that it is made of."""

    def __init__(self, x: np.ndarray, slots: list[Slot]) -> None:
        self.x, self.slots = x, slots

    def index(self, i: Any) -> Memory:
        each = len(self.slots) // len(self.x)
        first = int(i) * each
        return Memory(self.x[int(i)], self.slots[first : first + each])

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.x.transpose(order), self.slots)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Memory:
        return Memory(self.x.reshape(shape), self.slots)


@dataclass
class Barrier:
    """As PTX has it: a phase ends with all its arrivals and all its bytes."""

    name: str
    count: int = 0
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def update(self, arrivals: int = 0, expected: int = 0, copied: int = 0) -> None:
        self.pending -= arrivals
        self.bytes += expected - copied
        if self.pending < 0:
            raise Hazard(f"more than {self.count} arrivals in phase {self.phase} of {self.name}")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def completed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Barriers:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


@dataclass(eq=False)
class Product:
    """What `warpgroup_mma` gives: a result that is there after a wait."""

    compute: Callable[[], np.ndarray]
    slots: list[Slot]
    versions: list[int]
    result: Value | None = None

    def finish(self) -> None:
        if [slot.version for slot in self.slots] != self.versions:
            names = ", ".join(slot.name for slot in self.slots)
            raise Hazard(f"{names} was written while a product read it")
        self.result = Value(self.compute())


# ---- who runs when

Pause = tuple[Callable[[], bool], str]
"""What a role yields: whether it can go on, and what it waits for."""


def always() -> bool:
    return True


@dataclass
class Role:
    name: str
    steps: Iterator[Pause]
    ready: Callable[[], bool] = always
    waits_for: str = ""
    done: bool = False
    products: list[Product] = field(default_factory=list)

    def resume(self) -> None:
        try:
            self.ready, self.waits_for = next(self.steps)
        except StopIteration:
            self.done = True

    def finish_next(self) -> None:
        """Products of a warp group are finished in their order."""
        next(p for p in self.products if p.result is None).finish()


class Schedule:
    """The roles of one program. Whoever goes on is drawn, some more often than others."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.issued: list[str] = []  # by which role each product of two memories was
        self.role: Role

    def run(self, roles: list[Role]) -> None:
        kinds = [*(role.name for role in roles), "copy", "product"]
        often = {kind: self.random.expovariate(1.0) for kind in kinds}
        while not all(role.done for role in roles):
            options: list[tuple[float, Callable[[], None]]] = []
            for role in roles:
                if not role.done and role.ready():
                    options.append((often[role.name], partial(self._resume, role)))
                if any(product.result is None for product in role.products):
                    options.append((often["product"], role.finish_next))
            for n in range(len(self.copies)):
                options.append((often["copy"], partial(self._complete, n)))
            if not options:
                left = (f"{r.name} waits for {r.waits_for}" for r in roles if not r.done)
                raise Deadlock("; ".join(left))
            weights, steps = zip(*options, strict=True)
            self.random.choices(steps, weights)[0]()
        if self.copies:
            raise Hazard(f"{len(self.copies)} copies are under way at the end")

    def _resume(self, role: Role) -> None:
        self.role = role
        role.resume()

    def _complete(self, n: int) -> None:
        self.copies.pop(n)()


# ---- the language


class Emulator:
    """The names that a kernel's source uses, for one program."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs = program, programs
        self.schedule = Schedule(seed)
        self.allocations = 0

    def names(self) -> dict[str, Any]:
        nothing = lambda *_, **__: None  # noqa: E731
        gl = SimpleNamespace(
            constexpr=lambda x: x, int32=np.int32, int64=np.int64, uint32=np.uint32,
            float32=np.float32, float8e4nv="e4m3", load=load, store=store,
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs,
            static_range=range, static_assert=_assert,
            arange=lambda first, end, layout: Value(np.arange(first, end)),
            full=lambda shape, x, dtype, layout: Value(np.full(shape, x, dtype)),
            zeros=lambda shape, dtype, layout: Value(np.zeros(shape, dtype)),
            sum=lambda x, axis: Value(x.x.sum(axis, dtype=np.float32)),
            max=lambda x, axis: Value(np.fmax.reduce(x.x, axis)),
            maximum=_both(np.fmax), minimum=_both(np.minimum),
            exp2=lambda x: Value(np.exp2(x.x)), log2=lambda x: Value(np.log2(x.x)),
            ceil=lambda x: Value(np.ceil(x.x)),
            where=where,
            split=lambda x: (Value(x.x[..., 0]), Value(x.x[..., 1])),
            convert_layout=lambda x, layout, assert_trivial=False: x,
            inline_asm_elementwise=assembler,
            allocate_shared_memory=self.allocate, warp_specialize=self.specialise,
            NVMMADistributedLayout=nothing, NVMMASharedLayout=nothing, DotOperandLayout=nothing,
            SliceLayout=nothing, BlockedLayout=nothing, DistributedLinearLayout=nothing,
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            MBarrierLayout=nothing, init=self.init, wait=self.wait, expect=self.expect,
            arrive=self.arrive,
        )  # fmt: skip
        return {
            "gluon": SimpleNamespace(jit=lambda function: function),
            "gl": gl,
            "mbarrier": mbarrier,
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.await_products,
        }

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Memory | Barriers:
        self.allocations += 1
        name = f"allocation {self.allocations}"
        if dtype is np.int64:
            return Barriers([Barrier(f"{name}[{i}]") for i in range(shape[0])])
        slots = [Slot(f"{name}[{i}]") for i in range(shape[0])]
        return Memory(np.full(shape, UNSET, np.float32), slots)

    def specialise(self, roles: list[tuple[Any, tuple[Any, ...]]], *_: Any) -> None:
        self.schedule.run(
            [
                Role(f"{function.__name__} {n}", function(*given))
                for n, (function, given) in enumerate(roles)
            ]
        )

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    # What follows is called by `yield from`: see `functions`.

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> Iterator[Pause]:
        if pred:
            parity = int(phase)
            yield partial(barrier.completed, parity), f"parity {parity} of {barrier.name}"

    def expect(self, barrier: Barrier, bytes: int) -> Iterator[Pause]:
        yield always, ""
        barrier.update(arrivals=1, expected=bytes)

    def arrive(self, barrier: Barrier, count: int, pred: Any = True) -> Iterator[Pause]:
        yield always, ""
        if pred:
            barrier.update(arrivals=count)

    def copy(
        self, source: Any, coordinates: list[Any], barrier: Barrier, target: Memory
    ) -> Iterator[Pause]:
        yield always, ""
        block = tuple(
            slice(int(at), int(at) + size)
            for at, size in zip(coordinates, source.block_shape, strict=True)
        )
        data = source.base[block].float().numpy()
        if data.shape != target.x.shape:
            raise Hazard(f"a copy of {data.shape} into {target.x.shape}, at {coordinates}")
        for slot in target.slots:
            slot.copies, slot.version = slot.copies + 1, slot.version + 1
        target.x[...] = UNSET

        def complete() -> None:
            target.x[...] = data
            for slot in target.slots:
                slot.copies -= 1
            barrier.update(copied=math.prod(data.shape))

        self.schedule.copies.append(complete)

    def multiply(
        self, a: Value | Memory, b: Memory, acc: Value | Product, use_acc: bool = True,
        is_async: bool = False,
    ) -> Generator[Pause, None, Product]:  # fmt: skip
        yield always, ""
        assert is_async, "what the kernel uses"
        slots = [*b.slots, *(a.slots if isinstance(a, Memory) else [])]
        for slot in slots:
            if slot.copies or slot.version == 0:
                raise Hazard(f"{slot.name} is read before a copy into it is complete")

        def compute() -> np.ndarray:
            before = acc.result if isinstance(acc, Product) else acc
            return a.x @ b.x + (raw(before) if use_acc else 0.0)

        product = Product(compute, slots, [slot.version for slot in slots])
        self.schedule.role.products.append(product)
        if isinstance(a, Memory):
            self.schedule.issued.append(self.schedule.role.name)
        return product

    def await_products(
        self, outstanding: int, deps: tuple[Product, ...]
    ) -> Generator[Pause, None, Any]:
        yield always, ""
        products = self.schedule.role.products
        while len(products) > outstanding:
            if products[0].result is None:
                products[0].finish()
            products.pop(0)
        if any(product in products for product in deps):
            raise Hazard("a result is used before it was waited for")
        results = tuple(product.result for product in deps)
        return results[0] if len(results) == 1 else results


def where(condition: Any, a: Any, b: Any) -> Value:
    a, b = (np.float32(x) if isinstance(x, float) else raw(x) for x in (a, b))
    return Value(np.where(raw(condition), a, b))


def _assert(condition: bool) -> None:
    assert condition


def _both(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        found = function(raw(a), raw(b))
        return Value(found) if isinstance(a, Value) or isinstance(b, Value) else found

    return apply


_CONVERT = re.compile(r"cvt\.rn\.satfinite\.e4m3x2\.f32 (\w+), \$(\d), \$(\d);")
_JOIN = re.compile(r"mov\.b32 \$0, \{(\w+), (\w+)\};")


def assembler(
    text: str, constraints: str, given: list[Value], dtype: Any, is_pure: bool, pack: int
) -> Value:
    """The two pieces of PTX that there are: four numbers into a register, and out of one."""
    if pack == 4:
        assert text == "mov.b32 $0, $1;" and dtype == "e4m3"
        words = given[0].x  # a register holds neighbours of the last dimension
        assert words.shape[-1] == 4 and (words == words[..., :1]).all()
        return Value(
            of_e4m3(np.ascontiguousarray(words[..., 0], np.int32)[..., None].view(np.uint8))
        )
    halves = {name: (int(low), int(high)) for name, high, low in _CONVERT.findall(text)}
    order = [n for name in _JOIN.findall(text)[0] for n in halves[name]]
    quads = np.stack([e4m3(given[n - 1].x) for n in order], -1)
    return Value(np.ascontiguousarray(quads).view(np.int32)[..., 0])


# ---- kernels


PAUSING = {"warpgroup_mma", "warpgroup_mma_wait"}
PAUSING_METHODS = {"wait", "expect", "arrive", "async_copy_global_to_shared"}


class _Pausing(ast.NodeTransformer):
    """Functions become generators, and calls of what may pause `yield from`."""

    def __init__(self, defined: set[str]) -> None:
        self.defined = defined

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func
        pauses = (
            called.id in self.defined | PAUSING
            if isinstance(called, ast.Name)
            else isinstance(called, ast.Attribute) and called.attr in PAUSING_METHODS
        )
        return ast.copy_location(ast.YieldFrom(node), node) if pauses else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(1, ast.parse("yield from ()").body[0])  # behind the docstring
        return node


@cache
def _compiled(source: str) -> Any:
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.ImportFrom) and node.module != "__future__")
    ]
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    tree = ast.fix_missing_locations(_Pausing(defined).visit(tree))
    return compile(tree, "<emulated kernel>", "exec")


def functions(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """The functions of a kernel's source, with these meanings of what it imports."""
    found = dict(names)
    exec(_compiled(source), found)
    return found


def run(
    source: str, kernel: str, grid: int, args: tuple[Any, ...], seed: int = 0, **constants: int
) -> list[list[str]]:
    """All programs of a launch, one after another: they share nothing. Writes into args.

    Returns for each program which role issued its products of two memories, in their order.
    """
    issued = []
    for program in range(grid):
        emulator = Emulator(program, grid, seed + program)
        function = functions(source, emulator.names())[kernel]
        with np.errstate(all="ignore"):
            for _ in function(*(_argument(x) for x in args), **constants):
                pass
        issued.append(emulator.schedule.issued)
    return issued


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    return np.float32(x) if isinstance(x, float) else x


@contextmanager
def emulated(monkeypatch: Any, module: Any, kernel: Any, source: str) -> Iterator[None]:
    """Within, `module.launch` of this Gluon kernel runs it here."""
    launch = module.launch

    def instead(function: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if function is not kernel:
            launch(function, grid, *args, **options)
            return
        constants = {k: v for k, v in options.items() if k not in ("num_warps", "maxnreg")}
        run(source, kernel.fn.__name__, grid[0], args, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", instead)
        yield
