"""Reads machine code: the blocks and loops of a listing by nvdisasm, and what one trip executes.

Nothing here knows Triton, and nothing here needs a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

# Tensor cores: Hopper's warpgroups, one warp, Blackwell's tensor memory.
TENSOR = frozenset(("QGMMA", "HGMMA", "QMMA", "HMMA", "OMMA", "UTCQMMA", "UTCHMMA", "UTCOMMA"))
EXP2 = "MUFU.EX2"

_LABEL = re.compile(r"^([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r'BRANCH_TARGETS ([^"]+)"')
# Opcodes whose first modifier says what they are; of all others, only the opcode is counted.
_TOLD_APART = frozenset(("MUFU", "SYNCS", "WARPGROUP", "BAR", "USETMAXREG", "F2FP"))
_JUMPS = frozenset(("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "EXIT", "RET", "KILL", "BSYNC"))


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers
    operands: str
    guard: str  # the predicate that it is executed under, or ""

    @cached_property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @cached_property
    def short(self) -> str:
        """What a histogram counts it as."""
        if self.kind not in _TOLD_APART:
            return self.kind
        if self.kind == "F2FP":  # the type that it packs into is somewhere among the modifiers
            packed = re.search(r"E4M3|E5M2|BF16|F16", self.opcode)
            return f"F2FP.{packed.group()}" if packed else "F2FP"
        return ".".join(self.opcode.split(".")[:2])


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after another, and the blocks that may come next."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: the block where it is entered, and all blocks that lead back to it."""

    header: int
    body: frozenset[int]


class Code:
    """The control flow of a listing (`nvdisasm -c`)."""

    def __init__(self, listing: str) -> None:
        self.blocks, self._entries = _blocks(listing)

    @property
    def instructions(self) -> Iterable[Instruction]:
        return (i for block in self.blocks for i in block.instructions)

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """Of every block that can be reached: the blocks that every way to it passes."""
        order: list[int] = []
        seen: set[int] = set()
        stack = [(entry, False) for entry in reversed(self._entries)]
        while stack:
            block, done = stack.pop()
            if done:
                order.append(block)
            elif block not in seen:
                seen.add(block)
                stack.append((block, True))
                stack += [(s, False) for s in self.blocks[block].successors if s not in seen]
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for successor in self.blocks[block].successors:
                before[successor].append(block)
        found = {block: {block} if block in self._entries else set(order) for block in order}
        changed = True
        while changed:
            changed = False
            for block in reversed(order):
                if block in self._entries:
                    continue
                new = set.intersection(*(found[b] for b in before[block])) | {block}
                changed |= new != found[block]
                found[block] = new
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        before: dict[int, list[int]] = {}
        latches: dict[int, list[int]] = {}
        for block, dominators in self._dominators.items():
            for successor in self.blocks[block].successors:
                before.setdefault(successor, []).append(block)
                if successor in dominators:
                    latches.setdefault(successor, []).append(block)
        loops = []
        for header, stack in sorted(latches.items()):
            body = {header}
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack += before[block]
            loops.append(Loop(header, frozenset(body)))
        return loops

    def _holds(self, loop: Loop) -> tuple[bool, bool]:
        """Whether a loop has matrix products and exponentials, outside the loops within it."""
        inner = [other.body for other in self.loops if other.body < loop.body]
        blocks = loop.body.difference(*inner)
        own = [i for block in blocks for i in self.blocks[block].instructions]
        return any(i.kind in TENSOR for i in own), any(i.short == EXP2 for i in own)

    def hot_loop(self) -> list[Instruction] | None:
        """What a warp executes in one trip through the hot loop; None where there is none.

        That is the innermost loop with matrix products and exponentials. Where other warps start
        the products (specialised, on sm_100), it is the one with the exponentials; in a kernel
        without these, the one with products. Of several (each group of warps has its copy), the
        one with the most exponentials, then the longest.
        """
        if not any(i.kind in TENSOR for i in self.instructions):
            return None
        held = {loop: self._holds(loop) for loop in self.loops}
        for products, exponentials in ((True, True), (False, True), (True, False)):
            found = [
                loop
                for loop, (has_products, has_exponentials) in held.items()
                if has_products >= products and has_exponentials >= exponentials
            ]
            innermost = [a for a in found if not any(b.body < a.body for b in found)]
            if innermost:
                trips = [self.trip(loop) for loop in innermost]
                return max(trips, key=lambda t: (sum(i.short == EXP2 for i in t), len(t)))
        return None

    def trip(self, loop: Loop) -> list[Instruction]:
        """The longest way through a loop, each inner loop taken once.

        A wait succeeds at its first try: the block that tries again is left out where it stands
        beside the way.
        """
        body = set(loop.body)
        for inner in self.loops:
            waits = any(
                "TRYWAIT" in i.opcode for b in inner.body for i in self.blocks[b].instructions
            )
            if inner.body < loop.body and waits and not any(self._holds(inner)):
                without = body - inner.body
                if self._longest(loop, without):
                    body = without
        return [i for block in self._longest(loop, body) for i in self.blocks[block].instructions]

    def _longest(self, loop: Loop, body: set[int]) -> list[int]:
        """The way from the header back to it with the most instructions; [] where there is none."""
        known: dict[int, tuple[int, list[int]] | None] = {}

        def longest(block: int) -> tuple[int, list[int]] | None:
            if block in known:
                return known[block]
            ways: list[tuple[int, list[int]]] = []
            for successor in self.blocks[block].successors:
                if successor == loop.header:
                    ways.append((0, []))
                elif successor in body and successor not in self._dominators[block]:
                    way = longest(successor)
                    if way is not None:
                        ways.append(way)
            best = max(ways, key=lambda way: way[0], default=None)
            if best is not None:
                best = (best[0] + len(self.blocks[block].instructions), [block, *best[1]])
            known[block] = best
            return best

        found = longest(loop.header) if loop.header in body else None
        return found[1] if found else []


