"""The record of one (case, shape, implementation, malloc setting), and what follows from several of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import ceilings
from bench.registry import OURS, label

# No row can do more than a ceiling; one that is this far above it shows that the ceiling was measured under load.
CEILING_BROKEN = 1.1


@dataclass
class Row:
    """One line of the result. `seconds` is absent where `error` says why."""

    case: str
    shape: dict[str, int]
    name: str
    kind: str
    malloc: str
    threads: int
    unit: str
    seconds: dict[str, float] | None = None  # median, p20, p80 of a whole call
    value: float | None = None  # useful work a second in `unit`, at the median
    level: str | None = None  # where this implementation's weights lie
    weight_bytes: int | None = None
    copies: int | None = None
    rounds: int = 0
    calls: int = 0
    discarded: int = 0  # rounds thrown out because others disturbed them
    disturbed: bool = False  # no round was quiet: the figures are of disturbed ones
    own_cores: float | None = None  # processor time / wall time, median over rounds
    others_cores: float | None = None
    faults_per_call: float | None = None
    kernel_seconds: float | None = None  # the launch alone, without the dispatcher
    check: dict[str, Any] | None = None  # error, tolerance, measure, ok
    note: str | None = None  # what the implementation says of itself, such as the format that it chose
    error: str | None = None
    fractions: dict[str, float] = field(default_factory=dict)  # of ceilings: compute, read, vnni; "kernel_..." alike
    ceilings: dict[str, str] = field(default_factory=dict)  # their keys
    ratios: dict[str, float] = field(default_factory=dict)  # our rows: peer's time / ours
    compute: str | None = None
    work: float | None = None

    @property
    def label(self) -> str:
        return label(self.shape)

    @property
    def ok(self) -> bool:
        return self.seconds is not None

    @property
    def right(self) -> bool:
        """Timed, and its result passed the check; what only reads has none."""
        return self.ok and (self.kind == "read" or bool(self.check and self.check["ok"]))

    @property
    def kernel(self) -> float:
        """Seconds of the launch alone, as far as is known: no more than a whole call, which holds it."""
        return min(self.kernel_seconds or self.median, self.median)

    @property
    def median(self) -> float:
        if self.seconds is None:
            raise ValueError(f"{self.case} {self.label} {self.name}: no figures: {self.error}")
        return self.seconds["median"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def add_fractions(
    rows: Iterable[Row], values: Mapping[str, float], isa: str, cpu_level: str, peers_held: bool = False
) -> None:
    """Each row as a fraction of the compute ceiling of its kind and of the read bandwidth of its weights' level.

    Ours runs at `isa`, which may be capped; peers run at what the CPU has, int8 ones at `isa` where they are held to
    it. Our int8 under AMX is also given as a fraction of the VNNI ceiling, which is what AMX is there to pass.
    """
    peers = isa if peers_held else cpu_level
    levels = {"ours": isa, "held": "avx2", "fused": peers, "bare": peers}
    for row in rows:
        if row.seconds is None or row.kind == "threads":  # ceilings are those of the run's number of threads
            continue
        row.fractions, row.ceilings = {}, {}
        compute = ceilings.compute_ceiling(row.compute, levels.get(row.kind, cpu_level))
        if compute == "fma_avx2" and row.kind != "held" and "fma_avx512" in values:
            compute = "fma_avx512"  # AVX-512 without VNNI: no level of ours, but torch's fp32 uses it
        for prefix, seconds in (("", row.median), ("kernel_", row.kernel_seconds)):
            if not seconds:
                continue
            if compute is not None and compute in values and row.work:
                row.ceilings["compute"] = compute
                row.fractions[prefix + "compute"] = row.work / seconds / 1e9 / values[compute]
                if row.kind == "ours" and compute == "amx_int8" and "vnni_avx512" in values:
                    row.fractions[prefix + "vnni"] = row.work / seconds / 1e9 / values["vnni_avx512"]
            read = f"read_{row.level}"
            if read in values and row.weight_bytes:
                row.ceilings["read"] = read
                row.fractions[prefix + "read"] = row.weight_bytes / seconds / 1e9 / values[read]


def bound(row: Row) -> str | None:
    """Which ceiling is the nearer one: "compute" or "read"; None where neither is known."""
    known = {key: row.fractions[key] for key in ("compute", "read") if key in row.fractions}
    return max(known, key=lambda key: known[key]) if known else None


def add_ratios(rows: Sequence[Row]) -> None:
    """Our rows get the ratio of each peer's median to ours: above 1 we are faster."""
    for row in rows:
        if row.name != OURS:
            continue
        row.ratios = {
            other.name: other.median / row.median
            for other in rows
            if row.ok and other.ok and other.name != OURS and _same(other, row)
        }


def _same(a: Row, b: Row) -> bool:
    return (a.case, a.label, a.malloc, a.threads) == (b.case, b.label, b.malloc, b.threads)


def find(rows: Sequence[Row], like: Row, name: str) -> Row | None:
    """The row of another implementation at the same case, shape and malloc setting."""
    return next((row for row in rows if row.name == name and _same(row, like)), None)


def best(rows: Sequence[Row], like: Row, *kinds: str) -> Row | None:
    """The fastest peer of these kinds at the same place, wrong results left out."""
    found = [row for row in rows if row.kind in kinds and row.right and _same(row, like)]
    return min(found, key=lambda row: row.median, default=None)


def geomean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("geomean: no values")
    return math.exp(sum(math.log(v) for v in values) / len(values))
