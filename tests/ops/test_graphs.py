"""Every public function in a whole graph, and every operator's schema and fake kernel: none is forgotten.

The families' own tests look closer: gradients, dynamic shapes, every kind of argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastsparse import ops
from tests.support import same_bits

M, N, K = 3, 19, 23
W = torch.randn(N, K) * (torch.arange(N * K).reshape(N, K) % 3 == 0)
CODES = torch.randint(-128, 128, (N, K), dtype=torch.int8)
X, GRAD, BIAS, SCALE = torch.randn(M, K), torch.randn(M, N), torch.randn(N), torch.rand(N) / 50 + 0.01
S8, PACK, HALF_PACK = ops.pack(CODES), ops.pack(W, "bitmap32"), ops.pack(W.half(), "bitmap32")
INT8_PACK, PAIR = ops.pack(CODES * (CODES > 0), "bitmap_s8"), ops.pack(W, rows=(1, 64))
STRUCTURE, VALUES = ops.sparse_structure(W)
CSR = ops.unpack(STRUCTURE, torch.sparse_csr, VALUES)
CROW, COL = CSR.crow_indices(), CSR.col_indices()
NIBBLES, GROUP_SCALE, _ = ops.quantize_groups(W, 32)
U4 = ops.pack(NIBBLES, "u4", scale=GROUP_SCALE, group_size=32)
POINT, TARGET = torch.tensor(3, dtype=torch.int32), torch.tensor([0, 18, -100])
STEP = torch.tensor(0.05)

# Sizes and errors depend on what is in their tensors: they are called once, when a model is made or loaded.
BEFORE_ANY_GRAPH = {"describe", "pack", "quantize_groups", "sparse_structure", "unpack", "unpack_scales"}
PUBLIC: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "dequantize": (lambda c: ops.dequantize(c, STEP, POINT), (CODES,)),
    "distill_loss": (lambda s, t: ops.distill_loss(s, t, TARGET, 2.0, return_parts=True), (GRAD, GRAD.flip(0))),
    "fake_quantize": (lambda x: ops.fake_quantize(x, STEP, POINT, 4), (X,)),
    "int8_linear": (lambda x: ops.int8_linear(x, S8, SCALE, BIAS, "gelu"), (X,)),
    "int8_mm": (lambda a, b: ops.int8_mm(a, b.t()), (CODES[:M], CODES)),
    "kl_div": (lambda s, t: ops.kl_div(s, t, 2.0, "none"), (GRAD, GRAD.flip(0))),
    "quantize": (lambda x: ops.quantize(x, STEP, POINT), (X,)),
    "quantize_per_token": (ops.quantize_per_token, (X,)),
    "sddmm": (lambda a, b: ops.sddmm(STRUCTURE, a, b, len(VALUES)), (GRAD.t(), X)),
    "sparse_int8_linear": (lambda x: ops.sparse_int8_linear(x, INT8_PACK, SCALE, BIAS, "silu"), (X,)),
    "sparse_linear": (lambda x: ops.sparse_linear(x, PACK, BIAS, "relu") + ops.sparse_linear(x, PAIR, BIAS), (X,)),
    "spmm": (lambda v, d: ops.spmm(STRUCTURE, v, d, N), (VALUES, X.t())),
    "weight_only_linear": (lambda x: ops.weight_only_linear(x, U4, BIAS, out_features=N), (X,)),
}


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_every_public_function_is_here() -> None:
    assert PUBLIC.keys() | BEFORE_ANY_GRAPH == set(ops.__all__)
    assert not PUBLIC.keys() & BEFORE_ANY_GRAPH


@pytest.mark.parametrize("name", PUBLIC)
def test_compile_every_public_function(name: str) -> None:
    run, arguments = PUBLIC[name]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(tensors(compiled(*arguments)), tensors(run(*arguments)), strict=True):
        assert same_bits(got, wanted)


OPERATORS: dict[str, tuple[Any, ...]] = {
    "bitmap_u4_pack": (U4,),
    "csr_to_dense": (CROW, COL, VALUES, N, K),
    "dequantize": (CODES, STEP, POINT),
    "distill_loss": (GRAD, GRAD.flip(0), TARGET, 2.0, 0.5, -100),
    "distill_loss_train": (GRAD, GRAD.flip(0), TARGET, 2.0, 0.5, -100),
    "fake_quantize": (X, STEP, POINT, 4),
    "fake_quantize_backward": (X, torch.ops.fastsparse.fake_quantize_train(X, STEP, POINT, 4)[1]),
    "fake_quantize_train": (X, STEP, POINT, 4),
    "half_pack": (W.half(), 2),
    "half_unpack": (HALF_PACK, N, K, False),
    "half_validate": (HALF_PACK,),
    "int8_linear": (X, S8, SCALE, BIAS, 2),
    "int8_linear_plain": (X, S8, SCALE, BIAS, 2),
    "int8_linear_train": (X, S8, SCALE, BIAS),
    "int8_mm": (CODES[:M], CODES.t()),
    "int8_pack": (CODES,),
    "int8_unpack": (S8, N, K),
    "kl_div": (GRAD, GRAD.flip(0), 2.0, 3),
    "kl_div_train": (GRAD, GRAD.flip(0), 2.0, 3),
    "quantize": (X, STEP, POINT),
    "quantize_per_token": (X,),
    "quantize_per_token_out": (X, torch.empty(M, K, dtype=torch.int8), torch.empty(M, 1)),
    "sparse_activation_grad": (GRAD, GRAD, 3),
    "sparse_check_csr": (CROW, COL, N, K),
    "sparse_int8_linear": (X, INT8_PACK, SCALE, BIAS, 3),
    "sparse_int8_linear_train": (X, INT8_PACK, SCALE, BIAS),
    "sparse_int8_pack": (CODES, 4),
    "sparse_int8_unpack": (INT8_PACK, N, K),
    "sparse_int8_validate": (INT8_PACK,),
    "sparse_linear": (X, PACK, N, BIAS, 1),
    "sparse_linear_train": (X, PACK, N, BIAS, 2),
    "sparse_pack": (W, 4),
    "sparse_sddmm": (GRAD, X, STRUCTURE, len(VALUES)),
    "sparse_sddmm_train": (GRAD, X, STRUCTURE, len(VALUES)),
    "sparse_structure": (CROW, COL, N, K),
    "sparse_structure_indices": (STRUCTURE,),
    "sparse_unpack": (PACK, N, K),
    "sparse_validate": (PACK,),
    "sparse_values_linear": (X, STRUCTURE, VALUES, N, False, BIAS, 2),
    "sparse_values_linear_train": (GRAD, STRUCTURE, VALUES, K, True),
    "u4_dequantize": (U4, N, K),
    "u4_pack": (NIBBLES, GROUP_SCALE, None, 32),
    "u4_unpack": (U4, N, K, 32, False),
    "u4_validate": (U4,),
    "weight_only_linear": (X, U4, None, N, BIAS, 1),
    "weight_only_linear_train": (X, U4, None, N, BIAS),
}
# Their results are numbers, or of sizes that their tensors' values decide, and no graph holds them: no fake kernel.
EAGER_ONLY = {name for name in OPERATORS if name.endswith("validate")} | {
    "csr_to_dense", "sparse_check_csr", "sparse_structure", "sparse_structure_indices",
}  # fmt: skip


def test_every_operator_is_here() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name[:12] == "fastsparse::"}
    assert registered == OPERATORS.keys()


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_every_operator(name: str) -> None:
    utils = ("test_schema", "test_autograd_registration") + (() if name in EAGER_ONLY else ("test_faketensor",))
    opcheck(getattr(torch.ops.fastsparse, name).default, OPERATORS[name], test_utils=utils)
