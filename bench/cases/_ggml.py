"""llama.cpp's CPU kernels: a linear layer by ggml, called by ctypes out of the package libggml-python.

The weight lies where llama.cpp puts it: in the first buffer type whose kernels take the product (Q4_0 is repacked by
eights of columns), else as the blocks are.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bench.registry import Call

# enum ggml_type: part of the file format, so they stay what they are.
F32, Q4_0, Q8_0 = 0, 2, 8
BLOCK = 32  # weights that share a scale, in Q4_0 and Q8_0
FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "amx_int8", "llamafile")

_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[object, ...]] = {  # name: (result, *arguments)
    "ggml_log_set": (None, _POINTER, _POINTER),
    "ggml_init": (_POINTER, _InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead": (_SIZE,),
    "ggml_nbytes": (_SIZE, _POINTER),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, ctypes.c_int64, ctypes.c_int64),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_add_inplace": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_threadpool_params_init": (None, _POINTER, _INT),
    "ggml_threadpool_new": (_POINTER, _POINTER),
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    "ggml_backend_cpu_set_threadpool": (None, _POINTER, _POINTER),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_get_device": (_POINTER, _POINTER),
    "ggml_backend_dev_backend_reg": (_POINTER, _POINTER),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_tensor_alloc": (_INT, _POINTER, _POINTER, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_supports_op": (ctypes.c_bool, _POINTER, _POINTER),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
}


def missing() -> str | None:
    if find_spec("libggml") is None:
        return "needs libggml: pip install libggml-python"
    try:
        _library()
    except (OSError, AttributeError) as e:
        return f"libggml can't be loaded: {e}"
    return None


@ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
def _log(level: int, text: bytes, _: int | None) -> None:
    if level in (3, 4):  # warnings and errors; by default each repacked weight is told as well
        sys.stderr.write(text.decode(errors="replace"))


@functools.cache
def _library() -> ctypes.CDLL:
    spec = find_spec("libggml")
    places = spec.submodule_search_locations if spec else None
    found = sorted(path for place in places or () for path in Path(place).glob("lib*/libggml-cpu.so"))
    if not found:
        raise OSError(f"no lib*/libggml-cpu.so in {places}")
    library = ctypes.CDLL(str(found[0]))  # brings libggml-base, whose symbols are found through it
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_log_set(_log, None)
    return library


def built_for(**shape: int) -> str:
    """The instruction sets that the library was compiled for: it has one version of each kernel."""
    ggml = _library()
    return "built for " + ", ".join(name for name in FEATURES if getattr(ggml, f"ggml_cpu_has_{name}")())


@functools.cache
def _backend() -> int:
    """With a pool of threads that stays, as llama.cpp has it: without one each call would start its threads."""
    ggml, threads = _library(), torch.get_num_threads()
    backend: int = ggml.ggml_backend_cpu_init()
    parameters = ctypes.create_string_buffer(4096)  # struct ggml_threadpool_params: 530 bytes in 0.20
    ggml.ggml_threadpool_params_init(parameters, threads)
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    ggml.ggml_backend_cpu_set_threadpool(backend, ggml.ggml_threadpool_new(parameters))
    return backend


def _buffer_types() -> Iterator[int]:
    """Those whose kernels want the weight in a layout of their own, then the plain one."""
    ggml = _library()
    device = ggml.ggml_backend_get_device(_backend())
    address = ggml.ggml_backend_reg_get_proc_address(
        ggml.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    if address:
        types = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(device)
        for i in range(16):
            if not types[i]:
                break
            yield types[i]
    yield ggml.ggml_backend_cpu_buffer_type()


def blocks(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """u8[N, bytes of a row]: Q8_0 is an f16 scale and 32 codes, Q4_0 a scale and codes + 8, the first 16 low.

    codes s8[N, K], scale [N, K / 32].
    """
    n, k = codes.shape
    scales = scale.to(torch.float16).contiguous().view(torch.uint8).view(n, k // BLOCK, 2)
    values = codes.view(n, k // BLOCK, BLOCK)
    if bits == 4:
        nibbles = (values + 8).to(torch.uint8)
        values = nibbles[..., :16] | nibbles[..., 16:] << 4
    return torch.cat((scales, values.view(torch.uint8)), 2).view(n, -1)


def linear(x: Tensor, weight: Tensor, bias: Tensor, bits: int) -> Call:
    """y = x weight^T + bias; weight as `blocks` makes it. ggml rounds x to int8 by blocks of 32 (Q8_0)."""
    ggml, backend = _library(), _backend()
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n)

    def context(tensors: int, graph: bool = False) -> int:
        size = tensors * ggml.ggml_tensor_overhead() + (ggml.ggml_graph_overhead() if graph else 0)
        made: int = ggml.ggml_init(_InitParams(size, None, True))
        return made

    layer = context(5, graph=True)
    frees = [(ggml.ggml_free, layer)]

    def place(tensor: int, memory: Tensor) -> int:
        buffer = ggml.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
        frees.append((ggml.ggml_backend_buffer_free, buffer))
        ggml.ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr())
        return tensor

    x_tensor = place(ggml.ggml_new_tensor_2d(layer, F32, k, m), x)
    for buffer_type in _buffer_types():
        weights = context(1)
        w_tensor = ggml.ggml_new_tensor_2d(weights, Q4_0 if bits == 4 else Q8_0, k, n)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer_type)
        scratch = context(1)
        if supported := ggml.ggml_backend_supports_op(backend, ggml.ggml_mul_mat(scratch, w_tensor, x_tensor)):
            frees += [(ggml.ggml_free, weights), (ggml.ggml_backend_buffer_free, buffer)]
        else:
            ggml.ggml_backend_buffer_free(buffer)
            ggml.ggml_free(weights)
        ggml.ggml_free(scratch)
        if supported:
            break
    else:
        raise RuntimeError(f"ggml has no product of Q{bits}_0 weights [{n}, {k}] with float32 [{m}, {k}]")
    if weight.nbytes != ggml.ggml_nbytes(w_tensor):
        raise RuntimeError(f"ggml wants {ggml.ggml_nbytes(w_tensor)} bytes of weights, got {weight.nbytes}")
    ggml.ggml_backend_tensor_set(w_tensor, weight.data_ptr(), 0, weight.nbytes)

    product = place(ggml.ggml_mul_mat(layer, w_tensor, x_tensor), y)
    bias_tensor = place(ggml.ggml_new_tensor_2d(layer, F32, n, 1), bias)
    graph = ggml.ggml_new_graph(layer)
    ggml.ggml_build_forward_expand(graph, ggml.ggml_add_inplace(layer, product, bias_tensor))

    compute = ggml.ggml_backend_graph_compute

    def call() -> Tensor:
        if status := compute(backend, graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return y

    def free(x: Tensor, bias: Tensor) -> None:
        for function, pointer in reversed(frees):
            function(pointer)

    weakref.finalize(call, free, x, bias)
    return call
