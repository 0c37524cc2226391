"""What people and programs read: tables on the terminal and in Markdown, JSON, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import break_even
from bench.bars import MET, MISSED, NEARLY, Verdict
from bench.ceilings import Ceiling
from bench.registry import OURS, Case
from bench.rows import CEILING_BROKEN, Row, bound, find

SCHEMA = 1

# A call's fixed cost is said to matter from this share of a figure on.
CALL_SHARE = 0.1


PANELS_ACROSS = 4  # of the plot


@dataclass
class Result:
    """One run."""

    family: str
    options: dict[str, Any]
    machine: dict[str, Any]
    ceilings: list[Ceiling]
    rows: list[Row]
    verdicts: list[Verdict]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "family": self.family,
            "options": self.options,
            "machine": self.machine,
            "ceilings": [asdict(ceiling) for ceiling in self.ceilings],
            "bars": [asdict(verdict) for verdict in self.verdicts],
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass
class Table:
    """A title, a header and cells; the first column is the label."""

    title: str
    header: list[str]
    cells: list[list[str]]
    notes: list[str]


def seconds_text(seconds: float) -> str:
    """Three digits in the unit that suits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    raise AssertionError("unreachable")


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """The machine in a few lines."""
    caches = ", ".join(f"{level} {size >> 10} KB" for level, size in machine["caches"].items())
    software = machine["software"]
    info = software.get("fastsparse")
    version = (
        info.get("version", "?") if isinstance(info, dict) else f"not available ({software.get('fastsparse_error')})"
    )
    commit = f"{machine['commit'] or 'no commit'}{' with changes' if machine['uncommitted_changes'] else ''}"
    end = machine.get("loadavg_end")
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {caches}{' (assumed)' if machine['caches_assumed'] else ''}; "
        f"best ISA level {machine['cpu_level']}, in use {machine['isa']}",
        f"fastsparse {version} ({commit}), torch {software.get('torch', software.get('torch_error'))}, "
        f"Python {software.get('python')}, {machine['compiler']}, {machine['libc']}, {machine['kernel']}",
        f"{machine['date']}, load average {machine['loadavg_start']} at the start"
        + (f", {end} at the end" if end else ""),
    ]


def ceiling_table(ceilings: Sequence[Ceiling], rows: Sequence[Row] = ()) -> Table:
    nearest = [(row, bound(row)) for row in rows]
    broken = any(row.fractions[key] > CEILING_BROKEN for row, key in nearest if key)
    return Table(
        "Ceilings of this machine",
        ["ceiling", "measured", "how"],
        [[c.text, f"{c.value:.1f} {c.unit}" if c.value is not None else "-", c.note] for c in ceilings],
        ["The best of many short bursts, before and after the cases."]
        + ["Some rows exceed one: it was measured while other processes ran. Run again on a quiet machine."] * broken,
    )


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    return Table(
        "Bars",
        ["bar", "target", "measured", "verdict", "detail"],
        [
            [v.text, v.target, f"{v.measured:.3g}" if v.measured is not None else "-", v.status, v.detail]
            for v in verdicts
        ],
        [],
    )


def call_cost(rows: Sequence[Row], malloc: str) -> float | None:
    """Our fixed cost of a call, if this run measured it."""
    found = (
        row.median for row in rows if row.case == "call_cost" and row.name == OURS and row.malloc == malloc and row.ok
    )
    return next(found, None)


def case_tables(result: Result, cases: Mapping[str, Case]) -> list[Table]:
    """One table for each case, panel of shapes and malloc setting."""
    tables = []
    for name, case in cases.items():
        rows = [row for row in result.rows if row.case == name]
        for malloc in dict.fromkeys(row.malloc for row in rows):
            for panel, members in panels([row for row in rows if row.malloc == malloc], case.over).items():
                tables.append(_case_table(result, case, panel, malloc, members))
    return tables


