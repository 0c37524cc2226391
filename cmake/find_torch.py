"""Prints torch's folder, version and whether it is a CUDA build, as a CMake list, without importing it."""

import importlib.util
import os
import re
import sys

spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit("torch is not installed in this Python: pip install 'torch>=2.11' first, then build fastsparse")
root = os.path.dirname(spec.origin)
with open(os.path.join(root, "version.py"), encoding="utf-8") as file:
    text = file.read()
version = re.search(r"__version__ = '([^']+)'", text)
cuda = re.search(r"cuda: Optional\[str\] = (?:'([^']+)'|None)", text)
if version is None:
    sys.exit(f"no version found in {root}/version.py")
if tuple(int(n) for n in version.group(1).split(".")[:2]) < (2, 11):
    sys.exit(f"fastsparse needs torch 2.11 or newer, got {version.group(1)}")
print(root, version.group(1), "ON" if cuda and cuda.group(1) else "OFF", sep=";")
