"""Who takes part in a case; who does not is in its results, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fpsc.bench.record import Result, Role, Status
from fpsc.bench.subject import Sized

LEFT_OUT = "this case leaves it out, to be short"


@dataclass(frozen=True)
class Absent:
    """A contender that cannot take part, and why."""

    name: str
    role: Role
    reason: str


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def role(self) -> Role: ...


C = TypeVar("C", bound=Contender)


def admitted(field: Iterable[C | Absent], case: Sized, results: dict[str, Result]) -> Iterator[C]:
    """Those of a field that are here and that the case asks for; `results` gets the others."""
    for contender in field:
        if isinstance(contender, Absent):
            results[contender.name] = left(contender, Status.absent, contender.reason)
        elif not asked_for(contender, case):
            results[contender.name] = left(contender, Status.skipped, LEFT_OUT)
        else:
            yield contender


def asked_for(contender: Contender, case: Sized) -> bool:
    """Whether a case wants a contender; ours always take part."""
    if contender.role is Role.fpsattn:
        return True
    if case.spec.contenders:
        return contender.name in case.spec.contenders
    return case.spec.gather or not contender.name.startswith("gather")


def left(contender: Contender, status: Status, reason: str) -> Result:
    """The result of one that was not timed."""
    return Result(name=contender.name, role=contender.role, status=status, reason=reason)


def first_line(error: object) -> str:
    """Of what an error says, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
