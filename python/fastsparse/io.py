"""save and load: a model with its packs in one safetensors file, without pickle.

The file is plain safetensors that any reader opens. Its `__metadata__` (all strings) says what it is:

    format    "fastsparse"
    version   "1"
    modules   JSON: {"encoder.fc1": {"class": "Int8Linear", "in_features": 768, "out_features": 3072, "bias": true,
              "activation": "gelu"}, ...}: the modules that took the place of a dense layer; the keys are those of
              the class's CONFIG
    tied      JSON: {name: name it is stored under}; only where the model ties tensors: each is stored once
    identity  JSON: [name, ...], the model's nn.Identity modules; only where an activation was fused into a layer, since
              nn.Identity then stands in the place of nn.GELU and its like

Packs come first, each at a multiple of 64 bytes from the start of the file (and of a mapping of it).
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import safetensors
import torch
from torch import Tensor, nn

from fastsparse.nn import Int8Linear, SparseInt8Linear, SparseLinear, TrainableSparseLinear, WeightOnlyLinear
from fastsparse.nn._packed import PackedLinear
from fastsparse.ops._packs import repack

FORMAT = "fastsparse"
VERSION = 1

# Each has config(), state_problems() and a constructor that takes its config.
_CLASSES: dict[str, type[PackedLinear]] = {
    "Int8Linear": Int8Linear,
    "SparseInt8Linear": SparseInt8Linear,
    "SparseLinear": SparseLinear,
    "TrainableSparseLinear": TrainableSparseLinear,
    "WeightOnlyLinear": WeightOnlyLinear,
}
_FUSED = (nn.ReLU, nn.GELU, nn.SiLU)  # what nn.Identity may stand for once it runs inside a layer
_PACK_ALIGNMENT = 64
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_Path = str | os.PathLike[str]
_Model = TypeVar("_Model", bound=nn.Module)


def save(model: nn.Module, path: _Path) -> None:
    """Writes the model's state_dict, packs as they are, into one safetensors file.

    The file is never half-written: it is written beside `path`, flushed to disk and then put in its place, so whatever
    fails, an older file under that name is still there, whole.

    Tensors that the model ties (one memory under several names) are stored once and tied again by `load`: into one
    tensor where no model is given, else as the model ties them. Tensors that merely overlap are stored one by one.

    The safetensors library writes tensors in an order of its own and puts the first wherever the header ends. Packs
    shall start at multiples of 64, so this function writes the format itself: 8 bytes length of the header, the header
    (JSON, padded with spaces, which safetensors allows), the bytes of the tensors. Reading goes through the library.

    Args:
        model: any nn.Module whose state_dict holds dense tensors; `fastsparse.nn` modules in it, or not.
        path: the file to make or to replace; its folder must exist.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: an entry of the state_dict can't be stored (no tensor, sparse, a tensor subclass, on meta, a dtype
            without a name in safetensors) or would be refused by `load`; `path` is a folder.
        OSError: the file can't be written; an older file is untouched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be a torch.nn.Module, got {type(model).__name__}")
    target = os.path.realpath(path)  # a link stays a link
    if os.path.isdir(target):
        raise ValueError(f"save: path must be a file, got the folder {os.fspath(path)}")

    state = model.state_dict()
    for name, value in state.items():
        _check_storable(name, value)
    modules, identities = {}, []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Identity:
            identities.append(name)
        for class_name, class_ in _CLASSES.items():
            if isinstance(module, class_):
                problems = module.state_problems(state, _prefix(name))
                if problems:
                    raise ValueError(f"save: {'; '.join(problems)}")
                modules[name] = {"class": class_name, **module.config()}

    tied = {name: group[0] for group in _ties(state) for name in group[1:]}
    metadata = {"format": FORMAT, "version": str(VERSION), "modules": json.dumps(modules)}
    if tied:
        metadata["tied"] = json.dumps(tied)
    if identities and any(config.get("activation") for config in modules.values()):
        metadata["identity"] = json.dumps(identities)

    # A pack is a multiple of 64 bytes long, so once the first one is aligned, all are. Behind them the widest elements
    # come first: every tensor is then aligned to its elements.
    packs = {_prefix(name) + "weight" for name in modules}
    stored = {name: value.detach() for name, value in state.items() if name not in tied}
    order = sorted(stored, key=lambda name: (name not in packs, -stored[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in order:
        value = stored[name]
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PACK_ALIGNMENT)
    _write(target, [struct.pack("<Q", len(text)), text], (_bytes(stored[name]).cpu().numpy() for name in order))


@overload
def load(path: _Path, model: None = None) -> dict[str, Tensor]: ...
@overload
def load(path: _Path, model: _Model) -> _Model: ...
def load(path: _Path, model: nn.Module | None = None) -> nn.Module | dict[str, Tensor]:
    """Reads a file of `save`, into a model or as a dict of tensors.

    All of the file is validated before the model is touched, packs to the last byte; whatever fails, even in a hook of
    the model, leaves the model bit for bit as it was.

    Args:
        path: the file.
        model: the dense architecture (as it was before the conversion), or one that was converted already. Its dense
            layers give way to what the file holds in their place, in their training mode and on their device; all
            other tensors are copied into the model's own (same shape; a floating tensor may change its width). An
            activation that was fused into a layer is part of the file: where it was an nn.ReLU, nn.GELU or nn.SiLU
            module and is nn.Identity in the saved model, it becomes nn.Identity here too. A model that calls it as a
            function in its forward must not do so after loading.

    Returns:
        `model`, or without one {name: tensor}, on the CPU, with tied names sharing one tensor. The tensors own their
        memory: the file may be replaced or deleted.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `model` is no nn.Module.
        ValueError: names the path, what came and what was expected: a folder, an empty, truncated or foreign file, one
            of a newer version, a damaged pack, a scale that is not finite, a model that is not the architecture.
        OSError: the file can't be read.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be a torch.nn.Module, got {type(model).__name__}")
    file = _read(path)
    if model is None:
        return file.tensors
    swaps = _fit(file, model)
    _load_into(file, model, swaps)
    return model


# ---- writing ----


def _check_storable(name: str, value: Any) -> None:
    what = f"save: {name} of the state_dict must be a dense tensor"
    if not isinstance(value, Tensor):
        raise ValueError(f"{what}, got {type(value).__name__}")
    if nn.parameter.is_lazy(value):
        raise ValueError(f"{what}, got one without a shape yet (a lazy layer); run the model once")
    if type(value.detach()) is not Tensor:
        raise ValueError(f"{what}, got the subclass {type(value).__name__}")
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{what} with data, got layout {value.layout} on {value.device}")
    if value.dtype not in _DTYPES:
        raise ValueError(f"{what} of a dtype that safetensors names, got {value.dtype}")
    if name == "__metadata__":
        raise ValueError("save: no tensor may be named __metadata__, the name is taken in safetensors")


def _ties(state: dict[str, Any]) -> list[list[str]]:
    """The groups of names whose tensors are one and the same memory, seen the same way."""
    groups: dict[Any, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided and value.numel() > 0:
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _bytes(value: Tensor) -> Tensor:
    value = value.detach().resolve_conj().resolve_neg().contiguous()
    return value.reshape(-1).view(torch.uint8)


def _write(target: str, head: list[bytes], body: Iterable[Any]) -> None:
    folder, name = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"save: the folder of path must exist, got {folder}")
    # Not tempfile: its files are readable by their owner alone, and os.replace would hand that on to the target.
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as out:
            out.writelines(head)
            out.writelines(body)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the new name must reach the disk too
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- reading ----


@dataclass
class _File:
    path: str
    tensors: dict[str, Tensor]
    tied: dict[str, str]
    modules: dict[str, PackedLinear]  # filled from `tensors`, in no model yet
    identities: list[str]

    def error(self, text: str) -> ValueError:
        return ValueError(f"load: {self.path}: {text}")


def _read(path: _Path) -> _File:
    file = _File(os.fspath(path), {}, {}, {}, [])
    if not os.path.exists(file.path):
        raise FileNotFoundError(f"load: path must be a file written by fastsparse.save, got none at {file.path}")
    if os.path.isdir(file.path):
        raise ValueError(f"load: path must be a file written by fastsparse.save, got the folder {file.path}")
    if Path(file.path).stat().st_size == 0:
        raise file.error("must be a safetensors file, got an empty one")
    try:
        with safetensors.safe_open(file.path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            foreign = _foreign(metadata)
            if not foreign:
                # The library hands out views of a mapping of the file, which dies with the file; a clone does not.
                file.tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (OSError, MemoryError):
        raise
    except Exception as error:  # which exceptions the library has for damaged files is no part of its interface
        raise file.error(f"must be a whole safetensors file, got a truncated or damaged one ({error})") from error
    if foreign:
        raise file.error(foreign)

    file.tied = _tied(file, metadata)
    for alias, name in file.tied.items():
        file.tensors[alias] = file.tensors[name]
    identities = _json(file, metadata, "identity", "[]")
    if not isinstance(identities, list) or not all(isinstance(name, str) for name in identities):
        raise file.error(f"metadata 'identity' must be a JSON list of names, got {_short(identities)}")
    file.identities = identities
    modules = _json(file, metadata, "modules", None)
    if not isinstance(modules, dict):
        raise file.error(f"metadata 'modules' must be a JSON object, got {_short(modules)}")
    for name, config in modules.items():
        file.modules[name] = _build(file, name, config)
    return file


def _foreign(metadata: dict[str, str]) -> str:
    """What makes it a file that this version does not read, or an empty string."""
    format_, version = metadata.get("format"), metadata.get("version")
    if format_ != FORMAT:
        got = f"format {_short(format_)}" if metadata else "no metadata"
        return f"must be a file written by fastsparse.save (format {FORMAT!r}), got a safetensors file with {got}"
    if version != str(VERSION):
        newer = version is not None and version.isdecimal() and version > str(VERSION)
        hint = ", written by a newer fastsparse: upgrade to read it" if newer else ""
        return f"must be of version {VERSION}, got version {_short(version)}{hint}"
    return ""


def _json(file: _File, metadata: dict[str, str], key: str, default: str | None) -> Any:
    text = metadata.get(key, default)
    if text is None:
        raise file.error(f"metadata must hold {key!r}, got only {sorted(metadata)}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise file.error(f"metadata {key!r} must be JSON, got {_short(text)} ({error})") from error


def _tied(file: _File, metadata: dict[str, str]) -> dict[str, str]:
    tied = _json(file, metadata, "tied", "{}")
    if not isinstance(tied, dict):
        raise file.error(f"metadata 'tied' must be a JSON object, got {_short(tied)}")
    for alias, name in tied.items():
        if not isinstance(name, str) or name not in file.tensors or alias in file.tensors:
            raise file.error(f"metadata 'tied' must map names to stored ones, got {_short(alias)} -> {_short(name)}")
    return tied


def _build(file: _File, name: str, config: Any) -> PackedLinear:
    """The module that the file describes under `name`, with its tensors in it: valid, or an error."""
    what = f"module {name!r}"
    got = config.get("class") if isinstance(config, dict) else config
    if not isinstance(config, dict) or not isinstance(got, str) or got not in _CLASSES:
        raise file.error(f"{what} must be of a class this version knows ({', '.join(_CLASSES)}), got {_short(got)}")
    class_ = _CLASSES[got]
    arguments = {key: value for key, value in config.items() if key != "class"}
    keys = sorted(set(class_.CONFIG) - set(class_.optional_config))
    required = sorted(key for key in arguments if key not in class_.optional_config)
    if required != keys or type(arguments["bias"]) is not bool:
        raise file.error(f"{what} must have {', '.join(keys)} (bias true or false), got {_short(config)}")
    try:
        with torch.device("meta"):  # its tensors are those of the file
            module = class_(**arguments)
    except (ValueError, RuntimeError) as error:
        raise file.error(f"{what}: {error}") from error
    prefix = _prefix(name)
    wanted = sorted(prefix + key for key in module.state_dict())
    missing = [key for key in wanted if key not in file.tensors]
    if missing:
        raise file.error(f"{what} must have the tensors {wanted}, got none named {missing}")
    problems = module.state_problems(file.tensors, prefix)
    if problems:
        raise file.error(f"{what}: {'; '.join(problems)}")
    pack = file.tensors[prefix + "weight"]
    # The header was right, and there is one way to pack a weight: so this sees every byte that is not as written by
    # pack(), but for the rare change of weights and column sums that fit each other.
    again = repack(pack)
    if not torch.equal(again, pack):
        raise file.error(f"{what}: {prefix}weight is a damaged pack: its bytes do not agree with one another")
    # Assigned, not copied; but a tie of the file is no reason for two modules of a model to share memory.
    state = {key: file.tensors[prefix + key] for key in module.state_dict()}
    state = {key: value.clone() if prefix + key in file.tied else value for key, value in state.items()}
    state["weight"] = again  # the same bytes, in the large pages that pack() asks for
    module.load_state_dict(state, assign=True)
    return module


# ---- into a model ----


@dataclass
class _Swap:
    parent: nn.Module
    leaf: str
    old: nn.Module
    new: nn.Module

    def do(self) -> None:
        setattr(self.parent, self.leaf, self.new)

    def undo(self) -> None:
        setattr(self.parent, self.leaf, self.old)

    def agrees(self, other: _Swap) -> bool:
        return self.new is other.new or type(self.new) is type(other.new) is nn.Identity


def _fit(file: _File, model: nn.Module) -> dict[str, _Swap]:
    """Which modules of the model have to give way. Raises if the file and the model don't fit; changes nothing."""
    in_model = dict(model.named_modules(remove_duplicate=False))
    for name, module in in_model.items():
        if isinstance(module, tuple(_CLASSES.values())) and name not in file.modules:
            raise file.error(f"model has {type(module).__name__} at {name!r}, where the file holds a dense layer")

    twins: dict[int, PackedLinear] = {}  # a module under several names stays one, if it is one in the file
    swaps: dict[str, _Swap] = {}
    for name, new in file.modules.items():
        old = in_model.get(name)
        if old is None:
            raise file.error(f"model must have a module {name!r}, which the file holds as {new}; got none")
        _check_fits(file, name, old, new)
        # A sparse pack of another length can't be copied into the one that is there: its layer gives way, too.
        if isinstance(old, nn.Linear) or (
            name
            and isinstance(old, (SparseLinear, SparseInt8Linear, TrainableSparseLinear))
            and old.weight.shape != new.weight.shape
        ):
            twin = twins.get(id(old))
            if twin is not None and twin.config() == new.config() and _same_state(twin, new):
                new = twin
            else:
                twins[id(old)] = new
                new.train(old.training).to(old.weight.device)
                if new.bias is not None and old.bias is not None:
                    new.bias.requires_grad_(old.bias.requires_grad)
            swaps[name] = _swap(in_model, name, new)
    for name in file.identities:
        old = in_model.get(name)
        if isinstance(old, _FUSED):
            swaps[name] = _swap(in_model, name, nn.Identity().train(old.training))
        elif type(old) is not nn.Identity:
            got = "none" if old is None else str(old)
            raise file.error(f"model must have nn.Identity or a fused activation at {name!r}, got {got}")

    # A parent that the model has under two names: its child gives way under both, so the file must mean one by both.
    places = {(id(swap.parent), swap.leaf): name for name, swap in swaps.items()}
    for name in filter(None, in_model):
        parent, _, leaf = name.rpartition(".")
        other = places.get((id(in_model[parent]), leaf))
        if other is not None and (name not in swaps or not swaps[name].agrees(swaps[other])):
            raise file.error(f"model has one module as {other!r} and {name!r}, the file two that differ")
    _check_tensors(file, model, swaps)
    return swaps


def _check_fits(file: _File, name: str, old: nn.Module, new: PackedLinear) -> None:
    if isinstance(old, type(new)):
        fits = old.config() == new.config()
    elif isinstance(old, nn.Linear):
        if not name:
            raise file.error(
                f"model must contain the layer to be replaced, got the layer: give an {type(new).__name__}"
            )
        if nn.parameter.is_lazy(old.weight):
            raise file.error(f"model must have shapes, got a lazy layer at {name!r}; run the model once")
        fits = old.weight.shape == (new.out_features, new.in_features) and (old.bias is None) == (new.bias is None)
    else:
        fits = False
    if not fits:
        raise file.error(f"model must have the dense layer of {new} at {name!r}, got {old}")


def _swap(in_model: dict[str, nn.Module], name: str, new: nn.Module) -> _Swap:
    parent, _, leaf = name.rpartition(".")
    return _Swap(in_model[parent], leaf, in_model[name], new)


def _same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(_same(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN is NaN, and it works for dtypes without arithmetic."""
    return a is b or (a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)))


def _kept(model: nn.Module, swaps: Iterable[str]) -> dict[str, Any]:
    """The part of the model's state_dict that stays where it is and is written into."""
    prefixes = tuple(_prefix(name) for name in swaps)
    return {name: value for name, value in model.state_dict().items() if not (prefixes and name.startswith(prefixes))}


def _check_tensors(file: _File, model: nn.Module, swaps: dict[str, _Swap]) -> None:
    kept = _kept(model, swaps)
    from_modules = {_prefix(name) + key for name, module in file.modules.items() for key in module.state_dict()}
    missing = sorted(kept.keys() - file.tensors.keys())
    if missing:
        raise file.error(f"must hold every tensor of the model, got none named {_listed(missing)}")
    unexpected = sorted(file.tensors.keys() - kept.keys() - from_modules)
    if unexpected:
        raise file.error(f"must fit the model, got tensors that the model does not have: {_listed(unexpected)}")
    for name, value in kept.items():
        got = file.tensors[name]
        if not isinstance(value, Tensor) or nn.parameter.is_lazy(value) or value.is_meta:
            raise file.error(f"model must have memory for {name}, got {_place(value)}")
        if got.shape != value.shape or _kind(got.dtype) != _kind(value.dtype):
            raise file.error(
                f"{name} must be {value.dtype} {list(value.shape)} to fit the model, got {got.dtype} {list(got.shape)}"
            )
    for names in _ties(kept):
        for name in names[1:]:
            if not _same(file.tensors[names[0]], file.tensors[name]):
                raise file.error(f"model ties {names[0]} and {name}, the file holds two that differ")


def _place(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a lazy tensor (run the model once)" if nn.parameter.is_lazy(value) else "meta (see Module.to_empty)"


def _load_into(file: _File, model: nn.Module, swaps: dict[str, _Swap]) -> None:
    # Every error that this module can foresee is behind us; hooks of the model may raise what they like.
    kept = _kept(model, swaps)
    before = {name: value.detach().clone() for name, value in kept.items()}
    try:
        for swap in swaps.values():
            swap.do()
        # The versions of the module classes, without which torch takes a state_dict for one of its oldest.
        versions = getattr(model.state_dict(), "_metadata", None)
        state = OrderedDict(file.tensors)
        state._metadata = versions  # type: ignore[attr-defined]
        model.load_state_dict(state)
    except BaseException as error:
        for swap in swaps.values():
            swap.undo()
        with torch.no_grad():
            for name, value in before.items():
                if not _same(kept[name], value):  # a tensor that can't be written to was not
                    kept[name].copy_(value)
        if isinstance(error, RuntimeError):
            raise file.error(f"model does not take the tensors: {error}") from error
        raise


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool or dtype.is_complex:
        return str(dtype)
    return "floating" if dtype.is_floating_point else "integer"


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
