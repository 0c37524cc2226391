"""What a call of an op costs before its kernel runs, and how to pay less of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastsparse._library import load


def eager(op: OpOverload) -> Callable[..., Tensor]:
    """`op` for calls outside torch.compile, which traces the OpOverload itself (`torch.compiler.is_compiling`).

    `OpOverload.__call__` is a Python function that does nothing but call this: 0.3 of 2.7 us on a layer of 16x16. The
    dispatcher, and so modes, fake tensors and autograd, comes behind it.
    """
    call: Callable[..., Any] = op._op
    return call


@functools.cache
def _short_way() -> bool:
    """Whether torch lets `_C` read tensors (csrc/direct.h); if so, `_C` knows from here on what it needs to."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    modes = (
        torch._C._len_torch_dispatch_stack,  # fake tensors, tracing, counting
        torch._C._is_torch_function_mode_enabled,
        torch._C._is_tracing,
        torch._C._autograd._profiler_enabled,  # it shows ops
    )
    return table is not None and load().direct_setup(table, Tensor, torch.nn.Parameter, Tensor.is_neg, modes)


def direct(name: str) -> Callable[..., Tensor | None]:
    """The op of this name without the dispatcher, which is half of what a call of a small layer costs: y for plain
    tensors on the CPU with nothing to record, None where the op itself has to be asked. Not under torch.compile.

    Why and how: docs/decisions/0011-short-calls.md.
    """
    if not _short_way():
        return lambda *_: None
    function: Callable[..., Tensor | None] = getattr(load(), name)
    return function


def whole(inputs: tuple[Any, ...], *defaults: Any, count: int) -> tuple[Any, ...]:
    """All `count` inputs of an op, of which the dispatcher drops trailing ones that have their default."""
    return (*inputs, *defaults[len(inputs) - count + len(defaults) :])


def as_matrix(t: Tensor) -> Tensor:
    """[..., K] as [M, K]; a reshape to -1 could not say what M is where K = 0, and flatten knows no batches (vmap)."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def no_tensor(op: str, **arguments: Any) -> ValueError:
    """The error of `op` where one of these is no tensor; those that may be None come last."""
    wrong = [(name, value) for name, value in arguments.items() if not isinstance(value, Tensor)]
    name, value = max(wrong, key=lambda each: each[1] is not None)  # the first of them
    return ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