def panels(rows: Sequence[Row], over: str) -> dict[str, list[Row]]:
    """Rows by their shape without the axis `over`."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        key = " ".join(f"{axis.upper()}={value}" for axis, value in row.shape.items() if axis != over)
        found.setdefault(key, []).append(row)
    return found


def _case_table(result: Result, case: Case, panel: str, malloc: str, rows: Sequence[Row]) -> Table:
    peers = list(dict.fromkeys(row.name for row in rows if row.name != OURS))
    title = f"{case.name} {panel}" + ("" if malloc == "default" else ", freed memory kept")
    header = [case.over.upper(), "fastsparse", "p20..p80"]
    header += [case.unit] if case.work else []
    header += ["of the ceiling", *peers]
    cells, notes = [], []
    fixed = call_cost(result.rows, malloc)
    by_line: dict[int, list[Row]] = {}
    for row in rows:
        by_line.setdefault(row.shape[case.over], []).append(row)
    for line, members in by_line.items():
        ours = next((row for row in members if row.name == OURS), None)
        cell = [str(line)]
        if ours is not None and ours.seconds is not None:
            nearest = bound(ours)
            fraction = f"{ours.fractions[nearest]:.2f} {_ceiling_text(ours, nearest)}" if nearest else "-"
            if fixed is not None and fixed > CALL_SHARE * ours.median:
                kernel = (
                    f"kernel {seconds_text(ours.kernel_seconds)}" if ours.kernel_seconds else "kernel's time unknown"
                )
                key = f"kernel_{nearest}"
                fraction += f"; {kernel}" + (f" = {ours.fractions[key]:.2f}" if key in ours.fractions else "")
            if "vnni" in ours.fractions:
                fraction += f"; {ours.fractions['vnni']:.2f} vnni avx512"
            cell += [seconds_text(ours.median) + _mark(ours) + (f" {ours.note}" if ours.note else "")]
            cell += [f"{seconds_text(ours.seconds['p20'])}..{seconds_text(ours.seconds['p80'])}"]
            cell += [f"{ours.value:.1f}"] if case.work and ours.value is not None else []
            cell += [fraction]
        else:
            cell += ["-"] * (len(header) - len(peers) - 1)
        for name in peers:
            theirs = next((row for row in members if row.name == name), None)
            if theirs is None or theirs.seconds is None:
                cell.append("-")
                continue
            ratio = f"{ours.ratios[name]:.2f}x, " if ours is not None and name in ours.ratios else ""
            if theirs.kind == "threads" and ours is not None and ours.ok:
                ratio = f"{ours.median / theirs.median:.2f}x faster, "
            cell.append(ratio + seconds_text(theirs.median) + _mark(theirs))
        cells.append(cell)
    for row in rows:
        problem = row.error or ("" if row.right else _wrong(row))
        if row.disturbed:
            problem = f"{problem}; " * bool(problem) + "no round was undisturbed"
        if problem:
            notes.append(f"{row.name}: {problem}")
    return Table(title, header, cells, list(dict.fromkeys(notes)))


def _ceiling_text(row: Row, nearest: str) -> str:
    return f"read {row.level}" if nearest == "read" else row.ceilings[nearest].replace("_", " ")


def _mark(row: Row) -> str:
    return ("" if row.right else " (!)") + (" (~)" if row.disturbed else "")


def _wrong(row: Row) -> str:
    if not row.check:
        return "its result is not checked"
    return (
        f"wrong at {row.label}: error {row.check['error']:.3g} > {row.check['tolerance']:.3g} ({row.check['measure']})"
    )


def held_line(result: Result) -> str:
    """How peers were kept from what our own level does not use; empty where nothing held them."""
    held = result.options.get("peers_held_by") or {}
    cap = ", ".join(f"{name}={value}" for name, value in held.items())
    return f"Peers ran under {cap}, since ours is capped at {result.machine['isa']}." if cap else ""


def tables(result: Result, cases: Mapping[str, Case]) -> list[Table]:
    speedups = [Table(*parts, notes=[]) for parts in break_even.tables(cases, result.rows)]
    found = [ceiling_table(result.ceilings, result.rows), *speedups, *case_tables(result, cases)]
    return found + [verdict_table(result.verdicts)] * bool(result.verdicts)


LEGEND = (
    "Times are medians of whole calls through fastsparse.ops; peers' cells: their time over ours, and their time. "
    "Of the ceiling: useful work or weight bytes over the nearer measured ceiling. "
    "Where the fixed cost of a call exceeds a tenth, the kernel's own time stands beside. "
    "(!) wrong or unchecked result, (~) disturbed by other processes."
)


# ---- outputs ----


def print_tables(result: Result, cases: Mapping[str, Case]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log should not be wrapped at 80 columns
    colours = {MET: "green", NEARLY: "green", MISSED: "red"}
    for line in machine_lines(result.machine):
        console.print(escape(line), highlight=False)
    if held_line(result):
        console.print(escape(held_line(result)), highlight=False)
    for table in tables(result, cases):
        shown = RichTable(title=escape(table.title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for i, column in enumerate(table.header):
            shown.add_column(escape(column), justify="left" if i == 0 or table.title == "Bars" else "right")
        for row in table.cells:
            shown.add_row(*(f"[{colours[c]}]{c}[/]" if c in colours else escape(c) for c in row))
        console.print(shown)
        for note in table.notes:
            console.print(escape(f"  {note}"), highlight=False)
    console.print(escape(LEGEND), highlight=False)


def markdown(result: Result, cases: Mapping[str, Case], plot: str | None = None) -> str:
    text = [f"# {result.family} on {result.machine['cpu']}, {result.machine['isa']}", ""]
    text += [line + "  " for line in machine_lines(result.machine)]
    text += [held_line(result)] * bool(held_line(result))
    text += ["", LEGEND, ""]
    text += [f"![plot]({plot})", ""] if plot else []
    for table in tables(result, cases):
        text += markdown_table(table)
    return "\n".join(text)


def markdown_table(table: Table) -> list[str]:
    lines = [f"## {table.title}", "", _line(table.header), _line(["---"] * len(table.header))]
    lines += [_line(cells) for cells in table.cells] + [""]
    return lines + [f"- {note}" for note in table.notes] + [""] * bool(table.notes)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(result: Result, cases: Mapping[str, Case], path: Path) -> list[Path]:
    """The JSON at `path`, the Markdown table and the plot beside it; returns what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    picture = path.with_suffix(".png")
    plotted = draw(result, cases, picture)
    table = path.with_suffix(".md")
    table.write_text(markdown(result, cases, picture.name if plotted else None))
    return [path, table] + [picture] * plotted


