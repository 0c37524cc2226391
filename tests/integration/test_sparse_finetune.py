"""examples/sparse_finetune.py in its short form: it runs, and what it says of zeros and accuracy holds."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "sparse_finetune.py"


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quick"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    dense, pruned, tuned, packed = capsys.readouterr().out.splitlines()
    accuracy = [float(re.findall(r"([\d.]+)%", line)[-1]) for line in (dense, pruned, tuned)]
    assert accuracy[2] > accuracy[1] + 5
    assert "90.0% zeros" in packed
    assert f"{accuracy[2]:.1f}%" in packed
