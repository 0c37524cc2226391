"""Speed-up over the dense peer as zeros grow: tables, and a plot with a panel per M, of cases that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.registry import OURS, Case
from bench.rows import Row, find

ACROSS = 3  # panels of the plot
LEGEND = 8  # names in a line of its legend
PLOT_ZEROS = 4  # so many shares of zeros make a line
Curve = list[tuple[int, float]]  # (percent of zeros, speed-up)


def speedups(rows: Sequence[Row], dense: str, name: str, m: int, weight: tuple[int, int]) -> Curve:
    """Of one implementation over `dense` at the same shape; wrong results left out."""
    k, n = weight
    found = []
    for row in rows:
        if row.name != name or not row.right or row.shape != {**row.shape, "m": m, "k": k, "n": n}:
            continue
        # Rows with other threads than the run's are not over the run's dense.
        other = find(rows, row, dense)
        if other is not None and other.right:
            found.append((row.shape["zeros"], other.median / row.median))
    return sorted(found)


def weights_of(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(K, N) in the order in which they were measured."""
    return list(dict.fromkeys((row.shape["k"], row.shape["n"]) for row in rows))


def rows_of(case: Case, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.case == case.name and row.malloc == "default"]


def break_even(curve: Curve) -> float | None:
    """The percentage of zeros at which the speed-up passes 1 for good, interpolated; None: it never does."""
    below = [i for i, (_, ratio) in enumerate(curve) if ratio < 1]
    if not curve or (below and below[-1] == len(curve) - 1):
        return None
    if not below:
        return float(curve[0][0])
    (z0, r0), (z1, r1) = curve[below[-1]], curve[below[-1] + 1]
    return z0 + (z1 - z0) * (1 - r0) / (r1 - r0)


def tables(cases: Mapping[str, Case], rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, cells) for each weight: our speed-up over dense, zeros down, M across."""
    found = []
    for case in cases.values():
        if case.break_even is None:
            continue
        own = rows_of(case, rows)
        for weight in weights_of(own):
            ms = sorted({row.shape["m"] for row in own})
            curves = {m: dict(speedups(own, case.break_even, OURS, m, weight)) for m in ms}
            zeros = sorted({z for curve in curves.values() for z in curve})
            cells = [[f"{z}%", *(f"{curves[m][z]:.2f}" if z in curves[m] else "" for m in ms)] for z in zeros]
            if cells:
                title = f"{case.name} over {case.break_even}, K={weight[0]} N={weight[1]}"
                found.append((title, ["zeros", *(f"M={m}" for m in ms)], cells))
    return found


def draw(cases: Mapping[str, Case], rows: Sequence[Row], title: str, path: Path) -> bool:
    """One panel for each weight and M with enough shares of zeros. False: nothing to draw, or no matplotlib."""
    panels: list[tuple[Case, tuple[int, int], int, list[Row]]] = []
    for case in cases.values():
        if case.break_even is None:
            continue
        own = rows_of(case, rows)
        for weight in weights_of(own):
            for m in sorted({row.shape["m"] for row in own}):
                if len(speedups(own, case.break_even, OURS, m, weight)) >= PLOT_ZEROS:
                    panels.append((case, weight, m, own))
    if not panels:
        return False
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import lines, pyplot
    except ImportError:
        return False

    kinds = {row.name: row.kind for _, _, _, own in panels for row in own}
    ours = [name for name, kind in kinds.items() if kind == "ours" and name != OURS]
    peers = [name for name, kind in kinds.items() if kind in ("bare", "fused")]
    colours = pyplot.get_cmap("tab10")
    greys = pyplot.get_cmap("Dark2")
    style: dict[str, dict[str, Any]] = {OURS: {"color": "black", "linewidth": 3.5, "alpha": 0.35, "label": "auto"}}
    for i, name in enumerate(ours):
        style[name] = {"color": colours(i), "marker": "o", "markersize": 4, "label": name.removeprefix(f"{OURS} ")}
    for i, name in enumerate(peers):
        style[name] = {"color": greys(i), "linestyle": "--", "marker": "s", "markersize": 3, "label": name}
    bands = -(-len(panels) // ACROSS)
    height = 4.1 * bands + 1  # inches; a line of the legend takes a quarter of one
    figure, axes = pyplot.subplots(bands, ACROSS, figsize=(5.2 * ACROSS, height), squeeze=False)
    used = []
    for axis, panel in zip(axes.flat, panels, strict=False):
        case, weight, m, own = panel
        assert case.break_even is not None
        ticks: set[int] = set()
        for name in style:
            curve = speedups(own, case.break_even, name, m, weight)
            if curve:
                axis.plot(*zip(*curve, strict=True), **style[name])
                ticks |= {z for z, _ in curve}
                used.append(name)
        even = break_even(speedups(own, case.break_even, OURS, m, weight))
        least = min(ticks, default=0)
        text = (
            "slower throughout"
            if even is None
            else f"faster from {least}% on"
            if even <= least
            else f"even at {even:.0f}%"
        )
        axis.set_title(f"M = {m}, K = {weight[0]}, N = {weight[1]}: {text}", fontsize=10)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        steps = [v for v in (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200) if low <= v <= high]
        axis.set_yticks(steps, [f"{v:g}x" for v in steps])
        axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_xticks(sorted(ticks), [str(z) for z in sorted(ticks)], fontsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel(f"speed-up over {panels[0][0].break_even}")
    for axis in axes[-1]:
        axis.set_xlabel("% zeros")
    handles = [lines.Line2D([], [], **style[name]) for name in style if name in used]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), LEGEND), frameon=False)
    figure.suptitle(title, y=1 - 0.2 / height)
    figure.tight_layout(rect=(0, 0.25 * (-(-len(handles) // LEGEND) + 0.5) / height, 1, 1 - 0.45 / height))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
