"""What a call of an op costs before its kernel runs, and how to pay less of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload


def eager(op: OpOverload) -> Callable[..., Tensor]:
    """`op` for calls outside torch.compile, which traces the OpOverload itself (`torch.compiler.is_compiling`).

    `OpOverload.__call__` is a Python function that does nothing but call this: 0.3 of 2.7 us on a layer of 16x16. The
    dispatcher, and so modes, fake tensors and autograd, comes behind it.
    """
    call: Callable[..., Any] = op._op
    return call


def no_tensor(op: str, **arguments: Any) -> ValueError:
    """The error of `op` where one of these is no tensor; those that may be None come last."""
    wrong = [(name, value) for name, value in arguments.items() if not isinstance(value, Tensor)]
    name, value = max(wrong, key=lambda each: each[1] is not None)  # the first of them
    return ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