def _blocks(listing: str) -> tuple[list[Block], list[int]]:
    """The blocks of a listing, and which of them are the entries of functions."""
    instructions: list[Instruction] = []
    places: dict[str, int] = {}  # label -> index of the instruction after it
    targets: list[list[str]] = []  # of each instruction
    reconverge: dict[str, str] = {}  # barrier -> where the threads meet that wait at it
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            guard, opcode, operands = found.groups()
            instruction = Instruction(opcode, operands, guard or "")
            names = _TARGET.findall(operands)
            if listed := _TARGETS.search(line):
                names = listed[1].split(",")
            if instruction.kind == "BSSY":
                reconverge[operands.partition(",")[0]] = names[0]
            elif instruction.kind == "BSYNC":
                names = [reconverge[operands.split()[0]]]
            instructions.append(instruction)
            targets.append(names)
    leaders = {0, *places.values()}
    leaders |= {
        n + 1
        for n, (i, names) in enumerate(zip(instructions, targets, strict=True))
        if i.kind in _JUMPS or _leaves_by_call(i, names)
    }
    starts = sorted(n for n in leaders if n < len(instructions))
    number = {start: n for n, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        names = _following(instructions[end - 1], targets[end - 1])
        next_ = {end if name is None else places[name] for name in names}
        successors = {number[n] for n in next_ if n in number}  # padding closes a listing
        blocks.append(Block(tuple(instructions[start:end]), tuple(sorted(successors))))
    entries = {number[n] for name, n in places.items() if name[:2] != ".L" and n in number}
    return blocks, sorted(entries)


def _following(last: Instruction, targets: list[str]) -> list[str | None]:
    """The labels that may follow the end of a block; None stands for the next instruction."""
    if _leaves_by_call(last, targets):
        return [*targets, None] if last.guard else list(targets)
    if last.kind not in _JUMPS or ".DIV" in last.opcode:  # BRA.DIV: a warp that has diverged
        return [None]
    if last.kind in ("EXIT", "RET", "KILL"):
        targets = []
    elif not targets:
        raise ValueError(f"expected the targets of {last.opcode} {last.operands}, found none")
    # `@P0 BRA`, or `BRA.U UP0, ...`: the predicate may stand before the instruction or in it.
    conditional = last.guard or (last.kind == "BRA" and not last.operands.startswith("`"))
    return [*targets, None] if conditional else list(targets)


def _leaves_by_call(instruction: Instruction, targets: list[str]) -> bool:
    """A call of a label within the function is a jump; from another function it returns."""
    return instruction.kind == "CALL" and any(name.startswith(".L") for name in targets)


def count(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How often each kind of instruction occurs, the most frequent first."""
    counts = Counter(i.short for i in instructions)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
