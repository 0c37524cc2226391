"""Which level runs, and who may say so: FASTSPARSE_ISA, FASTSPARSE_ISA_ASSUME, set_isa()."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastsparse import _C, ops
from support import cpu_rows, forced, isa_levels, selected_level

LEVELS = ["amx", "avx512", "avxvnni", "avx2", "scalar"]

# The environment is read once a process, so each setting gets its own; torch, which takes seconds, is imported once for
# all of them, before the fork. Importing fastsparse must work under every setting. Each call is tried twice: a bad
# setting must be refused every time and not only the first.
CHILDREN = """
import json, os, sys, torch

def attempt(call):
    results = []
    for _ in range(2):
        try:
            results.append(call())
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    assert results[0] == results[1], results
    return results[0]

def report():
    from fastsparse import _library, ops
    _C = _library.load()
    eye = torch.eye(3, dtype=torch.int8)
    print(json.dumps({
        "mm": attempt(lambda: ops.int8_mm(eye, eye).tolist()),
        "linear": attempt(lambda: ops.int8_linear(torch.ones(1, 3), ops.pack(eye), torch.ones(3)).tolist()),
        "isa": attempt(_C.isa),
        "available": attempt(_C.isa_available),
        "reason": attempt(_C.isa_reason),
        "selected": attempt(lambda: [r["level"] for r in _C.kernels() if r["selected"] and r["level"] != "cuda"]),
    }), flush=True)

for setting in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.environ.update(setting)
        report()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""

EYE = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
UNKNOWN = "FASTSPARSE_ISA=sse9 is not a level; levels: scalar, avx2, avxvnni, avx512, amx"


def absent_levels() -> list[str]:
    return [level for level in LEVELS if level not in isa_levels()]


SETTINGS: dict[str, dict[str, str]] = {
    "capped": {"FASTSPARSE_ISA": "scalar"},
    "unknown": {"FASTSPARSE_ISA": "sse9"},
    # Capped to scalar, so that nothing assumed is executed.
    "assumed": {"FASTSPARSE_ISA_ASSUME": "amx,avx512,avxvnni", "FASTSPARSE_ISA": "scalar"},
    "assumed unknown": {"FASTSPARSE_ISA_ASSUME": "avx2,sse9"},
    **{level: {"FASTSPARSE_ISA": level} for level in absent_levels()},
}


@pytest.fixture(scope="module")
def under() -> dict[str, dict[str, Any]]:
    """What a fresh process says under each setting."""
    clean = {name: value for name, value in os.environ.items() if name != "FASTSPARSE_ISA"}
    command = [sys.executable, "-c", CHILDREN, json.dumps(list(SETTINGS.values()))]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(SETTINGS, map(json.loads, done.stdout.splitlines()), strict=True))


def test_environment_caps_the_level(under: dict[str, dict[str, Any]]) -> None:
    got = under["capped"]
    assert got["isa"] == "scalar"
    assert set(got["selected"]) == {"scalar"}, "of every family"
    assert got["reason"] == "capped by FASTSPARSE_ISA=scalar"
    assert got["available"] == isa_levels(), "a cap hides nothing of what the CPU has"
    assert got["mm"] == EYE
    assert got["linear"] == [[1.0, 1.0, 1.0]]


def test_unknown_level_is_refused_at_every_call_and_not_at_import(under: dict[str, dict[str, Any]]) -> None:
    for call in ("mm", "linear", "isa", "selected"):
        assert under["unknown"][call] == f"ValueError: {UNKNOWN}"
    assert under["unknown"]["available"] == isa_levels()


def test_level_beyond_this_cpu_is_refused_at_every_call_and_not_at_import(under: dict[str, dict[str, Any]]) -> None:
    # Where the CPU has every level, there is none to refuse.
    for level in absent_levels():
        message = f"ValueError: FASTSPARSE_ISA={level} is not on this CPU; available: {', '.join(isa_levels())}"
        for call in ("mm", "linear", "isa", "selected"):
            assert under[level][call] == message
        assert under[level]["available"] == isa_levels()


def test_assumed_levels_count_as_available(under: dict[str, dict[str, Any]]) -> None:
    assert under["assumed"]["available"] == LEVELS
    assert set(under["assumed"]["selected"]) == {"scalar"}
    assert under["assumed"]["mm"] == EYE


def test_unknown_assumed_level_is_refused_at_every_call_and_not_at_import(under: dict[str, dict[str, Any]]) -> None:
    for call in ("mm", "linear", "isa", "selected", "available"):
        assert under["assumed unknown"][call].startswith("ValueError: ")
        assert "sse9 is not a level; levels: scalar, avx2, avxvnni, avx512, amx" in under["assumed unknown"][call]


def test_table_has_a_row_for_every_cpu_and_selects_the_best() -> None:
    rows = cpu_rows("int8_gemm")
    assert rows[-1]["level"] == "scalar"
    order = [LEVELS.index(row["level"]) for row in rows]
    assert order == sorted(order), "best first"
    assert [row["selected"] for row in rows].count(True) == 1
    assert next(row for row in rows if row["usable"])["selected"]


def test_forcing_a_level_selects_its_row() -> None:
    for level in isa_levels():
        with forced(level):
            assert _C.isa() == level
            assert _C.isa_reason() == "forced by set_isa()"
            for row in cpu_rows("int8_gemm"):
                assert row["usable"] == (row["level"] in isa_levels()[isa_levels().index(level) :])


def test_empty_name_returns_to_the_environment() -> None:
    before = _C.isa(), _C.isa_reason(), selected_level("int8_gemm")
    _C.set_isa("scalar")
    assert selected_level("int8_gemm") == "scalar"
    _C.set_isa("")
    assert (_C.isa(), _C.isa_reason(), selected_level("int8_gemm")) == before


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "avx"])
def test_set_isa_refuses_what_is_not_a_level(name: str) -> None:
    before = _C.isa()
    with pytest.raises(ValueError) as caught:
        _C.set_isa(name)
    assert str(caught.value) == f"isa={name} is not a level; levels: scalar, avx2, avxvnni, avx512, amx"
    assert _C.isa() == before


def test_set_isa_refuses_what_this_cpu_lacks() -> None:
    before = _C.isa()
    for level in absent_levels():
        with pytest.raises(ValueError) as caught:
            _C.set_isa(level)
        assert str(caught.value) == f"isa={level} is not on this CPU; available: {', '.join(isa_levels())}"
    assert _C.isa() == before


def test_scalar_is_always_there() -> None:
    assert isa_levels()[-1] == "scalar"
    assert isa_levels() == [level for level in LEVELS if level in isa_levels()], "best first"
    with forced("scalar"):
        assert ops.int8_mm(torch.eye(3, dtype=torch.int8), torch.eye(3, dtype=torch.int8)).tolist() == EYE
