"""`make gpu-check`: everything about the CUDA kernels that only a GPU can say, within ten minutes.

Builds fastsparse with its CUDA kernels beside the torch that is there (no network: --no-build-isolation --no-deps),
then on the device: the tests of tests/cuda_on_cpu, `fastsparse check`, compute-sanitizer (memcheck, racecheck) on the
small cases, and every op timed by CUDA events against its peers, over inputs that rotate through more memory than L2
holds. Writes docs/gpu-results.json, and the last column of docs/gpu-status.md. What fails or is missing is said and
recorded; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import gpu_status

ROOT = gpu_status.ROOT
SITE = ROOT / "build" / "gpu" / "site"
RESULTS = ROOT / "docs" / "gpu-results.json"
SECONDS = 570  # of the ten minutes


@dataclass
class Op:
    """One op at one shape: what runs, its peers, and the work that a ceiling is held against."""

    family: str
    what: str
    kernels: tuple[str, ...]
    make: Callable[[], list[Callable[[], Any]]]  # the call over each set of inputs, so many that L2 can't hold them
    peers: dict[str, Callable[[], list[Callable[[], Any]]]]
    work: float  # bytes or operations
    ceiling: str
    aims: dict[str, float] = field(default_factory=dict)  # at least: of the ceiling, or times a peer (set on an H100)


def main() -> int:
    parser = argparse.ArgumentParser(description="What only a GPU can say about the CUDA kernels.")
    parser.add_argument("--no-build", action="store_true", help="use the fastsparse that is installed")
    parser.add_argument(
        "--device", default="cuda", help="cpu tries this script without a GPU; nothing is recorded then"
    )
    options = parser.parse_args()
    end = time.monotonic() + SECONDS
    results: dict[str, Any] = {"steps": {}, "commit": _commit()}
    environment = {**os.environ, "FASTSPARSE_UNPROVEN": "1", "FASTSPARSE_TEST_DEVICE": options.device}
    if not options.no_build:
        step(results, "build", BUILD, environment, end, limit=300)
        environment["PYTHONPATH"] = str(SITE)
        sys.path.insert(0, str(SITE))
        if results["steps"]["build"]["status"] != 0:
            return finish(results, options.device)
    os.environ.update(environment)
    tests = [sys.executable, "tests/cuda_on_cpu/plain.py"]
    step(results, "tests", tests, environment, end, limit=180)
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            results["steps"][tool] = {"status": None, "tail": "compute-sanitizer is not on this machine"}
        else:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests, "--small"]
            step(results, tool, command, environment, end, limit=100)
    try:
        measure(results, options.device, end)
    except Exception as error:  # the tests' results stand without it
        results["steps"]["timing"] = {"status": 1, "tail": f"{type(error).__name__}: {error}"}
    return finish(results, options.device)


BUILD = [
    *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--upgrade", "--target", str(SITE)),
    *("-C", "cmake.define.FASTSPARSE_CUDA=ON", "-C", "build-dir=build/gpu/cmake", "."),
]


def step(
    results: dict[str, Any], name: str, command: list[str], environment: dict[str, str], end: float, limit: float
) -> None:
    print(f"--- {name}: {' '.join(command)}", flush=True)
    begin = time.monotonic()
    limit = min(limit, end - begin)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=max(limit, 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        status, output = done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        status, output = 124, (error.stdout or b"").decode(errors="replace") + f"\nno end after {limit:.0f} s"
    print(output[-3000:], flush=True)
    seconds = round(time.monotonic() - begin, 1)
    results["steps"][name] = {"status": status, "seconds": seconds, "tail": output[-2000:]}


def finish(results: dict[str, Any], device: str) -> int:
    bad = [name for name, found in results["steps"].items() if found["status"] != 0]
    print(json.dumps({**results, "steps": {k: v["status"] for k, v in results["steps"].items()}}, indent=1))
    print(f"gpu-check: {'all steps passed' if not bad else 'not passed: ' + ', '.join(bad)}", flush=True)
    if device != "cpu":
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        facts = gpu_status.load()
        record(results, facts.setdefault("kernels", {}))
        gpu_status.write(facts)
    return 1 if bad else 0


def record(results: dict[str, Any], kernels: dict[str, Any]) -> None:
    """The hardware's part of docs/gpu-status.json: only for kernels of families that `check` really ran."""
    held = {row["family"]: row for row in results.get("check", [])}
    tests = results["steps"].get("tests", {}).get("status")
    for name in gpu_status.kernels_in_sources():
        row = held.get(name.split("/")[1])
        if row is None or row["cases"] == 0:
            continue
        ok = tests == 0 and row["result"] == "ok"
        timings = [timing for timing in results.get("timings", []) if name.split()[1] in timing["kernels"]]
        kernels.setdefault(name, {})["hardware"] = {
            "device": results["device"],
            "commit": results["commit"],
            "result": "tests passed" if ok else "FAILED",
            "worst": row["worst"],
            "timings": timings,
        }


