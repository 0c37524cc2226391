"""save and load: what comes back is what went in, and whatever is wrong with a file harms nothing."""

from __future__ import annotations

import copy
import json
import os
import stat
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastsparse
from fastsparse import ops
from fastsparse.nn import Int8Linear, WeightOnlyLinear
from tests.support import asks_for_huge_pages, forced, isa_levels


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(37)
        self.up = nn.Linear(37, 50)
        self.act = nn.GELU()
        self.down = nn.Linear(50, 37, bias=False)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    """Sizes are odd on purpose: the tensors behind the packs are not of 64 bytes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(19, 37)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(37, 3)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x))) * self.mask


def dense_net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def converted(model):
    """All in Int8Linear but the stem, in the first block with the activation inside."""
    model = copy.deepcopy(model)
    for i, block in enumerate(model.blocks):
        block.up = Int8Linear.from_linear(block.up, "gelu" if i == 0 else None)
        block.down = Int8Linear.from_linear(block.down)
    model.blocks[0].act = nn.Identity()
    model.head = Int8Linear.from_linear(model.head)
    return model


INT8 = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
X = torch.randn(5, 19, generator=torch.Generator().manual_seed(3))


class Snapshot:
    """Everything of a model that loading could change; holds if none of it did."""

    def __init__(self, model):
        self.model = model
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.tensors = list(model.state_dict(keep_vars=True).items())
        self.values = [value.detach().clone() for _, value in self.tensors]

    def holds(self):
        modules = list(self.model.named_modules(remove_duplicate=False))
        tensors = list(self.model.state_dict(keep_vars=True).items())
        return (
            [(name, id(module)) for name, module in modules] == [(name, id(module)) for name, module in self.modules]
            and [(name, id(value)) for name, value in tensors] == [(name, id(value)) for name, value in self.tensors]
            and all(torch.equal(now, then) for (_, now), then in zip(tensors, self.values, strict=True))
        )


@pytest.fixture(scope="module")
def whole():
    """The bytes of a good file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        fastsparse.save(converted(dense_net()), f"{folder}/net.safetensors")
        with open(f"{folder}/net.safetensors", "rb") as file:
            return file.read()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def split(data):
    """(header, bytes of the tensors) of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edited(data, edit):
    """`data` with the metadata changed by `edit`, which may change the dict in place or return another."""
    header, body = split(data)
    header["__metadata__"] = edit(header["__metadata__"]) or header["__metadata__"]
    return join(header, body)


def refused(path, data, message):
    """Both ways of loading refuse `data`, name the path, and leave the model alone."""
    path.write_bytes(data)
    model = dense_net(1)
    before = Snapshot(model)
    for load in (lambda: fastsparse.load(path), lambda: fastsparse.load(path, model)):
        with pytest.raises(ValueError, match=message) as caught:
            load()
        assert str(path) in str(caught.value)
    assert before.holds()


# ---- round trips ----


@pytest.mark.parametrize("convert", [True, False])
def test_round_trip_into_the_dense_architecture(path, convert):
    model = converted(dense_net()) if convert else dense_net()
    fastsparse.save(model, path)
    target = dense_net(1).train()
    kept = target.stem.weight
    assert fastsparse.load(path, target) is target
    assert repr(target) == repr(model)
    assert target.stem.weight is kept
    assert all(module.training for module in target.modules())
    assert torch.equal(target.eval()(X), model(X))


def test_round_trip_into_a_converted_model(path):
    model = converted(dense_net())
    fastsparse.save(model, str(path))
    target = converted(dense_net(1))
    head = target.head
    fastsparse.load(str(path), target)
    assert target.head is head
    assert torch.equal(target(X), model(X))


def test_round_trip_as_tensors(path):
    model = converted(dense_net())
    fastsparse.save(model, path)
    tensors = fastsparse.load(path)
    state = model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) and tensors[name].dtype == state[name].dtype for name in state)


def test_round_trip_of_a_layer_alone(path):
    layer = Int8Linear.from_linear(nn.Linear(9, 5), "silu")
    fastsparse.save(layer, path)
    target = fastsparse.load(path, Int8Linear(9, 5, activation="silu"))
    assert torch.equal(target(torch.ones(9)), layer(torch.ones(9)))
    with pytest.raises(ValueError, match="model must contain the layer to be replaced"):
        fastsparse.load(path, nn.Linear(9, 5))


def test_a_loaded_model_owns_its_tensors(path):
    model = converted(dense_net())
    fastsparse.save(model, path)
    target, tensors = fastsparse.load(path, dense_net(1)), fastsparse.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(target(X), model(X))
    assert torch.equal(tensors["head.weight"], model.head.weight)
    assert target.head.weight.untyped_storage().nbytes() == target.head.weight.numel()


def test_a_large_pack_that_was_loaded_asks_for_huge_pages(path):
    fastsparse.save(nn.Sequential(Int8Linear.from_linear(nn.Linear(4096, 2048))), path)
    assert asks_for_huge_pages(fastsparse.load(path, nn.Sequential(nn.Linear(4096, 2048)))[0].weight)


def test_a_loaded_model_saves_the_same_bytes(path, whole):
    path.write_bytes(whole)
    model = fastsparse.load(path, dense_net(1))
    fastsparse.save(model, path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("saved", isa_levels())
def test_a_file_of_one_level_is_that_of_any_other(path, saved):
    dense = nn.Sequential(nn.Linear(19, 37), nn.Linear(37, 50), nn.Linear(50, 33), nn.Linear(33, 5))

    def convert(model):
        return nn.Sequential(
            Int8Linear.from_linear(model[0], "gelu"),
            WeightOnlyLinear.from_linear(model[1], activation="silu"),
            WeightOnlyLinear.from_linear(model[2], 4, 32),
            WeightOnlyLinear.from_linear(model[3], 4, 64, symmetric=False),
        )

    with forced(saved):
        model = convert(dense)
        fastsparse.save(model, path)
        wanted = model(X)
    state, data = model.state_dict(), path.read_bytes()
    for loaded in isa_levels():
        with forced(loaded):
            model = fastsparse.load(path, copy.deepcopy(dense))
            assert torch.equal(model(X), wanted)
            other = convert(dense)
            other.load_state_dict(state)
            assert torch.equal(other(X), wanted)
            fastsparse.save(convert(dense), path.with_name("other"))
            assert path.with_name("other").read_bytes() == data


def test_bias_keeps_the_gradient_flag_of_the_dense_layer(path):
    fastsparse.save(converted(dense_net()), path)
    target = fastsparse.load(path, dense_net(1).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert fastsparse.load(path, dense_net(1)).head.bias.requires_grad


def test_floating_tensors_take_the_width_of_the_model(path):
    model = converted(dense_net())
    fastsparse.save(model, path)
    target = fastsparse.load(path, dense_net(1).bfloat16())
    assert target.stem.weight.dtype == torch.bfloat16
    assert torch.equal(target.stem.weight, model.stem.weight.bfloat16())
    assert target.head.weight_scale.dtype == torch.float32
    assert target(X.bfloat16()).dtype == torch.bfloat16


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape(path, dtype, shape):
    def net(value):
        module = nn.Sequential(nn.Linear(3, 2))
        module.register_buffer("value", value)
        return module

    value = (torch.rand(shape) * 3).to(dtype)
    fastsparse.save(net(value), path)
    for got in (fastsparse.load(path)["value"], fastsparse.load(path, net(torch.zeros(shape, dtype=dtype))).value):
        assert got.dtype == dtype
        assert got.shape == shape
        assert got.tolist() == value.tolist()
    assert torch.equal(safetensors.torch.load_file(path)["0.bias"], fastsparse.load(path)["0.bias"])


def test_views_are_stored_as_what_they_show(path):
    base = torch.arange(24.0).reshape(4, 6)
    model = nn.Module()
    model.register_buffer("columns", base[:, ::2])
    model.register_buffer("transposed", base.t())
    model.register_buffer("row", base[1])
    model.register_buffer("expanded", torch.ones(1).expand(3))
    model.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
    fastsparse.save(model, path)
    for name, value in fastsparse.load(path).items():
        assert torch.equal(value, model.get_buffer(name))


def test_nan_and_infinity_in_dense_tensors_are_kept(path):
    model = dense_net()
    with torch.no_grad():
        model.stem.weight[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    fastsparse.save(model, path)
    target = fastsparse.load(path, dense_net(1))
    assert torch.equal(target.stem.weight.view(torch.int32), model.stem.weight.view(torch.int32))


# ---- the file ----


def test_packs_come_first_and_are_aligned(path):
    fastsparse.save(converted(dense_net()), path)
    data = path.read_bytes()
    header, body = split(data)
    start = len(data) - len(body)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    packs = {f"{name}.weight" for name in INT8}
    assert all(offsets[name] % 64 == 0 for name in packs)
    assert all(data[offsets[name] :][:4] == b"fspk" for name in packs)
    assert max(offsets[name] for name in packs) < min(offsets[name] for name in offsets if name not in packs)
    width = {"F32": 4, "I64": 8, "BOOL": 1, "U8": 1}
    assert all(offsets[name] % width[header[name]["dtype"]] == 0 for name in offsets)


@pytest.mark.parametrize("length", range(0, 64, 7))
def test_packs_are_aligned_whatever_the_length_of_the_header(path, length):
    model = nn.ModuleDict({"a" * (length + 1): Int8Linear(5, 3)})
    fastsparse.save(model, path)
    assert path.read_bytes().index(b"fspk") % 64 == 0


def test_any_reader_of_safetensors_opens_it(path):
    model = converted(dense_net())
    fastsparse.save(model, path)
    tensors = safetensors.torch.load_file(path)
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


def test_metadata(path):
    fastsparse.save(converted(dense_net()), path)
    metadata = split(path.read_bytes())[0]["__metadata__"]
    assert metadata["format"] == "fastsparse"
    assert metadata["version"] == "1"
    modules = json.loads(metadata["modules"])
    assert sorted(modules) == sorted(INT8)
    assert modules["blocks.0.up"] == {
        "class": "Int8Linear",
        "in_features": 37,
        "out_features": 50,
        "bias": True,
        "activation": "gelu",
    }
    assert json.loads(metadata["identity"]) == ["blocks.0.act"]


def test_a_model_without_packs(path):
    fastsparse.save(nn.Module(), path)
    assert fastsparse.load(path) == {}
    fastsparse.load(path, nn.Module())
    fastsparse.save(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), path)
    assert split(path.read_bytes())[0]["__metadata__"] == {"format": "fastsparse", "version": "1", "modules": "{}"}


# ---- tied tensors ----


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.project = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.shared = nn.ModuleList([nn.Linear(6, 4)] * 2 if tie else [nn.Linear(6, 4), nn.Linear(6, 4)])
        if tie:
            self.head.weight = self.embedding.weight


def test_tied_tensors_are_stored_once(path):
    model = Tied()
    fastsparse.save(model, path)
    header = split(path.read_bytes())[0]
    tied = {"head.weight": "embedding.weight", "shared.1.weight": "shared.0.weight", "shared.1.bias": "shared.0.bias"}
    assert json.loads(header["__metadata__"]["tied"]) == tied
    assert not header.keys() & tied.keys()
    tensors = fastsparse.load(path)
    assert tensors.keys() == model.state_dict().keys()
    assert all(tensors[a] is tensors[b] for a, b in tied.items())

    target = fastsparse.load(path, Tied())
    assert target.head.weight is target.embedding.weight
    assert torch.equal(target.head.weight, model.head.weight)
    loose = fastsparse.load(path, Tied(tie=False))  # a model that does not tie gets the value under each name
    assert loose.head.weight is not loose.embedding.weight
    assert torch.equal(loose.head.weight, model.head.weight)


def test_a_module_under_two_names(path):
    model = Tied()
    model.shared[0] = model.shared[1] = Int8Linear.from_linear(model.shared[0])
    fastsparse.save(model, path)
    for target in (Tied(), Tied(tie=False)):
        was_tied = target.shared[0] is target.shared[1]
        fastsparse.load(path, target)
        assert (target.shared[0] is target.shared[1]) == was_tied
        assert torch.equal(target.shared[1].weight, model.shared[1].weight)
        same_memory = target.shared[0].bias.data_ptr() == target.shared[1].bias.data_ptr()
        assert same_memory == was_tied


def test_a_model_that_ties_what_the_file_does_not(path):
    fastsparse.save(Tied(tie=False), path)
    target = Tied()
    before = Snapshot(target)
    with pytest.raises(
        ValueError, match=r"model ties embedding\.weight and head\.weight, the file holds two that differ"
    ):
        fastsparse.load(path, target)
    assert before.holds()


@pytest.mark.parametrize("places", [[0], [1], [0, 1]])
def test_a_module_under_two_names_that_are_two_in_the_file(path, places):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for i in places:
        model[i] = Int8Linear.from_linear(model[i])
    fastsparse.save(model, path)
    target = fastsparse.load(path, nn.Sequential(*[nn.Linear(6, 6)] * 2))
    x = torch.randn(3, 6)
    assert torch.equal(target(x), model(x))


def test_a_child_of_a_module_under_two_names(path):
    def net(one):
        first = nn.Sequential(nn.Linear(4, 4))
        return nn.Sequential(first, first if one else nn.Sequential(nn.Linear(4, 4)))

    for places in ([0], [1], [0, 1]):
        model = net(one=False)
        for i in places:
            model[i][0] = Int8Linear.from_linear(model[i][0])
        fastsparse.save(model, path)
        target = net(one=True)
        before = Snapshot(target)
        with pytest.raises(ValueError, match=r"model has one module as '[01]\.0' and '[01]\.0', the file two"):
            fastsparse.load(path, target)
        assert before.holds()

    model = net(one=True)
    model[0][0] = Int8Linear.from_linear(model[0][0])
    fastsparse.save(model, path)
    fastsparse.load(path, target)
    assert isinstance(target[1][0], Int8Linear)
    assert target[0][0] is target[1][0]


# ---- errors of save ----


def bad_module(**buffers):
    module = nn.Module()
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


class ExtraState(nn.Module):
    def get_extra_state(self):
        return {"a": 1}


def broken_layer(**changes):
    module = Int8Linear(5, 3)
    for name, value in changes.items():
        setattr(module, name, value)
    return nn.Sequential(module)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({}, TypeError, r"model must be a torch\.nn\.Module, got dict"),
        (ExtraState(), ValueError, r"_extra_state of the state_dict must be a dense tensor, got dict"),
        (bad_module(a=torch.eye(2).to_sparse()), ValueError, r"a of the state_dict .* got layout torch\.sparse_coo"),
        (bad_module(a=torch.ones(2, device="meta")), ValueError, r"a of the state_dict .* on meta"),
        (bad_module(a=torch.ones(2, dtype=torch.complex128)), ValueError, r"safetensors names, got torch\.complex128"),
        (bad_module(__metadata__=torch.ones(2)), ValueError, r"no tensor may be named __metadata__"),
        (broken_layer(weight_scale=torch.full((3,), float("nan"))), ValueError, r"0\.weight_scale must be finite"),
        (broken_layer(weight=torch.zeros(9, dtype=torch.uint8)), ValueError, r"0\.weight must be a pack of \[N=3, K=5"),
        (nn.LazyLinear(3), ValueError, r"without a shape yet"),
    ],
    ids=["dict", "extra_state", "sparse", "meta", "complex128", "name", "scale", "pack", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_save_refuses(path, model, error, message):
    path.write_bytes(b"older")
    with pytest.raises(error, match=rf"^save: .*{message}"):
        fastsparse.save(model, path)
    assert path.read_bytes() == b"older"
    assert os.listdir(path.parent) == [path.name]


def test_save_refuses_folders(tmp_path):
    with pytest.raises(ValueError, match="path must be a file, got the folder"):
        fastsparse.save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the folder of path must exist, got .*absent"):
        fastsparse.save(nn.Linear(2, 2), tmp_path / "absent" / "net.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(path, monkeypatch, function, error):
    fastsparse.save(converted(dense_net()), path)
    older = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        fastsparse.save(converted(dense_net(1)), path)
    monkeypatch.undo()
    assert path.read_bytes() == older
    assert os.listdir(path.parent) == [path.name]


def test_a_tensor_that_fails_in_the_middle_leaves_the_old_file(path, monkeypatch):
    fastsparse.save(converted(dense_net()), path)
    older, calls = path.read_bytes(), []

    def fail(value):
        calls.append(value)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return real(value)

    real = fastsparse.io._bytes
    monkeypatch.setattr(fastsparse.io, "_bytes", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fastsparse.save(converted(dense_net(1)), path)
    assert path.read_bytes() == older
    assert os.listdir(path.parent) == [path.name]


def test_the_file_has_the_mode_of_any_other_and_links_stay(tmp_path):
    plain, path, link = tmp_path / "plain", tmp_path / "net", tmp_path / "link"
    plain.touch()
    fastsparse.save(nn.Linear(2, 2), path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    link.symlink_to(path)
    fastsparse.save(nn.Linear(3, 3), link)
    assert link.is_symlink()
    assert fastsparse.load(path)["bias"].shape == (3,)


# ---- files that are refused ----


def test_load_refuses_arguments(path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        fastsparse.load(path, {})
    model = dense_net()
    before = Snapshot(model)
    for arguments in ((path,), (path, model)):
        with pytest.raises(FileNotFoundError, match=f"got none at {path}"):
            fastsparse.load(*arguments)
        with pytest.raises(ValueError, match=f"got the folder {path.parent}"):
            fastsparse.load(path.parent, *arguments[1:])
    assert before.holds()


def test_truncated_anywhere(path, whole):
    refused(path, b"", "got an empty one")
    model = dense_net(1)
    before = Snapshot(model)
    start = len(whole) - len(split(whole)[1])
    # Every byte round the seams, and a spread over the rest.
    lengths = {
        *range(1, 24),
        *range(start - 12, start + 80),
        *range(24, len(whole), 199),
        *range(len(whole) - 9, len(whole)),
    }
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged") as caught:
            fastsparse.load(path, model)
        assert str(path) in str(caught.value)
    assert before.holds()


def test_longer_than_it_says(path, whole):
    refused(path, whole + b"\0", "truncated or damaged")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + b"\0" * 100, "truncated or damaged"),
        (b"text, nothing but text\n" * 9, "truncated or damaged"),
        (safetensors.torch.save({"a": torch.ones(3)}), "format 'fastsparse'.* got a safetensors file with no metadata"),
        (safetensors.torch.save({"a": torch.ones(3)}, {"format": "pt"}), "got a safetensors file with format 'pt'"),
    ],
    ids=["zip", "text", "no_metadata", "other_format"],
)
def test_foreign_files(path, data, message):
    refused(path, data, message)


def test_pickles_are_not_opened(path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    torch.save(Bomb(), path)
    refused(path, path.read_bytes(), "truncated or damaged")


def with_module(**changes):
    def edit(metadata):
        modules = json.loads(metadata["modules"])
        modules["head"].update(changes)
        metadata["modules"] = json.dumps(modules)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version="2"), r"must be of version 1, got version '2', written by a newer fastsparse"),
        (lambda m: m.update(version="0"), r"must be of version 1, got version '0'$"),
        (lambda m: m.update(version="one"), r"must be of version 1, got version 'one'$"),
        (lambda m: {k: v for k, v in m.items() if k != "version"}, r"must be of version 1, got version None"),
        (lambda m: {k: v for k, v in m.items() if k != "modules"}, r"metadata must hold 'modules'"),
        (lambda m: m.update(modules="{"), r"metadata 'modules' must be JSON, got '\{'"),
        (lambda m: m.update(modules="[" * 100_000), r"metadata 'modules' must be JSON"),
        (lambda m: m.update(modules="[]"), r"metadata 'modules' must be a JSON object, got \[\]"),
        (lambda m: m.update(modules='{"head": 1}'), r"module 'head' must be of a class .*Int8Linear.* got 1"),
        (with_module(**{"class": "Int3Linear"}), r"module 'head' must be of a class .* got 'Int3Linear'"),
        (with_module(**{"class": ["Int8Linear"]}), r"module 'head' must be of a class"),
        (with_module(rows=8), r"module 'head' must have activation, bias, in_features, out_features"),
        (with_module(bias=1), r"module 'head' must have .* \(bias true or false\)"),
        (with_module(in_features=38), r"head\.weight must be a pack of \[N=3, K=38\], got a pack of \[N=3, K=37\]"),
        (with_module(out_features=4), r"head\.weight must be a pack of \[N=4, K=37\]"),
        (with_module(in_features=-1), r"in_features must be an int from 0"),
        (with_module(in_features=10**30), r"in_features must be an int from 0"),
        (with_module(out_features=2.5), r"out_features must be an int from 0"),
        (with_module(activation="tanh"), r"activation must be None, 'relu', 'gelu' or 'silu', got 'tanh'"),
        (with_module(activation=[]), r"activation must be None"),
        (lambda m: m.update(modules=m["modules"].replace("head", "tail")), r"module 'tail' must have the tensors"),
        (lambda m: m.update(identity="7"), r"metadata 'identity' must be a JSON list of names, got 7"),
        (lambda m: m.update(identity="[7]"), r"metadata 'identity' must be a JSON list of names"),
        (lambda m: m.update(tied="[]"), r"metadata 'tied' must be a JSON object"),
        (lambda m: m.update(tied='{"x": "absent"}'), r"metadata 'tied' must map names to stored ones"),
        (lambda m: m.update(tied='{"head.bias": "stem.bias"}'), r"metadata 'tied' must map names to stored ones"),
        (lambda m: m.update(tied='{"x": ["head.bias"]}'), r"metadata 'tied' must map names to stored ones"),
    ],
)
def test_damaged_metadata(path, whole, edit, message):
    refused(path, edited(whole, edit), message)


def with_tensor(data, name, at, value):
    """`data` with the bytes `value` at byte `at` of the tensor `name`."""
    header, body = split(data)
    start = len(data) - len(body) + header[name]["data_offsets"][0] + at
    return data[:start] + value + data[start + len(value) :]


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("head.weight", 0, b"\0", r"head\.weight must be a pack of .* must begin with b'fspk'"),
        ("head.weight", 4, b"\7", r"head\.weight .* has format 7"),
        ("head.weight", 6, b"\2", r"head\.weight .* version 2"),
        ("head.weight", 16, b"\4", r"head\.weight .* got a pack of \[N=4, K=37\]"),
        ("head.weight", 23, b"\x7f", r"head\.weight .* damaged header"),
        ("head.weight", 32, b"\0\1", r"head\.weight must be a pack.*damaged header"),
        ("head.weight", 60, b"\1", r"head\.weight must be a pack.*damaged header"),
        ("head.weight", 64, b"\x80", r"head\.weight is a damaged pack"),
        ("head.weight", 64 + 13, b"\1", r"head\.weight is a damaged pack"),
        ("head.weight", 64 + 640, b"\1\1\1\1", r"head\.weight is a damaged pack"),
        ("head.weight_scale", 0, struct.pack("<f", float("nan")), r"head\.weight_scale must be finite"),
        ("head.weight_scale", 8, struct.pack("<f", float("inf")), r"head\.weight_scale must be finite"),
    ],
)
def test_damaged_tensors(path, whole, name, at, value, message):
    refused(path, with_tensor(whole, name, at, value), message)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_loads_or_is_refused(tmp_path, whole, draw):
    data = bytearray(whole)
    header = len(whole) - len(split(whole)[1])
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(data) - 1)))
        data[at] = draw.draw(st.integers(0, 255))
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    model = dense_net(1)
    before = Snapshot(model)
    error = None
    try:
        fastsparse.load(path, model)
    except ValueError as caught:
        error = caught
    if error is None:
        model(X)
    else:
        assert str(path) in str(error)
        assert before.holds()


# ---- models that do not fit ----


def changed(change):
    model = dense_net(1)
    change(model)
    return model


def set_at(name, module):
    return lambda model: model.set_submodule(name, module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_at("head", nn.Linear(37, 4)),
            r"model must have the dense layer of Int8Linear\(.*\) at 'head', got Linear",
        ),
        (set_at("head", nn.Linear(37, 3, bias=False)), r"model must have the dense layer .* at 'head'"),
        (set_at("head", nn.Conv2d(37, 3, 1)), r"model must have the dense layer .* at 'head', got Conv2d"),
        (set_at("head", Int8Linear(37, 3, activation="relu")), r"at 'head', got Int8Linear\(.*activation='relu'"),
        (set_at("blocks", nn.Sequential(Block())), r"model must have a module 'blocks\.1\.up'"),
        (set_at("stem", Int8Linear(19, 37)), r"model has Int8Linear at 'stem', where the file holds a dense layer"),
        (set_at("stem", nn.Linear(18, 37)), r"stem\.weight must be .*\[37, 18\] to fit the model, got .*\[37, 19\]"),
        (set_at("stem", nn.Linear(19, 37, bias=False)), r"tensors that the model does not have: stem\.bias"),
        (set_at("stem", nn.Identity()), r"tensors that the model does not have: stem\.bias, stem\.weight"),
        (lambda m: m.add_module("extra", nn.Linear(2, 2)), r"got none named extra\.bias, extra\.weight"),
        (lambda m: m.register_buffer("mask", torch.ones(3)), r"mask must be torch\.float32 \[3\].* got torch\.bool"),
        (
            lambda m: m.register_buffer("steps", torch.tensor(True)),
            r"steps must be torch\.bool \[\].* got torch\.int64",
        ),
        (set_at("blocks.0.act", nn.Tanh()), r"nn\.Identity or a fused activation at 'blocks\.0\.act', got Tanh\(\)"),
        (lambda m: delattr(m.blocks[0], "act"), r"nn\.Identity or a fused activation at 'blocks\.0\.act', got none"),
        (lambda m: m.stem.to("meta"), r"model must have memory for stem\.weight, got meta"),
    ],
)
def test_models_that_do_not_fit(path, whole, change, message):
    path.write_bytes(whole)
    model = changed(change)
    before = Snapshot(model) if not any(p.is_meta for p in model.parameters()) else None
    with pytest.raises(ValueError, match=message) as caught:
        fastsparse.load(path, model)
    assert str(path) in str(caught.value)
    assert before is None or before.holds()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("convert", [False, True])
def test_a_hook_that_fails_leaves_the_model_as_it_was(path, whole, convert, error):
    path.write_bytes(whole)
    model = converted(dense_net(1)) if convert else dense_net(1)

    def fail(*_):
        raise error

    model.register_load_state_dict_post_hook(fail)  # after all tensors were copied
    before = Snapshot(model)
    with pytest.raises(ValueError if isinstance(error, RuntimeError) else type(error)):
        fastsparse.load(path, model)
    assert before.holds()


def test_a_tensor_that_cannot_be_written_leaves_the_model_as_it_was(path, whole):
    path.write_bytes(whole)
    model = dense_net(1)
    model.mask = torch.ones(1, dtype=torch.bool).expand(3)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)model does not take the tensors: .*mask"):
        fastsparse.load(path, model)
    assert before.holds()


def test_versions_of_modules_are_not_taken_for_old_ones(path):
    seen = []

    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            seen.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    fastsparse.save(nn.Sequential(Versioned(3, 2)), path)
    fastsparse.load(path, nn.Sequential(Versioned(3, 2)))
    assert seen == [3]


def test_the_pack_of_a_loaded_file_is_the_pack(path):
    model = nn.Sequential(nn.Linear(21, 17))
    layer = Int8Linear.from_linear(model[0])
    fastsparse.save(nn.Sequential(layer), path)
    assert torch.equal(ops.unpack(fastsparse.load(path)["0.weight"]), ops.unpack(layer.weight))
