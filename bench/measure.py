"""Phases, percentiles, weight copies: how one implementation is timed on one shape. No torch, no processes.

A round is one phase: a warm pass over the rotating set of weight copies, then measured passes of the same operator.
Rounds of all implementations alternate (the parent sees to that), so that a change of the machine's speed meets all
of them. A round's figure is the median over its samples, a row's figures are percentiles over its rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]

# A sample is long against the clock's own cost and short against a time slice.
SAMPLE_SECONDS = 200e-6
# A share of a level is left to inputs, outputs and whatever else runs.
LEVEL_SHARE = 0.75
# A set this many times the next inner level leaves nothing of itself there from one pass to the next.
INNER_FACTOR = 4
MAX_SET_BYTES = 1 << 30
# Weights in turn that no cache holds. A shared L3 may be larger than any share of it that one can have, so the set is
# given in bytes.
DRAM_SET_BYTES = 1_100_000_000


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) with linear interpolation between order statistics, as numpy's default."""
    if not values:
        raise ValueError("percentile: no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def level_of(weight_bytes: int, caches: Mapping[str, int]) -> str:
    """The innermost level that holds the weights with room to spare: "L1", "L2", "L3" or "DRAM"."""
    for level in ("L1", "L2", "L3"):
        if level in caches and weight_bytes <= LEVEL_SHARE * caches[level]:
            return level
    return "DRAM"


def copies_for(weight_bytes: int, caches: Mapping[str, int]) -> int:
    """How many copies rotate so that the weights are read from `level_of` them, and not from the level inside it."""
    level = level_of(weight_bytes, caches)
    inner = (
        [caches[name] for name in ("L1", "L2", "L3") if name in caches and name < level]
        if level != "DRAM"
        else (list(caches.values()))
    )
    if not inner or weight_bytes <= 0 or level == "L1":
        return 1
    copies = -(-INNER_FACTOR * max(inner) // weight_bytes)
    if level != "DRAM":
        copies = min(copies, int(LEVEL_SHARE * caches[level] // weight_bytes))
    return max(1, min(copies, MAX_SET_BYTES // weight_bytes))


def in_turn(build: Callable[..., Callable[[], Any]], weight_bytes: Callable[..., int]) -> Callable[..., Any]:
    """A builder whose call goes on to the next of as many weights as fill DRAM_SET_BYTES."""

    def build_all(**shape: int) -> Callable[[], Any]:
        calls = [build(**shape) for _ in range(-(-DRAM_SET_BYTES // weight_bytes(**shape)))]
        position = -1

        def call() -> Any:
            nonlocal position
            position = (position + 1) % len(calls)
            return calls[position]()

        return call

    return build_all


@dataclass(frozen=True)
class Plan:
    """How a (implementation, shape, malloc) spends its time."""

    rounds: int
    seconds: float  # measured time of a round
    warm_calls: int


def plan(one_call: float, copies: int, budget: float, rounds: int) -> Plan | None:
    """Spreads `budget` seconds over up to `rounds` rounds, given the time of a call.

    None: that call alone used the budget up, and is the measurement. Otherwise three rounds at least, so that
    percentiles mean something; a warm pass covers the set, but takes no more than half of the time.
    """
    if one_call > budget:
        return None
    per_round = budget / rounds
    # Slow calls: a warm pass over several copies would cost more than what it warms for.
    warm_calls = max(1, min(copies, int(per_round / 2 / max(one_call, 1e-9))))
    cost = (warm_calls + 1) * one_call
    return Plan(max(3, min(rounds, int(budget / max(cost, 1e-9)))), per_round, warm_calls)


@dataclass(frozen=True)
class Load:
    """Processor time so far: this process's, and everyone's (of the machine's cores)."""

    wall: float
    own: float
    busy: float | None  # None where /proc/stat does not exist


def read_load(clock: Clock = time.perf_counter) -> Load:
    busy: float | None = None
    try:
        with open("/proc/stat") as stat:
            # cpu user nice system idle iowait irq softirq steal ...: all but idle and iowait is time we can't have
            fields = [int(v) for v in stat.readline().split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        pass
    return Load(clock(), time.process_time(), busy)


@dataclass(frozen=True)
class Disturbance:
    """What others did during a burst, in cores' worth of time."""

    own: float
    others: float | None
    disturbed: bool


def disturbance(before: Load, after: Load, threads: int) -> Disturbance:
    """Was this burst disturbed? One thread: it did not get its core. More: anyone else ran, which stalls barriers."""
    wall = max(after.wall - before.wall, 1e-9)
    own = (after.own - before.own) / wall
    others = None
    if before.busy is not None and after.busy is not None:
        others = max(0.0, (after.busy - before.busy) / wall - own)
    if threads == 1:
        return Disturbance(own, others, own < 0.9)
    # /proc/stat counts in 10 ms steps: one step a core is no evidence.
    slack = 0.02 * threads / wall
    return Disturbance(own, others, others is not None and others > 0.1 + slack)


@dataclass(frozen=True)
class Burst:
    """One measured round."""

    seconds: float  # a call
    calls: int
    faults: float  # minor page faults a call
    load: Disturbance


def page_faults() -> int:
    """Minor page faults of this process so far; 0 where that can't be asked."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def burst(
    calls: Sequence[Callable[[], object]],
    seconds: float,
    warm_calls: int,
    threads: int = 1,
    clock: Clock = time.perf_counter,
) -> Burst:
    """One phase: `warm_calls` calls over the set, then samples of whole calls for `seconds`.

    Calls go round the copies without a gap, also from one sample to the next. The figure is the median sample, so a
    time slice lost to another process costs one sample and not the round.
    """
    position = 0
    start = clock()
    for _ in range(warm_calls):
        calls[position % len(calls)]()
        position += 1
    estimate = (clock() - start) / max(warm_calls, 1)
    per_sample = max(1, int(SAMPLE_SECONDS / max(estimate, 1e-9))) if estimate < SAMPLE_SECONDS else 1
    if per_sample > 1:  # whole passes, so that every sample holds the same mix of copies
        per_sample = -(-per_sample // len(calls)) * len(calls)

    samples: list[float] = []
    faults, before = page_faults(), read_load(clock)
    begin = clock()
    while True:
        order = [calls[(position + i) % len(calls)] for i in range(per_sample)]
        position += per_sample
        start = clock()
        for call in order:
            call()
        end = clock()
        samples.append((end - start) / per_sample)
        if end - begin >= seconds:
            break
    after = read_load(clock)
    n = len(samples) * per_sample
    return Burst(percentile(samples, 50), n, (page_faults() - faults) / n, disturbance(before, after, threads))