# --- Timing: only from here on torch is needed ------------------------------------------------------------------------


def measure(results: dict[str, Any], device: str, end: float) -> None:
    import torch

    import fastsparse

    results["device"] = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    results["torch"], results["info"] = torch.__version__, fastsparse.info()
    results["check"] = fastsparse.check(device).rows
    results["steps"]["check"] = {"status": 0 if all(row["result"] == "ok" for row in results["check"]) else 1}
    ceilings = results["ceilings"] = measure_ceilings(device)
    results["timings"] = []
    for op in ops(device):
        if time.monotonic() > end:
            results["steps"]["timing"] = {"status": 124, "tail": f"no time left for {op.what}"}
            return
        row: dict[str, Any] = {"family": op.family, "what": op.what, "kernels": op.kernels, "ceiling": op.ceiling}
        row["seconds"] = seconds(op.make(), device)
        row["fraction"] = op.work / row["seconds"] / ceilings[op.ceiling]
        for name, make in op.peers.items():
            try:
                row.setdefault("peers", {})[name] = seconds(make(), device)
            except Exception as error:  # a peer that can't is no reason to lose our figure
                row.setdefault("peers", {})[name] = f"{type(error).__name__}: {error}"
        results["timings"].append(row)
        ratios = {k: v / row["seconds"] for k, v in row.get("peers", {}).items() if isinstance(v, float)}
        said = {k: f"{ratios[k]:.2f}x" if k in ratios else v for k, v in row.get("peers", {}).items()}
        print(f"{op.what}: {row['seconds'] * 1e6:.1f} us, {row['fraction']:.2f} of {op.ceiling}; {said}", flush=True)
        for name, goal in op.aims.items():
            reached = row["fraction"] if name == op.ceiling else ratios.get(name)
            row.setdefault("aims", {})[name] = {"at_least": goal, "measured": reached}
            verdict = "not measured" if reached is None else "met" if reached >= goal else "missed"
            print(f"  aim: at least {goal:g} {'of' if name == op.ceiling else 'times'} {name}: {verdict}", flush=True)
    results["steps"]["timing"] = {"status": 0}


