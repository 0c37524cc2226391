"""A family without torch for the tests of the bench: peers that raise, crash, hang, lie, or are not there."""

from __future__ import annotations

import os
import threading

from bench.registry import Call, Check, case, grid, peer


def check(result: int, m: int) -> Check:
    return Check(abs(result - m), 0.0, "difference")


@case(
    "toy",
    shapes=grid(m=[1, 2]),
    unit="GOP/s",
    work=lambda m: float(m),
    check=check,
    compute="int8",
    weight_bytes=lambda m: 64 * m,
    kernel_time=lambda repeats, copies, m: 1e-7,
)
def ours(m: int) -> Call:
    return lambda: m


@peer("toy", "good", check=check)
def good(m: int) -> Call:
    return lambda: sum([m])


@peer("toy", "raises in build", check=check)
def raises_in_build(m: int) -> Call:
    raise RuntimeError("no such kernel")


@peer("toy", "raises in call", check=check)
def raises_in_call(m: int) -> Call:
    def call() -> int:
        raise ValueError(f"cannot do {m}")

    return call


@peer("toy", "crashes at 1", check=check)
def crashes(m: int) -> Call:
    if m == 1:
        os._exit(3)
    return lambda: m


@peer("toy", "not here", check=check, available=lambda: "needs another machine")
def not_here(m: int) -> Call:
    raise AssertionError("must not be built")


@peer("toy", "wrong", check=check)
def wrong(m: int) -> Call:
    return lambda: m + 1


@peer("toy", "prints", check=check)
def prints(m: int) -> Call:
    print("this must not reach the protocol", flush=True)
    os.write(1, b"nor this\n")
    return lambda: m


@peer("toy", "only beyond AVX2", kind="held", check=check, beyond_avx2=True, mallocs=("default",))
def held(m: int) -> Call:
    return lambda: m


@peer("toy", "two threads", kind="threads", check=check, threads=2, mallocs=("default",))
def two(m: int) -> Call:
    return lambda: m


@case("toy_hang", shapes=[{"m": 1}])
def hangs(m: int) -> Call:
    threading.Event().wait()
    return lambda: m
