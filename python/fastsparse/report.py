"""Report: what a command or a conversion found, as rows that people and programs read alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """A titled table.

    Attributes:
        title: one line.
        columns: the keys of a row, in the order to show them.
        rows: one dict per row; a missing key shows as an empty cell.
        notes: lines under the table.
        ok: False if something that was checked does not hold.
    """

    title: str
    columns: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ok: bool = True

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"title": self.title, "ok": self.ok, "columns": self.columns, "rows": self.rows, "notes": self.notes}

    def __str__(self) -> str:
        cells = [self.columns] + [[_cell(row.get(column)) for column in self.columns] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, "", lines[0], rule, *lines[1:], *([""] if self.notes else []), *self.notes])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
