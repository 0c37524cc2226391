"""Cases and peers, registered by decorators; nothing here imports torch or knows a family.

A *case* is our own operator on a list of shapes; a *peer* is another implementation of the same case. Both are
builders: called with a shape they allocate their operands and return a callable without arguments. The harness calls
a builder once per weight copy (see `measure.copies_for`), so whatever lies in the builder's closure is one copy;
inputs that all copies share come from a cached helper of the family.

    @case("int8_mm", shapes=grid(m=[64], k=[768], n=[768]), unit="GOP/s", work=lambda m, k, n: 2 * m * n * k)
    def ours(m, k, n): a, b = ...; return lambda: ops.int8_mm(a, b)

    @peer("int8_mm", "torch._int_mm", kind="bare")
    def theirs(m, k, n): a, b = ...; return lambda: torch._int_mm(a, b)
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

Shape = Mapping[str, int]
Call = Callable[[], Any]
Builder = Callable[..., Call]
BuilderT = TypeVar("BuilderT", bound=Builder)

# What a row is compared as. "held" rows run under an environment that caps their ISA, "threads" rows are ours with more
# threads than the run, "read" rows read our bytes and compute nothing; they serve bars of their own.
Kind = Literal["ours", "fused", "bare", "fp32", "held", "threads", "read"]
# Which compute ceiling a row is held against.
Compute = Literal["int8", "fp32"]

OURS = "fastsparse"
MALLOCS = ("default", "keep")


@dataclass(frozen=True)
class Check:
    """A result held against the oracle: `error` in the stated measure, at most `tolerance`."""

    error: float
    tolerance: float
    measure: str

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NaN is not ok


@dataclass(frozen=True)
class Implementation:
    """Ours or a peer, for one case."""

    name: str
    kind: Kind
    build: Builder
    compute: Compute | None = None
    # Bytes of one copy of the weights as this implementation reads them; decides copies and level.
    weight_bytes: Callable[..., int] | None = None
    check: Callable[..., Check] | None = None  # check(result, **shape)
    available: Callable[[], str | None] | None = None  # None, or why not; asked in the worker
    kernel_time: Callable[..., float | None] | None = None  # kernel_time(repeats, copies, **shape) -> seconds a launch
    env: Mapping[str, str] = field(default_factory=dict)
    beyond_avx2: bool = False  # runs only on a CPU that has more than AVX2
    mallocs: Sequence[str] = MALLOCS
    threads: int | None = None  # more than the run's own; measured in one-thread runs only, where the cores are there
    wants: Callable[..., bool] = lambda **_: True  # wants(**shape): it is measured at this shape
    share: float = 1.0  # of the run's budget: what is there for orientation alone needs less
    note: Callable[..., str | None] | None = None  # note(**shape): what to say beside its figure; asked in the worker


@dataclass
class Case:
    """One operator on a list of shapes, with every implementation of it."""

    name: str
    shapes: Sequence[Shape]
    unit: str
    work: Callable[..., float] | None
    quick: Callable[..., bool]
    over: str  # the axis that a table's lines and a plot's x run over; the others make a panel
    break_even: str | None = None  # the dense peer that speed-ups over `zeros` are drawn and tabled against
    implementations: list[Implementation] = field(default_factory=list)

    def value(self, seconds: float, shape: Shape) -> float:
        """The figure people read: giga-operations (or gigabytes) of useful work a second, or microseconds a call."""
        return seconds * 1e6 if self.work is None else self.work(**shape) / seconds / 1e9


class RegistryError(ValueError):
    """A case or a peer that contradicts another, or a family that does not exist."""


_cases: dict[str, Case] = {}


def grid(**axes: Sequence[int]) -> list[dict[str, int]]:
    """All combinations of the axes; the first axis varies slowest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def label(shape: Shape) -> str:
    """`M=64 K=768 N=768`: what --only matches, after the case's name."""
    return " ".join(f"{axis.upper()}={value}" for axis, value in shape.items())


def case(
    name: str,
    shapes: Sequence[Shape],
    unit: str = "us",
    work: Callable[..., float] | None = None,
    quick: Callable[..., bool] = lambda **_: True,
    over: str = "m",
    break_even: str | None = None,
    **implementation: Any,
) -> Callable[[BuilderT], BuilderT]:
    """Registers a case together with our builder for it. `quick(**shape)` picks the shapes of a --quick run."""
    if (work is None) != (unit == "us"):
        raise RegistryError(f"case {name}: a unit other than 'us' needs work, and 'us' takes none, got unit={unit!r}")

    def register(build: BuilderT) -> BuilderT:
        if name in _cases:
            raise RegistryError(f"case {name} is registered twice")
        ours = Implementation(OURS, "ours", build, **implementation)
        _cases[name] = Case(name, shapes, unit, work, quick, over, break_even, [ours])
        return build

    return register


def peer(case: str, name: str, kind: Kind = "fused", **implementation: Any) -> Callable[[BuilderT], BuilderT]:
    """Registers another implementation of a case that exists already."""

    def register(build: BuilderT) -> BuilderT:
        if case not in _cases:
            raise RegistryError(f"peer {name}: case {case} is not registered; known: {', '.join(_cases) or 'none'}")
        if any(other.name == name for other in _cases[case].implementations):
            raise RegistryError(f"case {case} has a peer {name} already")
        _cases[case].implementations.append(Implementation(name, kind, build, **implementation))
        return build

    return register


def families() -> list[str]:
    """The families that have a file in bench/cases."""
    return sorted(p.stem for p in (Path(__file__).parent / "cases").glob("[!_]*.py"))


def load_family(family: str) -> dict[str, Case]:
    """Imports bench/cases/<family>.py, or the file itself if `family` ends in .py, and returns its cases."""
    _cases.clear()
    if family.endswith(".py"):
        path = Path(family)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise RegistryError(f"no family file {family}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    elif family in families():
        name = f"bench.cases.{family}"
        sys.modules.pop(name, None)  # importing again must register again
        importlib.import_module(name)
    else:
        raise RegistryError(f"no family {family!r}; known: {', '.join(families())}")
    return dict(_cases)
