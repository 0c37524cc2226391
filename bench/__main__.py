"""`python -m bench --family int8_gemm`: runs a family's cases, prints tables, writes JSON, Markdown and a plot."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import bars, ceilings, machine, report, runner
from bench.registry import OURS, Case, RegistryError, families, load_family
from bench.rows import Row, add_fractions, add_ratios

RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--family", required=True, help=f"{', '.join(families())}, or a .py file that registers cases")
    parser.add_argument("--quick", action="store_true", help="few shapes, default malloc, seconds instead of minutes")
    parser.add_argument("--only", metavar="REGEX", help='shapes to run, matched against "case M=1 K=768 N=768"')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the result goes; .md and .png beside it")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    return options


def result_path(options: argparse.Namespace, family: str, described: dict[str, object]) -> Path:
    """bench/results/<family>-<isa>-<machine>.json; a partial run must not replace a full one there."""
    if options.json:
        return Path(options.json)
    threads = f"-{options.threads}threads" if options.threads > 1 else ""
    name = f"{family}-{described['isa']}-{described['name']}{threads}.json"
    return (ceilings.BUILD / f"partial-{name}") if options.quick or options.only else RESULTS / name


class Progress:
    """One line a shape on stderr; on a terminal also a bar."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # Redrawn only between shapes: a spinning bar is another busy process.
        self.bar = Bar(*columns, console=self.console, auto_refresh=False, transient=True)
        self.task = self.bar.add_task("starting", total=total)
        self.bar.start()

    def __call__(self, what: str, rows: Sequence[Row]) -> None:
        if rows:
            shown = [row for row in rows if row.malloc == rows[0].malloc]
            figures = ", ".join(
                f"{row.name} {report.seconds_text(row.median) if row.ok else 'none'}"
                for row in sorted(shown, key=lambda row: row.name != OURS)
            )
            self.bar.console.print(f"{what}: {figures}", markup=False)
            self.bar.advance(self.task)
        else:
            self.bar.update(self.task, description=what)
        self.bar.refresh()

    def close(self) -> None:
        self.bar.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    began = time.monotonic()
    family = Path(options.family).stem
    try:
        cases: dict[str, Case] = load_family(options.family)
    except (RegistryError, ImportError) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 2
    settings = runner.Settings(
        runner.family_argument(options.family),
        threads=options.threads,
        quick=options.quick,
        only=options.only,
    )
    if options.quick:
        settings = runner.quick(settings)
    todo = runner.selected(cases, settings)
    if not todo:
        print(f"bench: no shape matches --only {options.only!r}", file=sys.stderr)
        return 2

    described = machine.describe()
    settings = replace(settings, hold=machine.hold(str(described["isa"]), str(described["cpu_level"])))
    before = ceilings.measure_in_child(options.threads, options.quick)
    progress = Progress(len(todo))
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("FASTSPARSE_CACHE", folder)  # "auto" measures its choices anew, in the children
        try:
            rows = runner.run(cases, settings, bool(described["beyond_avx2"]), progress)
        finally:
            progress.close()
            if os.environ["FASTSPARSE_CACHE"] == folder:
                del os.environ["FASTSPARSE_CACHE"]
    after = [] if options.quick else ceilings.measure_in_child(options.threads, quick=True)
    found = ceilings.merge(before, after)
    described["loadavg_end"] = machine.loadavg()
    described["seconds"] = round(time.monotonic() - began)

    values = {c.key: c.value for c in found if c.value is not None}
    add_fractions(rows, values, str(described["isa"]), str(described["cpu_level"]), bool(settings.hold))
    add_ratios(rows)
    context = bars.Context(
        rows,
        isa=str(described["isa"]),
        cpu_level=str(described["cpu_level"]),
        beyond_avx2=bool(described["beyond_avx2"]),
        threads=options.threads,
        ceilings=values,
    )
    shown = {
        "threads": options.threads,
        "quick": options.quick,
        "only": options.only,
        "mallocs": list(settings.mallocs),
        "peers_held_by": dict(settings.hold),
    }
    result = report.Result(family, shown, described, found, rows, bars.judge_all(family, context))
    report.print_tables(result, cases)
    for path in report.write(result, cases, result_path(options, family, described)):
        print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
