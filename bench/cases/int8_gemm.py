"""int8_gemm: int8_linear and int8_mm against torch and others, and the fixed cost of a call.

Default grad mode, no operand requires a gradient. Peers call the same torch operators as torch's own modules do, not
the modules, as ours are called without one. Figures count useful work: 2 M N K operations. Freed memory is kept only
for ours and torch's engines: for others the second setting tells nothing new.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench import ceilings
from bench.cases import _ggml
from bench.measure import in_turn
from bench.registry import Call, Check, case, grid, peer

warnings.filterwarnings("ignore", message=".*(quantiz|torch.ao).*")  # that these are deprecated is known

WEIGHTS = ((384, 1536), (768, 768), (768, 3072), (4096, 4096), (4096, 11008))  # (K, N)
LINEAR = [{"m": m, "k": k, "n": n} for k, n in WEIGHTS for m in (1, 4, 16, 64, 128, 512)]
LAYERS = 40  # of 4096 x 4096: 671 MB, beyond any cache
DEFAULT = ("default",)
MM = [{"m": m, "k": k, "n": n} for m, k, n in ((64, 768, 768), (512, 512, 512), (128, 768, 3072))]
SMALL = grid(m=[16], k=[16], n=[16], bias=[1, 0])

# Rows of the result that are held against float64: the whole of M = 512, N = 4096 would take longer than the bench.
CHECKED_ROWS = 16


class Linear(NamedTuple):
    """The operands of a linear layer; all implementations get the same numbers."""

    x: Tensor  # f32[M, K]
    weight: Tensor  # s8[N, K]
    scale: Tensor  # f32[N]
    bias: Tensor | None  # f32[N]


@functools.lru_cache(maxsize=1)
def linear_operands(m: int, k: int, n: int, bias: int = 1) -> Linear:
    """Full-range weights, -128 included; scales that make outputs of about 1."""
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    scale = (torch.rand(n, generator=g) + 0.5) / (74 * k**0.5)
    x = torch.randn(m, k, generator=g)
    return Linear(x, weight, scale, torch.randn(n, generator=g) if bias else None)


@functools.lru_cache(maxsize=1)
def s8_operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """s8[M, K] and s8[K, N], full range."""
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
    return a, torch.randint(-128, 128, (k, n), dtype=torch.int8, generator=g)


def int8_bytes(m: int, k: int, n: int) -> int:
    return n * k


def fp32_bytes(m: int, k: int, n: int) -> int:
    return 4 * n * k


def work(m: int, k: int, n: int) -> float:
    return 2.0 * m * n * k


# ---- checks ----


def _rows(m: int) -> Tensor:
    """Up to CHECKED_ROWS rows, evenly spread, the first and the last among them."""
    return torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).round().long()


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _bias(operands: Linear) -> Tensor:
    return torch.zeros(1, dtype=torch.double) if operands.bias is None else operands.bias.double()


def _oracle(x: Tensor, operands: Linear) -> Tensor:
    """Quantized as the contract says, then float64."""
    try:
        from fastsparse import reference
    except Exception:  # a build that can't be imported; then the same in a few lines
        scale = (x.abs().amax(1, keepdim=True) / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
        codes = (x * (1.0 / scale)).round()
        sums = codes.double() @ operands.weight.double().t()
        return sums * scale.double() * operands.scale.double() + _bias(operands)
    return reference.int8_linear(x, operands.weight, operands.scale, operands.bias)


def check_ours(got: Tensor, m: int, k: int, n: int, bias: int = 1) -> Check:
    """Same codes as the oracle, so only float32 rounding in the epilogue may differ."""
    o, rows = linear_operands(m, k, n, bias), _rows(m)
    return Check(_relative(got[rows], _oracle(o.x[rows], o)), 1e-5, "relative to the oracle, Frobenius norm")


def _check_float(tolerance: float) -> Callable[..., Check]:
    def check(got: Tensor, m: int, k: int, n: int, bias: int = 1) -> Check:
        o, rows = linear_operands(m, k, n, bias), _rows(m)
        want = o.x[rows].double() @ (o.weight.double() * o.scale.double()[:, None]).t() + _bias(o)
        return Check(_relative(got[rows], want), tolerance, "relative to unquantized float64, Frobenius norm")

    return check


def _exact(got: Tensor, want: Tensor) -> Check:
    return Check(float((got.double() - want).abs().max()), 0.0, "largest difference to the exact integers")


def check_mm(got: Tensor, m: int, k: int, n: int) -> Check:
    a, b = s8_operands(m, k, n)
    rows = _rows(m)
    return _exact(got[rows], a[rows].double() @ b.double())


def check_mm_fp32(got: Tensor, m: int, k: int, n: int) -> Check:
    a, b = s8_operands(m, k, n)
    rows = _rows(m)
    return Check(_relative(got[rows], a[rows].double() @ b.double()), 1e-5, "relative to float64, Frobenius norm")


def check_bare(got: Tensor, m: int, k: int, n: int) -> Check:
    codes, rows = _codes(m, k, n), _rows(m)
    return _exact(got[rows], codes[rows].double() @ linear_operands(m, k, n).weight.double().t())


# ---- int8_linear ----


def fastsparse_missing() -> str | None:
    try:
        from fastsparse import ops  # noqa: F401
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None


def linear_kernel_time(repeats: int, copies: int, m: int, k: int, n: int, bias: int = 1) -> float | None:
    """Seconds per launch without the dispatcher, from the extension's own hook; None where a build lacks it."""
    from fastsparse import _C

    hook = getattr(_C, "time_int8_linear", None)
    return float(hook(m, n, k, repeats, copies)) if hook else None


