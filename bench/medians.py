"""`python -m bench.medians RUN.json RUN.json RUN.json`: the bars of several runs, each judged by its median.

One run on a shared machine says little; a bar is met where the median of three is. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.bars import NOT_MEASURABLE, bars_of, status_of


def table(runs: Sequence[Mapping[str, Any]]) -> report.Table:
    """A line a bar. Raises ValueError where the runs are not of one family, machine, level and number of threads."""

    def of(run: Mapping[str, Any]) -> dict[str, object]:
        machine = run["machine"]
        return {
            "family": run["family"],
            "machine": machine["name"],
            "level": machine["isa"],
            "threads": run["options"]["threads"],
        }

    first = of(runs[0])
    for i, run in enumerate(runs):
        for key, value in of(run).items():
            if value != first[key]:
                raise ValueError(f"run {i + 1} has {key} {value!r}, the first has {first[key]!r}")
    found = [{bar["key"]: bar for bar in run["bars"]} for run in runs]
    cells = []
    for bar in bars_of(str(first["family"])):
        verdicts = [verdicts[bar.key] for verdicts in found if bar.key in verdicts]
        # A run that misses figures has no say, even where the ones it has give a number.
        figures = [v["measured"] for v in verdicts if v["status"] != NOT_MEASURABLE]
        median = statistics.median(figures) if figures else None
        cells.append(
            [
                bar.text,
                f">= {bar.at_least:g}" if bar.at_least is not None else f"<= {bar.at_most:g}",
                f"{median:.3g}" if median is not None else "-",
                " / ".join(f"{figure:.3g}" for figure in figures),
                status_of(bar, median) if median is not None else NOT_MEASURABLE,
            ]
        )
    title = f"{first['family']} on {runs[0]['machine']['cpu']}, {first['level']}: medians of {len(runs)} runs"
    return report.Table(title, ["bar", "target", "median", "runs", "verdict"], cells, [])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.medians", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="what python -m bench --json wrote")
    options = parser.parse_args(arguments)
    try:
        found = table([json.loads(path.read_text()) for path in options.runs])
    except (OSError, ValueError) as e:
        print(f"bench.medians: {e}", file=sys.stderr)
        return 2
    print("\n".join(report.markdown_table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
