"""The last step of tools/test_cuda_build.sh: what a build with CUDA kernels does where there is no GPU.

try_cuda_build.py PREFIX    PREFIX: where the fastsparse that is imported must lie
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import fastsparse
from fastsparse import _library, ops, reference


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


def main(prefix: str) -> None:
    library = _library.library_path()
    cuda = _library.load().build_info()["cuda"]
    print(f"test_cuda_build: {library}, CUDA {cuda}, torch {torch.__version__}")
    assert str(library).startswith(prefix), f"{library} is not the build under {prefix}"
    assert cuda != "off", "the library was built without CUDA"
    assert fastsparse.info()["cuda_unproven"], "info() must name the kernels that never ran"

    x, weight, scale = torch.randn(5, 67), torch.randint(-128, 128, (33, 67), dtype=torch.int8), torch.rand(33)
    torch.testing.assert_close(
        ops.int8_linear(x, ops.pack(weight), scale), reference.int8_linear(x, weight, scale).float()
    )
    codes, _ = ops.quantize_per_token(x)
    assert codes.dtype == torch.int8

    # The entries for CUDA, which a CPU torch has no tensors for: called with a CPU tensor.
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    raw = torch.ops.fastsparse
    structure, values = ops.sparse_structure(weight.float())
    y = torch.randn(5, 33)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (raw.int8_linear, (x, ops.pack(weight), scale)),
        (raw.sparse_linear, (x, ops.pack(weight.float(), "bitmap32"), 33)),
        (raw.sparse_values_linear, (x, structure, values, 33, False)),
        (raw.sparse_values_linear_train, (x, structure, values, 33, False)),
        (raw.sparse_sddmm, (y, x, structure, values.numel())),
        (raw.sparse_sddmm_train, (y, x, structure, values.numel())),
    ]
    os.environ.pop("FASTSPARSE_UNPROVEN", None)
    expected = "this torch is a CPU build" if torch.version.cuda is None else "never run on hardware"
    for op, arguments in calls:
        said = message_of(lambda op=op, arguments=arguments: op.default.redispatch(key, *arguments))
        assert expected in said, said
    print("test_cuda_build: loads, runs on the CPU, and says why not on CUDA:", said)


if __name__ == "__main__":
    main(sys.argv[1])