def draw(result: Result, cases: Mapping[str, Case], path: Path) -> bool:
    """One panel a shape: ratio to each peer above, fraction of the nearer ceiling below, over M. False: no figures.

    Where a case asks for the break-even plot, that instead.
    """
    if any(case.break_even is not None for case in cases.values()):
        title = (
            f"{result.family}, {result.machine['cpu']}, {result.machine['isa']}, {result.options['threads']} thread(s)"
            f", {result.machine['date']}: speed-up over dense as zeros grow"
        )
        return break_even.draw(cases, result.rows, title, path)
    columns = []
    for name, case in cases.items():
        rows = [row for row in result.rows if row.case == name and row.malloc == "default" and row.ok]
        for panel, members in panels(rows, case.over).items():
            if case.work and len({row.shape[case.over] for row in members}) > 1:
                columns.append((f"{name} {panel}", case.over, members))
    if not columns:
        return False
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import lines, pyplot
    except ImportError:
        return False

    names = list(dict.fromkeys(row.name for _, _, rows in columns for row in rows if row.kind != "threads"))
    palette = pyplot.get_cmap("tab10" if len(names) <= 10 else "tab20")
    colours = {name: palette(i % palette.N) for i, name in enumerate(names)}
    across = min(len(columns), PANELS_ACROSS)
    bands = -(-len(columns) // across)
    figure, axes = pyplot.subplots(2 * bands, across, figsize=(4 * across, 7 * bands), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for i, (title, over, rows) in enumerate(columns):
        ratio, fraction = axes[2 * (i // across)][i % across], axes[2 * (i // across) + 1][i % across]
        ratio.set_visible(True)
        fraction.set_visible(True)
        if i % across == 0:
            ratio.set_ylabel("peer's time / fastsparse's")
            fraction.set_ylabel("fraction of the nearer ceiling")
        for name in names:
            own = sorted((row for row in rows if row.name == name), key=lambda row: row.shape[over])
            pairs = [(row.shape[over], ours.ratios[name]) for row in own
                     if (ours := find(rows, row, OURS)) is not None and name in ours.ratios]  # fmt: skip
            if pairs:
                ratio.plot(*zip(*pairs, strict=True), marker="o", color=colours[name], label=name)
            near = [(row.shape[over], row.fractions[b]) for row in own if (b := bound(row)) is not None]
            if near:
                fraction.plot(*zip(*near, strict=True), marker="o", color=colours[name], label=name)
        ratio.set_title(title.replace(" ", "\n", 1) if len(title) > 30 else title, fontsize=10)
        ratio.axhline(1, color="grey", linewidth=0.8)
        ratio.set_yscale("log")
        ratio.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        ratio.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        fraction.axhline(1, color="grey", linewidth=0.8)
        fraction.set_ylim(0)
        for axis in (ratio, fraction):
            ticks = sorted({row.shape[over] for row in rows})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.set_xlabel(over.upper())
            axis.grid(alpha=0.3)
    handles = [lines.Line2D([], [], marker="o", color=colours[name], label=name) for name in names]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(names), across + 1), frameon=False)
    figure.suptitle(f"{result.family}, {result.machine['cpu']}, {result.machine['isa']}, "
                    f"{result.options['threads']} thread(s), {result.machine['date']}")  # fmt: skip
    figure.tight_layout(rect=(0, 0.12 / bands, 1, 0.98))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
