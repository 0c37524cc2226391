"""info and check: what they say here, and what they say where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastsparse
from fastsparse import _info, cli


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastsparse.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_info_names_what_runs() -> None:
    facts = fastsparse.info()
    assert facts["problem"] is None
    assert facts["version"] == fastsparse.__version__ != "0+unknown"
    assert facts["isa"] in facts["isa_available"]
    assert facts["isa_available"][-1] == "scalar"
    text = _info.info_text()
    assert facts["torch"] in text
    assert f"ISA level   {facts['isa']}: {facts['isa_reason']}" in text


def test_info_says_that_a_cap_is_in_force() -> None:
    done = run("info", FASTSPARSE_ISA="scalar")
    assert done.returncode == 0
    assert "ISA level   scalar: capped by FASTSPARSE_ISA=scalar" in done.stdout


def test_info_names_a_cap_that_does_not_exist() -> None:
    done = run("info", "--json", FASTSPARSE_ISA="sse9")
    assert done.returncode == 1
    assert json.loads(done.stdout)["problem"].startswith("FASTSPARSE_ISA=sse9 is not a level")


def fake_torch(folder: Path, version: str, init: str) -> str:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(init)
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return str(folder)


OPS = "class ops:\n    @staticmethod\n    def load_library(path):\n        raise OSError('undefined symbol: torch_x')\n"


@pytest.mark.parametrize(
    ("version", "init", "expected"),
    [
        ("2.4.1", "", "torch 2.4.1 is too old: fastsparse needs 2.11 or newer"),
        ("2.12.0", "raise OSError('libtorch_cpu.so: cannot open')", "can't be imported: OSError: libtorch_cpu.so"),
        ("2.12.0", f"__version__ = '2.12.0'\n{OPS}", "libfastsparse.so does not fit torch 2.12.0 (undefined symbol"),
    ],
    ids=["too old", "broken", "foreign"],
)
def test_info_with_a_torch_that_is_wrong(tmp_path: Path, version: str, init: str, expected: str) -> None:
    path = fake_torch(tmp_path, version, init)
    done = run("info", PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM" in done.stdout
    assert expected in done.stdout
    for command in ("check", "demo"):
        done = run(command, PYTHONPATH=path)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_info_without_torch() -> None:
    script = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "from fastsparse.cli import main\n"
        "sys.exit(main(['info']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "torch is not installed: pip install 'torch>=2.11'" in done.stdout


def test_check_is_green_and_names_every_kernel() -> None:
    report = fastsparse.check()
    assert report.ok, str(report)
    from fastsparse import _library

    kernels = _library.load().kernels()
    runnable = {(k["family"], k["name"]) for k in kernels if k["usable"] and k["level"] != "cuda"}
    assert {(row["family"], row["kernel"]) for row in report.rows} == runnable
    assert all(row["cases"] > 40 for row in report.rows)


@pytest.mark.parametrize("name", ["scalar", "best"])
@pytest.mark.parametrize("family", ["int8_gemm", "qdq", "kl_loss", "sparse_matmul", "sparse_int8"])
def test_check_names_a_wrong_kernel(
    family: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsparse import _check, _library

    # The other families' cases, which test_check_is_green runs, would take minutes here.
    cases = {key: value if key[0] == family else [] for key, value in _check.CASES.items()}
    monkeypatch.setattr(_check, "CASES", cases)

    extension = _library.load()
    if name == "best":
        name = next(row["name"] for row in extension.kernels() if row["family"] == family and row["selected"])
    extension.spoil_kernel(family, name)
    try:
        report = fastsparse.check("cpu")
        assert not report.ok
        wrong = {(row["family"], row["kernel"]): row["result"] for row in report.rows if row["result"] != "ok"}
        assert wrong == {(family, name): "FAILED"}
        assert cli.main(["check", "--device", "cpu"]) == 1
        assert f"FAILED: {family} {name}, first at" in capsys.readouterr().out
    finally:
        extension.spoil_kernel(family, "")
    assert fastsparse.check("cpu").ok  # what was spoiled is whole again


def test_check_refuses_a_device_that_is_not_here() -> None:
    done = run("check", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "device must be one that this machine has, got 'cuda'" in done.stderr


def test_spoil_kernel_refuses_unknown_names() -> None:
    from fastsparse import _library

    with pytest.raises(ValueError, match="no kernel named sse9"):
        _library.load().spoil_kernel("int8_gemm", "sse9")
    with pytest.raises(ValueError, match="no family named sse9"):
        _library.load().spoil_kernel("sse9", "avx2")
