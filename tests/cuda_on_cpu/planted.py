"""A kernel of ours with one fragment of its source changed, in a build of its own: do our tests see the defect?"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path

import builds
from standin import StandIn


def load(build: str, source: str, right: str, wrong: str) -> StandIn:
    """The library of `build` with `wrong` in place of `right`, which must stand in `source` (under csrc/) once."""
    path = builds.ROOT / "csrc" / source
    text = path.read_text()
    assert text.count(right) == 1, f"{right!r} must stand in {source} once, it does {text.count(right)} times"
    text = text.replace(right, wrong)
    complete = builds.build(build)
    folder = builds.OUT / "planted" / f"{build}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    copy.write_text(text)
    (original,) = [unit for unit in builds.units(build) if unit.source == path]
    # The copy's relative includes are found as from where the original stands.
    unit = builds.Unit(copy, (*original.flags, "-iquote", str(path.parent)))
    builds.compile_unit(unit, folder)
    objects = [complete.parent / other.name() for other in builds.units(build) if other.source != path]
    library = folder / "planted.so"
    command = [builds.CXX, "-shared", *builds.LINK[build], "-o", library, *objects, folder / unit.name(), "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    return Planted(build, library)


class Planted(StandIn):
    def __init__(self, build: str, library: Path) -> None:
        super().__init__(build)
        right, self.library = self.library, ctypes.CDLL(str(library))
        for name in ("simt_allocate", "simt_initialised", "simt_bank_conflicts"):
            mine, theirs = getattr(self.library, name), getattr(right, name)
            mine.restype, mine.argtypes = theirs.restype, theirs.argtypes
