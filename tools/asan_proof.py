"""Steps of tools/test_asan.sh that show which build is tested, and that it would catch an error.

which PREFIX SANITIZE   fails unless the fastsparse that is imported lies under PREFIX and was built with SANITIZE
write LIBRARY           writes one byte past a heap buffer, in a library built with the same flags
add LIBRARY             overflows a signed addition there
read ISA                lets a kernel of libfastsparse.so itself read past a heap buffer
"""

from __future__ import annotations

import ctypes
import sys


def which(prefix: str, sanitize: str) -> None:
    import fastsparse
    from fastsparse import _library

    _C = _library.load()
    built = _C.build_info()["sanitize"]
    print(f"test_asan: {fastsparse.__file__}, {_C.__file__}, sanitize={built}")
    for path in (fastsparse.__file__, _C.__file__):
        if not path.startswith(prefix):
            sys.exit(f"test_asan: {path} is not the build under {prefix}")
    if built != sanitize:
        sys.exit(f"test_asan: the library was built with sanitize={built}, wanted {sanitize}")


def malloc(size: int) -> int:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    address = libc.malloc(size)
    assert address
    return int(address)


def write(library: str) -> None:
    write_at = ctypes.CDLL(library).write_at
    write_at.argtypes = [ctypes.c_void_p, ctypes.c_long]
    write_at(malloc(64), 64)


def add(library: str) -> None:
    ctypes.CDLL(library).add(2**31 - 1, 1)


def read(isa: str) -> None:
    import torch

    from fastsparse import _library, ops

    _C = _library.load()
    _C.set_isa(isa)
    # A tensor that claims 256 bytes of a block of 255.
    lie = (ctypes.c_char * 256).from_address(malloc(255))
    a = torch.frombuffer(lie, dtype=torch.int8).reshape(1, 256)
    ops.int8_mm(a, torch.ones((256, 16), dtype=torch.int8))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