@case(
    "int8_linear",
    shapes=LINEAR,
    unit="GOP/s",
    work=work,
    quick=lambda m, k, n: (k, n) == (768, 768) and m in (1, 16, 128),
    compute="int8",
    weight_bytes=int8_bytes,
    check=check_ours,
    available=fastsparse_missing,
    kernel_time=linear_kernel_time,
)
def ours(m: int, k: int, n: int) -> Call:
    from fastsparse import ops

    o = linear_operands(m, k, n)
    pack = ops.pack(o.weight, "vnni16")
    return lambda: ops.int8_linear(o.x, pack, o.scale, o.bias)


peer(
    "int8_linear",
    "fastsparse, two threads",
    kind="threads",
    compute="int8",
    weight_bytes=int8_bytes,
    check=check_ours,
    available=fastsparse_missing,
    mallocs=DEFAULT,
    threads=2,
)(ours)


def engine_missing(engine: str) -> Callable[[], str | None]:
    def available() -> str | None:
        known = torch.backends.quantized.supported_engines
        return None if engine in known else f"this torch has no quantized engine {engine}, only {', '.join(known)}"

    return available


def torch_dynamic(engine: str) -> Callable[..., Call]:
    """torch.ao.nn.quantized.dynamic.Linear's operator: per-tensor activations, per-channel weights, fused bias.

    reduce_range (7-bit activations) as that module passes it: without it AVX2 saturates and the result is wrong.
    """

    def build(m: int, k: int, n: int, bias: int = 1) -> Call:
        o = linear_operands(m, k, n, bias)
        torch.backends.quantized.engine = engine
        zeros = torch.zeros(n, dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(o.weight, o.scale.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, o.bias)
        linear_dynamic: Any = torch.ops.quantized.linear_dynamic
        return lambda: linear_dynamic(o.x, packed, True)

    return build


for _engine in ("x86", "onednn"):
    peer(
        "int8_linear",
        f"torch {_engine} dynamic",
        kind="fused",
        compute="int8",
        weight_bytes=int8_bytes,
        check=_check_float(0.05),
        available=engine_missing(_engine),
    )(torch_dynamic(_engine))


@functools.lru_cache(maxsize=1)
def _codes(m: int, k: int, n: int) -> Tensor:
    x = linear_operands(m, k, n).x
    return (x * (127.0 / x.abs().amax(1, keepdim=True))).round().to(torch.int8)


@peer(
    "int8_linear",
    "torch._int_mm",
    kind="bare",
    compute="int8",
    weight_bytes=int8_bytes,
    check=check_bare,
    mallocs=DEFAULT,
)
def bare_int_mm(m: int, k: int, n: int) -> Call:
    """No quantize, no epilogue. The weight as torch stores it, [N, K], seen transposed: the faster of both layouts."""
    codes, weight = _codes(m, k, n), linear_operands(m, k, n).weight.clone()
    return lambda: torch._int_mm(codes, weight.t())


@peer(
    "int8_linear",
    "torch._int_mm, eager",
    kind="fused",
    compute="int8",
    weight_bytes=int8_bytes,
    check=_check_float(0.05),
    mallocs=DEFAULT,
)
def eager_int_mm(m: int, k: int, n: int) -> Call:
    """Quantize per token, bare product, scales and bias: each an eager operator, in place where it can be."""
    o = linear_operands(m, k, n)
    weight = o.weight.clone()
    assert o.bias is not None
    bias = o.bias

    def call() -> Tensor:
        scale = o.x.abs().amax(1, keepdim=True).div_(127.0)
        codes = (o.x / scale).round_().to(torch.int8)
        return (torch._int_mm(codes, weight.t()) * scale).mul_(o.scale).add_(bias)

    return call


def package_missing(*packages: str) -> Callable[[], str | None]:
    def available() -> str | None:
        missing = [name for name in packages if find_spec(name) is None]
        return f"needs {' '.join(missing)}: pip install {' '.join(missing)}" if missing else None

    return available


@functools.lru_cache(maxsize=1)
def _torchao(m: int, k: int, n: int) -> tuple[Any, Callable[..., Tensor]]:
    """A template of torchao's tensor, and one compiled function for all weight copies of a shape."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    template = torch.nn.Sequential(torch.nn.Linear(32, 32))
    quantize_(template, Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()  # or the shapes before count against its limit of recompilations
    return template[0].weight, torch.compile(
        lambda x, weight, bias: functional.linear(x, weight, bias), fullgraph=True, dynamic=False
    )


@peer(
    "int8_linear",
    "torchao int8 dynamic, compiled",
    kind="fused",
    compute="int8",
    weight_bytes=int8_bytes,
    check=_check_float(0.05),
    available=package_missing("torchao"),
    mallocs=DEFAULT,
)
def torchao_linear(m: int, k: int, n: int) -> Call:
    """Int8DynamicActivationInt8WeightConfig under torch.compile; the same codes and scales as all others."""
    o = linear_operands(m, k, n)
    template, linear = _torchao(m, k, n)
    options = {"act_quant_kwargs": template.act_quant_kwargs, "reduce_range": template.reduce_range}
    weight = type(template)(o.weight.clone(), o.scale[:, None].clone(), [1, k], torch.float32, **options)

    def call() -> Tensor:
        with torch.no_grad():
            return linear(o.x, weight, o.bias)

    call()  # compiles: no time of the layer's
    return call


@peer(
    "int8_linear",
    "ONNX Runtime dynamic",
    kind="fused",
    compute="int8",
    weight_bytes=int8_bytes,
    check=_check_float(0.05),
    available=package_missing("onnxruntime", "onnx"),
    mallocs=DEFAULT,
)
def onnxruntime_linear(m: int, k: int, n: int) -> Call:
    """One DynamicQuantizeMatMul (u8 activations per tensor, s8 weights per channel, bias), bound to its memory."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    o = linear_operands(m, k, n)
    assert o.bias is not None
    constants = {
        "weight": o.weight.t().contiguous(),
        "scale": o.scale,
        "zero_point": torch.zeros(n, dtype=torch.int8),
        "bias": o.bias,
    }
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = torch.empty(m, n)
    binding = session.io_binding()
    binding.bind_cpu_input("x", o.x.numpy())
    binding.bind_output("y", "cpu", 0, y.numpy().dtype, y.shape, y.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


@peer(
    "int8_linear",
    "OpenVINO static",
    kind="fused",
    compute="int8",
    weight_bytes=int8_bytes,
    check=_check_float(0.05),
    available=package_missing("openvino"),
    mallocs=DEFAULT,
)
def openvino_linear(m: int, k: int, n: int) -> Call:
    """Activations to u8 by the range they are known to have, weights s8 times a scale per channel, bias."""
    import openvino
    from openvino import opset13 as op

    o = linear_operands(m, k, n)
    assert o.bias is not None
    x = op.parameter([m, k], openvino.Type.f32)
    low, high = (value.numpy() for value in o.x.aminmax())
    codes = op.fake_quantize(x, low, high, low, high, 256)
    weight = op.multiply(
        op.convert(op.constant(o.weight.numpy()), openvino.Type.f32), op.constant(o.scale[:, None].numpy())
    )
    y = op.add(op.matmul(codes, weight, False, True), op.constant(o.bias.numpy()))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", settings)
    request = compiled.create_infer_request()
    out = torch.empty(m, n)
    request.set_input_tensor(openvino.Tensor(o.x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))

    def call() -> Tensor:
        request.infer()
        return out

    return call


@peer(
    "int8_linear",
    "torch fp32",
    kind="fp32",
    compute="fp32",
    weight_bytes=fp32_bytes,
    check=_check_float(1e-4),
    mallocs=DEFAULT,
)
@peer(
    "int8_linear",
    "torch fp32 held to AVX2",
    kind="held",
    compute="fp32",
    weight_bytes=fp32_bytes,
    check=_check_float(1e-4),
    env={"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    beyond_avx2=True,
    mallocs=DEFAULT,
)
def fp32_linear(m: int, k: int, n: int, bias: int = 1) -> Call:
    o = linear_operands(m, k, n, bias)
    weight = o.weight.float() * o.scale[:, None]
    return lambda: functional.linear(o.x, weight, o.bias)


peer(
    "int8_linear",
    "fastsparse held to AVX2",
    kind="held",
    compute="int8",
    weight_bytes=int8_bytes,
    check=check_ours,
    available=fastsparse_missing,
    env={"FASTSPARSE_ISA": "avx2"},
    beyond_avx2=True,
    mallocs=DEFAULT,
)(ours)


def plain_reads_missing() -> str | None:
    try:
        ceilings.build()
    except RuntimeError as e:
        return str(e)
    return fastsparse_missing()


def _whole_kilobytes(m: int, k: int, n: int) -> int:
    return int8_bytes(m, k, n) // 1024 * 1024


def plain_reads(m: int, k: int, n: int) -> Call:
    """Reads a pack of the weight and computes nothing: what memory gives to one row, in the same minutes."""
    from fastsparse import ops

    pack = ops.pack(linear_operands(m, k, n).weight, "vnni16")
    read = ceilings.plain_read(pack.data_ptr() + 64, _whole_kilobytes(m, k, n))

    def call() -> Tensor:
        read()
        return pack  # which must live as long

    return call


def plain_reads_time(repeats: int, copies: int, m: int, k: int, n: int) -> float:
    return ceilings.plain_read_seconds(_whole_kilobytes(m, k, n), copies, repeats)


peer(
    "int8_linear",
    "plain reads",
    kind="read",
    weight_bytes=int8_bytes,
    available=plain_reads_missing,
    kernel_time=plain_reads_time,
    mallocs=DEFAULT,
    wants=lambda m, k, n: m == 1,
)(plain_reads)


# ---- 40 layers in turn: the weights are read from DRAM ----


def layers_bytes(m: int, k: int, n: int) -> int:
    return LAYERS * int8_bytes(m, k, n)


def layers(build: Callable[..., Call]) -> Callable[..., Call]:
    """One call runs LAYERS copies of the layer on the same x; its result is the last one's."""

    def build_layers(m: int, k: int, n: int) -> Call:
        calls = [build(m, k, n) for _ in range(LAYERS)]

        def call() -> Any:
            for layer in calls:
                y = layer()
            return y

        return call

    return build_layers


case(
    "int8_linear 40 layers",
    shapes=[{"m": m, "k": 4096, "n": 4096} for m in (1, 16)],
    unit="GOP/s",
    work=lambda m, k, n: LAYERS * work(m, k, n),
    quick=lambda **_: False,
    compute="int8",
    weight_bytes=layers_bytes,
    check=check_ours,
    available=fastsparse_missing,
    mallocs=DEFAULT,
)(layers(ours))

peer(
    "int8_linear 40 layers",
    "fastsparse, two threads",
    kind="threads",
    compute="int8",
    weight_bytes=layers_bytes,
    check=check_ours,
    available=fastsparse_missing,
    mallocs=DEFAULT,
    threads=2,
)(layers(ours))

peer(
    "int8_linear 40 layers",
    "torch onednn dynamic",
    kind="fused",
    compute="int8",
    weight_bytes=layers_bytes,
    check=_check_float(0.05),
    available=engine_missing("onednn"),
    mallocs=DEFAULT,
)(layers(torch_dynamic("onednn")))

peer(
    "int8_linear 40 layers",
    "torch._int_mm",
    kind="bare",
    compute="int8",
    weight_bytes=layers_bytes,
    check=check_bare,
    mallocs=DEFAULT,
)(layers(bare_int_mm))


peer(
    "int8_linear 40 layers",
    "plain reads",
    kind="read",
    weight_bytes=layers_bytes,
    available=plain_reads_missing,
    mallocs=DEFAULT,
    wants=lambda m, k, n: m == 1,
)(layers(plain_reads))


# ---- int8_mm ----


@case(
    "int8_mm",
    shapes=MM,
    unit="GOP/s",
    work=work,
    quick=lambda m, k, n: (m, k, n) == (64, 768, 768),
    compute="int8",
    weight_bytes=int8_bytes,
    check=check_mm,
    available=fastsparse_missing,
)
def ours_mm(m: int, k: int, n: int) -> Call:
    from fastsparse import ops

    a, b = s8_operands(m, k, n)
    b = b.clone()
    return lambda: ops.int8_mm(a, b)


@peer("int8_mm", "torch._int_mm", kind="bare", compute="int8", weight_bytes=int8_bytes, check=check_mm)
def torch_int_mm(m: int, k: int, n: int) -> Call:
    a, b = s8_operands(m, k, n)
    b = b.clone()
    return lambda: torch._int_mm(a, b)


@peer("int8_mm", "torch fp32", kind="fp32", compute="fp32", weight_bytes=fp32_bytes, check=check_mm_fp32)
def fp32_mm(m: int, k: int, n: int) -> Call:
    a, b = (operand.float() for operand in s8_operands(m, k, n))
    return lambda: torch.mm(a, b)


# ---- the fixed cost of a call: 16x16 is no work ----


@case(
    "call_cost",
    shapes=SMALL,
    check=check_ours,
    available=fastsparse_missing,
    kernel_time=linear_kernel_time,
)
def ours_small(m: int, k: int, n: int, bias: int) -> Call:
    from fastsparse import ops

    o = linear_operands(m, k, n, bias)
    pack = ops.pack(o.weight, "vnni16")
    return lambda: ops.int8_linear(o.x, pack, o.scale, o.bias)


peer("call_cost", "torch fp32", kind="fp32", check=_check_float(1e-4))(fp32_linear)
peer(
    "call_cost",
    "torch x86 dynamic",
    kind="fused",
    check=_check_float(0.05),
    available=engine_missing("x86"),
)(torch_dynamic("x86"))


# ---- weight_only_linear: 8 bits per channel (group 0) and 4 bits in groups, few rows ----

WEIGHT_ONLY = [
    {"m": m, "k": k, "n": n, "bits": bits, "group": group}
    for k, n in ((768, 3072), (4096, 4096), (4096, 11008))
    for m in (1, 4, 16)
    for bits, group in ((8, 0), (4, 32), (4, 64), (4, 128))
]
# One row, weights in turn that no cache holds: what the family is for.
FROM_DRAM = [shape for shape in WEIGHT_ONLY if shape["m"] == 1 and shape["k"] == 4096]


class WeightOnly(NamedTuple):
    """The operands; codes of 4 bits lie in [-8, 7]."""

    x: Tensor  # f32[M, K]
    codes: Tensor  # s8[N, K]
    scale: Tensor  # f32[N], or f16[N, groups] for 4 bits
    bias: Tensor  # f32[N]

    def dense(self, group: int) -> Tensor:
        """The weight in float32."""
        if group == 0:
            return self.codes.float() * self.scale[:, None]
        return self.codes.float() * self.scale.float().repeat_interleave(group, 1)[:, : self.codes.shape[1]]


@functools.lru_cache(maxsize=1)
def weight_only_operands(m: int, k: int, n: int, bits: int, group: int) -> WeightOnly:
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n + bits)
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (n, k), dtype=torch.int8, generator=g)
    scale = (torch.rand(n, max(-(-k // group) if group else 1, 1), generator=g) + 0.5) / (0.58 * top * k**0.5)
    return WeightOnly(
        torch.randn(m, k, generator=g),
        codes,
        scale.half() if group else scale.squeeze(1),
        torch.randn(n, generator=g),
    )


def weight_only_work(m: int, k: int, n: int, bits: int, group: int) -> float:
    return work(m, k, n)


def weight_only_bytes(m: int, k: int, n: int, bits: int, group: int) -> int:
    return n * k * bits // 8 + (2 * n * -(-k // group) if group else 0)


def check_weight_only(got: Tensor, m: int, k: int, n: int, bits: int, group: int) -> Check:
    from fastsparse import reference

    o = weight_only_operands(m, k, n, bits, group)
    want = reference.weight_only_linear(o.x, o.codes, o.scale, o.bias, group_size=group or None)
    return Check(_relative(got, want), 1e-5, "relative to the oracle, Frobenius norm")


def _check_dense(tolerance: float) -> Callable[..., Check]:
    def check(got: Tensor, m: int, k: int, n: int, bits: int, group: int) -> Check:
        o = weight_only_operands(m, k, n, bits, group)
        want = o.x.double() @ o.dense(group).double().t() + o.bias.double()
        return Check(_relative(got, want), tolerance, "relative to float64 with x as it is, Frobenius norm")

    return check


def weight_only_kernel_time(repeats: int, copies: int, m: int, k: int, n: int, bits: int, group: int) -> float | None:
    from fastsparse import _C

    return float(_C.time_weight_only_linear(m, n, k, bits, group, repeats, copies))


@case(
    "weight_only_linear",
    shapes=WEIGHT_ONLY,
    unit="GOP/s",
    work=weight_only_work,
    quick=lambda m, k, n, bits, group: (k, n, group) == (768, 3072, 64),
    compute="int8",
    weight_bytes=weight_only_bytes,
    check=check_weight_only,
    available=fastsparse_missing,
    kernel_time=weight_only_kernel_time,
)
def ours_weight_only(m: int, k: int, n: int, bits: int, group: int) -> Call:
    from fastsparse import ops

    o = weight_only_operands(m, k, n, bits, group)
    if bits == 8:
        pack = ops.pack(o.codes, "vnni16")
        return lambda: ops.weight_only_linear(o.x, pack, o.bias, None, o.scale)
    pack = ops.pack(o.codes, "u4", scale=o.scale, group_size=group)
    return lambda: ops.weight_only_linear(o.x, pack, o.bias)


def int8_in_its_place(m: int, k: int, n: int, bits: int, group: int) -> Call:
    """int8_linear: the same weight, rounded to 8 bits per channel where it has 4."""
    from fastsparse import ops, reference

    o = weight_only_operands(m, k, n, bits, group)
    codes, scale = (o.codes, o.scale) if bits == 8 else reference.quantize_weight(o.dense(group))
    pack = ops.pack(codes, "vnni16")
    return lambda: ops.int8_linear(o.x, pack, scale, o.bias)


def fp32_in_its_place(m: int, k: int, n: int, bits: int, group: int) -> Call:
    o = weight_only_operands(m, k, n, bits, group)
    weight = o.dense(group)
    return lambda: functional.linear(o.x, weight, o.bias)


def int8_in_its_place_bytes(m: int, k: int, n: int, bits: int, group: int) -> int:
    return n * k


def onnxruntime_missing() -> str | None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except Exception as e:
        return f"onnxruntime and onnx can't be imported: {e}"
    return None


def onnxruntime_matmul_nbits(m: int, k: int, n: int, bits: int, group: int) -> Call:
    """MatMulNBits at accuracy level 4 (x rounded to int8 in blocks), symmetric, float32 scales, fused bias."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    if bits != 4:
        raise ValueError("MatMulNBits is measured with 4 bits alone")
    o = weight_only_operands(m, k, n, bits, group)
    nibbles = (o.codes + 8).to(torch.uint8).numpy().reshape(n, k // group, group)
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    constants = {
        "B": packed,
        "scales": o.scale.float().numpy().reshape(n, -1),
        "bias": o.bias.numpy(),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["A", "B", "scales", "", "", "bias"],
        ["Y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=group,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = torch.empty(m, n)
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, "A", o.x), (binding.bind_output, "Y", y)):
        bind(name, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


peer(
    "weight_only_linear",
    "onnxruntime MatMulNBits",
    compute="int8",
    weight_bytes=weight_only_bytes,
    check=_check_dense(0.02),
    available=onnxruntime_missing,
)(onnxruntime_matmul_nbits)


case(
    "weight_only_linear from DRAM",
    shapes=FROM_DRAM,
    unit="GOP/s",
    work=weight_only_work,
    quick=lambda m, k, n, bits, group: False,
    check=check_weight_only,
    available=fastsparse_missing,
    mallocs=("default",),
)(in_turn(ours_weight_only, weight_only_bytes))

for _case, _wrapped in (("weight_only_linear", False), ("weight_only_linear from DRAM", True)):
    for _name, _kind, _build, _bytes, _tolerance in (
        ("fastsparse int8_linear", "fused", int8_in_its_place, int8_in_its_place_bytes, 0.02),
        ("torch fp32", "fp32", fp32_in_its_place, lambda **s: 4 * int8_in_its_place_bytes(**s), 1e-4),
    ):
        peer(
            _case,
            _name,
            kind=_kind,  # type: ignore[arg-type]
            compute=None if _wrapped else "fp32" if _kind == "fp32" else "int8",
            weight_bytes=None if _wrapped else _bytes,
            check=_check_dense(_tolerance),
            mallocs=("default",) if _wrapped else ("default", "keep"),
        )(in_turn(_build, _bytes) if _wrapped else _build)


def ggml_bytes(m: int, k: int, n: int, bits: int, group: int) -> int:
    return n * (k // _ggml.BLOCK) * (4 * bits + 2)


def ggml_linear(m: int, k: int, n: int, bits: int, group: int) -> Call:
    """The codes and scales of all others; Q8_0 has the channel's scale, rounded to float16, in each of its blocks."""
    o = weight_only_operands(m, k, n, bits, group)
    scale = o.scale if bits == 4 else o.scale[:, None].expand(n, k // _ggml.BLOCK)
    return _ggml.linear(o.x, _ggml.blocks(o.codes, scale, bits), o.bias, bits)


for _case, _wrapped in (("weight_only_linear", False), ("weight_only_linear from DRAM", True)):
    for _bits, _group in ((4, _ggml.BLOCK), (8, 0)):
        peer(
            _case,
            f"llama.cpp Q{_bits}_0",
            compute=None if _wrapped else "int8",
            weight_bytes=None if _wrapped else ggml_bytes,
            check=_check_dense(0.02),
            available=_ggml.missing,
            mallocs=DEFAULT,
            wants=lambda m, k, n, bits, group, _of=(_bits, _group): (bits, group) == _of,
            note=_ggml.built_for,
        )(in_turn(ggml_linear, ggml_bytes) if _wrapped else ggml_linear)
