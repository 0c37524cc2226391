"""The child process: one implementation, many shapes. JSON lines in on stdin, one JSON line back for each on stdout.

    {"do": "setup", "case": "int8_linear", "shape": {...}, "budget": 0.8, "rounds": 7}
        -> {"ok": true, "copies": 4, "level": "L3", "one_call": 1e-4, "check": {...}, ...}
         | {"unavailable": "why"} | {"error": "why"}
    {"do": "round"} -> {"seconds": ..., "calls": ..., "faults": ..., "own": ..., "others": ..., "disturbed": ...}
    {"do": "drop"}  -> {"ok": true}       forgets the shape
    end of input    -> the process ends

Between messages it sleeps in a read, so idle implementations do not disturb the one that is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench import machine, measure
from bench.registry import Call, Case, Check, Implementation, load_family

# Beyond this the fixed cost of a call is under a tenth of it: 4 us, or 27 where weights push the interpreter out of L2.
KERNEL_TIME_BELOW = 3e-4
KERNEL_TIMINGS = 9
PATIENCE = 4  # budgets that a first call may take for a second one to follow


class Worker:
    """Holds the operands of one shape at a time."""

    def __init__(self, cases: dict[str, Case], name: str, threads: int) -> None:
        self.cases, self.name, self.threads = cases, name, threads
        self.reasons: dict[str, str | None] = {}
        self.drop()

    def drop(self) -> dict[str, Any]:
        self.calls: list[Call] = []
        self.plan: measure.Plan | None = None
        self.implementation: Implementation | None = None
        self.shape: dict[str, int] = {}
        gc.collect()
        return {"ok": True}

    def setup(self, case: str, shape: dict[str, int], budget: float, rounds: int) -> dict[str, Any]:
        """Builds the copies, checks the first result, plans the rounds."""
        self.drop()
        implementation = next(i for i in self.cases[case].implementations if i.name == self.name)
        if case not in self.reasons:
            self.reasons[case] = self.cores_missing() or (
                implementation.available() if implementation.available else None
            )
        if self.reasons[case]:
            return {"unavailable": self.reasons[case]}

        weight_bytes = implementation.weight_bytes(**shape) if implementation.weight_bytes else 0
        caches = machine.caches()
        copies = measure.copies_for(weight_bytes, caches)
        call = implementation.build(**shape)
        start = time.perf_counter()
        result = call()
        one_call = time.perf_counter() - start
        check: Check | None = implementation.check(result, **shape) if implementation.check else None
        del result
        if one_call < PATIENCE * budget:  # the second call is without one-time costs, which may exceed a budget
            start = time.perf_counter()
            call()
            one_call = time.perf_counter() - start
            self.plan = measure.plan(one_call, copies, budget, rounds)
        self.calls = [call] + [implementation.build(**shape) for _ in range(copies - 1 if self.plan else 0)]
        self.implementation, self.shape = implementation, shape
        return {
            "ok": True,
            "one_call": one_call,
            "copies": len(self.calls),
            "level": measure.level_of(weight_bytes, caches) if weight_bytes else None,
            "weight_bytes": weight_bytes or None,
            "rounds": self.plan.rounds if self.plan else 0,
            "check": {**asdict(check), "ok": check.ok} if check else None,
            "note": implementation.note(**shape) if implementation.note else None,
        }

    def cores_missing(self) -> str | None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return None if self.threads <= cores else f"needs {self.threads} cores, this process may use {cores}"

    def round(self) -> dict[str, Any]:
        if self.plan is None or self.implementation is None:
            return {"error": "round without a shape"}
        b = measure.burst(self.calls, self.plan.seconds, self.plan.warm_calls, self.threads)
        found = {"seconds": b.seconds, "calls": b.calls, "faults": b.faults, **asdict(b.load), "kernel": None}
        kernel_time = self.implementation.kernel_time
        if kernel_time is not None and b.seconds < KERNEL_TIME_BELOW:
            # Several short timings and their median, as with whole calls: one long one would hold others' time slices.
            repeats = max(len(self.calls), int(self.plan.seconds / 4 / KERNEL_TIMINGS / b.seconds))
            times = [kernel_time(repeats, len(self.calls), **self.shape) for _ in range(KERNEL_TIMINGS)]
            known = [t for t in times if t is not None]
            found["kernel"] = measure.percentile(known, 50) if known else None
        return found

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        do = message.pop("do")
        handlers: dict[str, Callable[..., dict[str, Any]]]
        handlers = {"setup": self.setup, "round": self.round, "drop": self.drop}
        try:
            return handlers[do](**message)
        except Exception as e:  # a peer that raises is a row, whatever it raises
            self.drop()
            return {"error": machine.scrub(f"{type(e).__name__}: {e}")[:500]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.worker")
    parser.add_argument("--family", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    # Answers go to a private copy of stdout; what a library prints goes to stderr and can't garble them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        cases = load_family(options.family)
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(options.threads)
        worker = Worker(cases, options.name, options.threads)
        hello = {"ok": True}
    except Exception as e:
        hello = {"error": machine.scrub(f"{type(e).__name__}: {e}")}  # type: ignore[dict-item]
    print(json.dumps(hello), file=answers, flush=True)
    if "error" in hello:
        return
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
