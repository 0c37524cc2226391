"""Runs the cases: one child process per (implementation, malloc setting), rounds of all of them in turn."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.measure import percentile
from bench.registry import MALLOCS, Case, Implementation, Shape, label
from bench.rows import Row

# "keep" makes glibc hold on to freed memory: without it an operator that returns large tensors is timed with the page
# faults of its output. Both are reported.
TUNABLES = {
    "default": None,
    "keep": f"glibc.malloc.mmap_threshold={1 << 30}:glibc.malloc.trim_threshold={4 << 30}",
}


@dataclass(frozen=True)
class Settings:
    """How much time a run takes."""

    family: str
    threads: int = 1
    rounds: int = 5
    budget: Mapping[str, float] = field(default_factory=lambda: {"default": 0.5, "keep": 0.25})
    mallocs: Sequence[str] = MALLOCS
    quick: bool = False
    only: str | None = None
    # What caps the peers where FASTSPARSE_ISA caps us: see machine.hold.
    hold: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 180.0  # seconds without an answer after which a child is given up


class ChildDied(RuntimeError):
    """The child ended, or was ended because it did not answer."""


class Child:
    """One implementation's process. Messages and answers are JSON lines, see bench/worker.py."""

    def __init__(
        self, name: str, malloc: str, env: Mapping[str, str], settings: Settings, threads: int | None = None
    ) -> None:
        self.name, self.malloc, self.settings = name, malloc, settings
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        count = str(threads or settings.threads)
        environment.update(OMP_NUM_THREADS=count, MKL_NUM_THREADS=count, MKL_DYNAMIC="FALSE")
        environment.update(env)
        environment.setdefault("PYTHONWARNINGS", "ignore")
        tunables = TUNABLES[malloc]
        if tunables is not None:
            environment["GLIBC_TUNABLES"] = tunables
        command = [sys.executable, "-m", "bench.worker", "--family", settings.family, "--name", name]
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close()
        self.process = subprocess.Popen(
            [*command, "--threads", count],
            cwd=machine.ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)  # a pipe can't be read with a timeout
        self.reader.start()
        self.greeted = False

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=self.settings.timeout)
        except queue.Empty:
            self.process.kill()
            self.process.wait()
            raise ChildDied(f"no answer within {self.settings.timeout:g} s; its process was ended") from None
        if line is None:
            raise ChildDied(self._epitaph())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _epitaph(self) -> str:
        code = self.process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self.stderr.seek(0)
        last = [line for line in self.stderr.read().splitlines() if line.strip()][-1:]
        return machine.scrub(f"its process ended {how}" + "".join(f": {line.strip()[:300]}" for line in last))

    def ask(self, **message: Any) -> dict[str, Any]:
        """Sends a message and waits for the answer; raises ChildDied."""
        if not self.greeted:
            hello = self._answer()
            self.greeted = True
            if "error" in hello:
                raise ChildDied(str(hello["error"]))
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise ChildDied(self._epitaph()) from None
        return self._answer()

    def close(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(timeout=10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.stderr.close()


class Children:
    """The live children, by (name, malloc). One that died is started again, twice at most."""

    RESTARTS = 2

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.live: dict[tuple[str, str], Child] = {}
        self.deaths: dict[tuple[str, str], list[str]] = {}

    def get(self, implementation: Implementation, malloc: str) -> Child:
        key = implementation.name, malloc
        deaths = self.deaths.get(key, [])
        if key not in self.live:
            if len(deaths) > self.RESTARTS:
                raise ChildDied(f"given up after {len(deaths)} dead processes; the last: {deaths[-1]}")
            ours = implementation.kind in ("ours", "threads")
            env = implementation.env if ours else {**self.settings.hold, **implementation.env}
            self.live[key] = Child(implementation.name, malloc, env, self.settings, implementation.threads)
        return self.live[key]

    def bury(self, implementation: Implementation, malloc: str, why: str) -> None:
        key = implementation.name, malloc
        self.deaths.setdefault(key, []).append(why)
        child = self.live.pop(key, None)
        if child is not None:
            child.close()

    def close(self) -> None:
        for child in self.live.values():
            child.close()
        self.live.clear()


@dataclass
class Entry:
    """One row in the making."""

    implementation: Implementation
    row: Row
    wanted: int = 0
    attempts: int = 0
    quiet: list[dict[str, Any]] = field(default_factory=list)
    noisy: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        # Disturbed rounds are measured again, but a machine that never is quiet must not hold the run up.
        return self.row.error is not None or len(self.quiet) >= self.wanted or self.attempts >= 2 * self.wanted


def selected(cases: Mapping[str, Case], settings: Settings) -> list[tuple[Case, Shape]]:
    """The (case, shape) pairs of this run: --only matches `case M=.. K=.. N=..`, --quick takes a case's quick ones."""
    only = re.compile(settings.only or "")
    return [
        (case, shape)
        for case in cases.values()
        for shape in case.shapes
        if only.search(f"{case.name} {label(shape)}") and (not settings.quick or case.quick(**shape))
    ]


def run(
    cases: Mapping[str, Case],
    settings: Settings,
    beyond_avx2: bool,
    report: Callable[[str, Sequence[Row]], None] = lambda *_: None,
) -> list[Row]:
    """All rows of a run. A peer that is unavailable, raises or crashes is a row that says so."""
    children = Children(settings)
    rows: list[Row] = []
    try:
        todo = selected(cases, settings)
        for case, shape in todo:  # all at once: importing torch is most of a short run
            for implementation, malloc in _who(case, shape, settings, beyond_avx2):
                children.get(implementation, malloc)
        for case, shape in todo:
            report(f"{case.name} {label(shape)}", [])
            found = _measure(case, shape, settings, beyond_avx2, children)
            rows += found
            report(f"{case.name} {label(shape)}", found)
    finally:
        children.close()
    return rows


def _who(case: Case, shape: Shape, settings: Settings, beyond_avx2: bool) -> list[tuple[Implementation, str]]:
    return [
        (implementation, malloc)
        for implementation in case.implementations
        if beyond_avx2 or not implementation.beyond_avx2
        if implementation.threads is None or settings.threads == 1
        if implementation.wants(**shape)
        for malloc in settings.mallocs
        if malloc in implementation.mallocs
    ]


def _measure(case: Case, shape: Shape, settings: Settings, beyond_avx2: bool, children: Children) -> list[Row]:
    entries = []
    for implementation, malloc in _who(case, shape, settings, beyond_avx2):
        row = Row(
            case.name,
            dict(shape),
            implementation.name,
            implementation.kind,
            malloc,
            implementation.threads or settings.threads,
            case.unit,
            compute=implementation.compute,
            work=case.work(**shape) if case.work else None,
        )
        entries.append(Entry(implementation, row))

    def ask(entry: Entry, **message: Any) -> dict[str, Any] | None:
        """None where the row has its error now."""
        try:
            answer = children.get(entry.implementation, entry.row.malloc).ask(**message)
        except ChildDied as e:
            children.bury(entry.implementation, entry.row.malloc, str(e))
            answer = {"error": str(e)}
        why = answer.get("error") or answer.get("unavailable")
        if why:
            entry.row.error = str(why) if "error" in answer else f"not available: {why}"
            return None
        return answer

    for entry in entries:
        budget = settings.budget[entry.row.malloc] * entry.implementation.share
        ready = ask(entry, do="setup", case=case.name, shape=dict(shape), budget=budget, rounds=settings.rounds)
        if ready is None:
            continue
        row = entry.row
        row.copies, row.level, row.weight_bytes = ready["copies"], ready["level"], ready["weight_bytes"]
        row.check, row.note, entry.wanted = ready["check"], ready["note"], ready["rounds"]
        if entry.wanted == 0:  # one call took more than the whole budget
            entry.wanted, entry.attempts = 1, 1
            entry.quiet.append({"seconds": ready["one_call"], "calls": 1})

    turn = 0
    while any(not entry.done for entry in entries):
        # To and fro, so that a drift of the machine's speed favours nobody.
        for entry in entries if turn % 2 == 0 else reversed(entries):
            if entry.done:
                continue
            entry.attempts += 1
            figures = ask(entry, do="round")
            if figures is not None:
                (entry.noisy if figures["disturbed"] else entry.quiet).append(figures)
        turn += 1
    for entry in entries:
        if entry.row.error is None:
            ask(entry, do="drop")
            entry.row.error = None  # the figures stand, even if dropping the operands failed
            _fill(entry, case, shape)
    return [entry.row for entry in entries]


def _fill(entry: Entry, case: Case, shape: Shape) -> None:
    """Turns rounds into figures."""
    row = entry.row
    row.disturbed = not entry.quiet
    used = entry.quiet or entry.noisy
    row.discarded = len(entry.noisy) if entry.quiet else 0
    seconds = [figures["seconds"] for figures in used]
    row.seconds = {
        "median": percentile(seconds, 50),
        "p20": percentile(seconds, 20),
        "p80": percentile(seconds, 80),
    }
    row.value = case.value(row.median, shape)
    row.rounds, row.calls = len(used), sum(figures["calls"] for figures in used)

    def middle(key: str) -> float | None:
        values = [figures[key] for figures in used if figures.get(key) is not None]
        return percentile(values, 50) if values else None

    row.own_cores, row.others_cores, row.faults_per_call = middle("own"), middle("others"), middle("faults")
    row.kernel_seconds = middle("kernel")


def family_argument(family: str) -> str:
    """Children run in the repository's root, so a family file is handed on by its full path."""
    return str(Path(family).resolve()) if family.endswith(".py") else family


def quick(settings: Settings) -> Settings:
    """Seconds instead of minutes: few rounds, little time for each, the default malloc only."""
    return replace(settings, rounds=3, budget={"default": 0.12, "keep": 0.12}, mallocs=("default",), quick=True)