def measure_ceilings(device: str) -> dict[str, float]:
    """What the device reaches by torch's own means: bytes copied a second, operations a second of each type."""
    import torch

    side = 8192 if device != "cpu" else 256
    source = torch.empty(side * side * 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a8 = torch.ones(side, side, dtype=torch.int8, device=device)
    a16 = torch.ones(side, side, dtype=torch.float16, device=device)
    a32 = torch.ones(side // 2, side // 2, device=device)
    return {
        "copy": 2 * source.nbytes / seconds([lambda: target.copy_(source)], device),
        "int8": 2 * side**3 / seconds([lambda: torch._int_mm(a8, a8.t())], device),
        "fp16": 2 * side**3 / seconds([lambda: a16 @ a16.t()], device),
        "fp32": 2 * (side // 2) ** 3 / seconds([lambda: a32 @ a32.t()], device),
    }


def seconds(calls: list[Callable[[], Any]], device: str) -> float:
    """Of one call: the median of 15 bursts between CUDA events, each burst once round all sets of inputs or more."""
    import torch

    rounds = max(1, 20 // len(calls))
    found = []
    for burst in range(18):
        if device == "cpu":
            begin = time.perf_counter()
        else:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        for _ in range(rounds):
            for call in calls:
                call()
        if device == "cpu":
            elapsed = time.perf_counter() - begin
        else:
            last.record()
            torch.cuda.synchronize()
            elapsed = first.elapsed_time(last) / 1e3
        if burst >= 3:  # the first ones warm up
            found.append(elapsed / (rounds * len(calls)))
    return sorted(found)[len(found) // 2]


def ops(device: str) -> Iterator[Op]:
    import torch
    from torch.nn import functional as F

    import fastsparse.ops as fs

    small = device == "cpu"

    def sets(make: Callable[[], tuple[Any, ...]], call: Callable[..., Any]) -> Callable[[], list[Callable[[], Any]]]:
        """The call over so many sets of inputs that together they are larger than any L2."""

        def calls() -> list[Callable[[], Any]]:
            first = make()
            one = sum(value.nbytes for value in first if isinstance(value, torch.Tensor))
            count = 2 if small else max(2, min(64, 256 * 2**20 // max(one, 1)))
            inputs = [first, *(make() for _ in range(count - 1))]
            return [lambda values=values: call(*values) for values in inputs]  # type: ignore[misc]

        return calls

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def eager_int8(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x_scale = x.abs().amax(1, keepdim=True).float() / 127
        codes = (x / x_scale).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(codes, w.t()).float() * x_scale * scale).to(x.dtype)

    n = k = 64 if small else 4096
    for m in (1, 16, 64, 128, 2048):
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        pack = fs.pack(codes).to(device)
        w, scale = codes.to(device), torch.rand(n, device=device)
        dense = random(n, k, dtype=torch.bfloat16)
        few = m < 64
        yield Op(
            "int8_gemm",
            f"int8_linear {m}x{n}x{k} bf16",
            ("multiply_few" if m <= 16 else "multiply", "quantize_rows"),
            # Few rows are bound by the weights' bytes, so these rotate too.
            sets(
                lambda m=m, pack=pack: (random(m, k, dtype=torch.bfloat16), pack.clone()),
                lambda x, p, s=scale: fs.int8_linear(x, p, s),
            ),
            {
                "eager quantize + _int_mm + epilogue": sets(
                    lambda m=m, w=w: (random(m, k, dtype=torch.bfloat16), w.clone()),
                    lambda x, w, s=scale: eager_int8(x, w, s),
                ),
                "bf16 linear": sets(lambda m=m, d=dense: (random(m, k, dtype=torch.bfloat16), d.clone()), F.linear),
            },
            n * k if few else 2 * m * n * k,
            "copy" if few else "int8",
            {"copy": 0.85} if few else {"eager quantize + _int_mm + epilogue": 1.0},
        )

    weight = torch.randn(n, k)
    for bits, group in ((8, None), (4, 32), (4, 128)):
        if group is None:
            w_scale = weight.abs().amax(1) / 127
            pack = fs.pack((weight / w_scale[:, None]).round().to(torch.int8)).to(device)
            w_scale = w_scale.to(device)
        else:
            nibbles, scales, points = fs.quantize_groups(weight, group)
            pack = fs.pack(nibbles, "u4", scale=scales, zero_point=points, group_size=group).to(device)
            w_scale = None
        dense = weight.to(device, torch.bfloat16)
        for m in (1, 16):
            yield Op(
                "int8_gemm",
                f"weight_only_linear {m}x{n}x{k} bf16, {bits} bits{'' if group is None else f' in groups of {group}'}",
                ("multiply_groups", "quantize_groups"),
                sets(
                    lambda m=m, pack=pack: (random(m, k, dtype=torch.bfloat16), pack.clone()),
                    lambda x, p, s=w_scale: fs.weight_only_linear(x, p, None, None, s, n),
                ),
                {"bf16 linear": sets(lambda m=m, d=dense: (random(m, k, dtype=torch.bfloat16), d.clone()), F.linear)},
                pack.nbytes,
                "copy",
                {} if group is None else {"bf16 linear": 3.0},
            )

    # A layer inside a chain: codes in, residual added, codes out.
    m = 64 if small else 2048
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    chained, w, scale = fs.pack(codes).to(device), codes.to(device), torch.rand(n, device=device)

    def chain_inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device), random(m, n, dtype=torch.bfloat16)

    def eager_chain(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = torch._int_mm(x, w.t()).float() * 0.02 * scale + residual
        return (y.relu() / 0.05).round().clamp(-128, 127).to(torch.int8)

    yield Op(
        "int8_gemm",
        f"int8_linear {m}x{n}x{k} int8 to int8, residual, relu",
        ("multiply",),
        sets(
            chain_inputs,
            lambda x, r: fs.int8_linear(x, chained, scale, None, "relu", 0.02, None, r, 0.05, None, torch.bfloat16),
        ),
        {"_int_mm + eager epilogue": sets(chain_inputs, eager_chain)},
        2 * m * n * k,
        "int8",
    )

    rows, columns = (64, 64) if small else (8192, 4096)
    size = rows * columns
    one = torch.tensor([0.02], device=device)
    x = lambda: (random(rows, columns),)  # noqa: E731
    coded = lambda: (torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=device),)  # noqa: E731

    def eager_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8), scale

    def eager_fake(x: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127)

    shape = f"{rows}x{columns} fp32"
    yield Op(
        "qdq",
        f"quantize_per_token {shape}",
        ("token_by_warp", "token_by_block"),
        sets(x, fs.quantize_per_token),
        {"eager": sets(x, eager_token)},
        5 * size,
        "copy",
    )
    yield Op(
        "qdq",
        f"quantize {shape}",
        ("quantize_all",),
        sets(x, lambda x: fs.quantize(x, one)),
        {"eager": sets(x, lambda x: (x / one).round().clamp(-128, 127).to(torch.int8))},
        5 * size,
        "copy",
    )
    yield Op(
        "qdq",
        f"dequantize {shape}",
        ("dequantize_all",),
        sets(coded, lambda c: fs.dequantize(c, one)),
        {"eager": sets(coded, lambda c: c * one)},
        5 * size,
        "copy",
    )
    yield Op(
        "qdq",
        f"fake_quantize {shape}",
        ("fake_quantize_all",),
        sets(x, lambda x: fs.fake_quantize(x, one)),
        {"torch": sets(x, eager_fake)},
        8 * size,
        "copy",
    )

    rows, classes = (32, 1000) if small else (4096, 32000)

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        return random(rows, classes).requires_grad_(), random(rows, classes)

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> None:
        torch.autograd.grad(fs.kl_div(student, teacher, 2.0), student)

    def eager(student: torch.Tensor, teacher: torch.Tensor) -> None:
        log_s, log_t = (F.log_softmax(value / 2.0, -1) for value in (student, teacher))
        torch.autograd.grad(F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * 4.0, student)

    yield Op(
        "kl_loss",
        f"kl_div, loss and gradient, {rows}x{classes} fp32",
        ("rows_by_block", "sum_rows"),
        sets(logits, ours),
        {"eager": sets(logits, eager)},
        12 * rows * classes,
        "copy",
    )

    for zeros in (0.5, 0.9):
        weight = torch.randn(n, k) * (torch.rand(n, k) >= zeros)
        packed = fs.pack(weight, "bitmap32")
        sparse, full, header = packed.to(device), weight.to(device), fs.describe(packed)
        for m in (1, 16):
            yield Op(
                "sparse_matmul",
                f"sparse_linear bitmap32 {m}x{n}x{k} fp32, {zeros:.0%} zeros",
                ("few_rows",),
                sets(
                    lambda m=m, p=sparse: (random(m, k), p.clone()),
                    lambda x, p, h=header: fs.sparse_linear(x, p, header=h),
                ),
                {"dense linear": sets(lambda m=m, w=full: (random(m, k), w.clone()), F.linear)},
                sparse.nbytes,
                "copy",
            )

    # Training: forward, gradient to x, gradient to the values.
    m, zeros = (64, 0.9) if small else (512, 0.9)
    weight = torch.randn(n, k) * (torch.rand(n, k) >= zeros)
    structure, values = (each.to(device) for each in fs.sparse_structure(weight))
    full, csr = weight.to(device), weight.to_sparse_csr().to(device)
    raw, work = torch.ops.fastsparse, 2.0 * m * values.numel()
    shape = f"{m}x{n}x{k} fp32, {zeros:.0%} zeros"
    x32, dy32 = (lambda: (random(m, k),)), (lambda: (random(m, n),))
    both = lambda: (random(m, n), random(m, k))  # noqa: E731
    of_w, of_w_t = ("row_ends", "value_columns"), ("count_columns", "column_ends", "fill_columns")
    yield Op(
        "sparse_matmul",
        f"sparse_linear with values, forward, {shape}",
        ("transpose", "spmm_rows", *of_w),
        sets(x32, lambda x: raw.sparse_values_linear(x, structure, values, n, False)),
        {
            "dense linear": sets(x32, lambda x: F.linear(x, full)),
            "torch.sparse.mm": sets(x32, lambda x: torch.sparse.mm(csr, x.t())),
        },
        work,
        "fp32",
    )
    yield Op(
        "sparse_matmul",
        f"sparse_linear with values, gradient to x, {shape}",
        ("transpose", "spmm_rows", *of_w_t),
        sets(dy32, lambda dy: raw.sparse_values_linear(dy, structure, values, k, True)),
        {"dense": sets(dy32, lambda dy: dy @ full)},
        work,
        "fp32",
    )
    yield Op(
        "sparse_matmul",
        f"sddmm {shape}",
        ("transpose", "sddmm_values", *of_w),
        sets(both, lambda dy, x: raw.sparse_sddmm(dy, x, structure, values.numel())),
        {"dense": sets(both, lambda dy, x: dy.t() @ x)},
        work,
        "fp32",
    )

    if small:  # no CPU kernel reads packs of 16-bit values
        return
    weight = torch.randn(n, k)
    for zeros in (0.5, 0.7):
        half = (weight * (torch.rand(n, k) >= zeros)).bfloat16()
        packed = fs.pack(half, "bitmap32")
        there, full, header = packed.to(device), half.to(device), fs.describe(packed)
        for m in (1, 8, 16):
            yield Op(
                "sparse_matmul",
                f"sparse_linear bitmap32 {m}x{n}x{k} bf16, {zeros:.0%} zeros",
                ("few_rows16",),
                sets(
                    lambda m=m, p=there: (random(m, k, dtype=torch.bfloat16), p.clone()),
                    lambda x, p, h=header: fs.sparse_linear(x, p, header=h),
                ),
                {"dense linear": sets(lambda m=m, w=full: (random(m, k, dtype=torch.bfloat16), w.clone()), F.linear)},
                packed.nbytes,
                "copy",
            )

    m = 2048
    x16 = lambda: (random(m, k, dtype=torch.float16),)  # noqa: E731
    squares = [("nm24", "", torch.arange(k) % 4 < 2)]
    for side, part in ((32, 0.5), (64, 0.5), (64, 0.25)):
        kept = (torch.rand(n // side, k // side) < part).repeat_interleave(side, 0).repeat_interleave(side, 1)
        squares.append(("blocks16", f", {part:.0%} of the squares of {side}", kept))
    for format, what, kept in squares:
        half = (weight * kept).half()
        packed = fs.pack(half, format)
        there, full, header = packed.to(device), half.to(device), fs.describe(packed)
        yield Op(
            "sparse_matmul",
            f"sparse_linear {format} {m}x{n}x{k} fp16{what}",
            ("multiply_sparse",) if format == "nm24" else ("multiply_blocks",),
            sets(x16, lambda x, p=there, h=header: fs.sparse_linear(x, p, header=h)),
            {"dense linear": sets(x16, lambda x, w=full: F.linear(x, w))},
            2 * m * n * k,
            "fp16",
        )


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
