from __future__ import annotations

import copyreg
import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from virtualcell import _unpickle
from virtualcell._unpickle import UnsafePickleError, read_pickle, read_torch


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists if something ran."""
    return tmp_path / "it-ran"


def attacks(marker: Path) -> dict[str, object]:
    write = f"open({str(marker)!r}, 'w')"
    return {
        f"{os.system.__module__}.system": Calls(os.system, f"touch {marker}"),
        "builtins.eval": Calls(eval, write),
        "builtins.exec": Calls(exec, write),
        "builtins.__import__": Calls(__import__, "antigravity"),
        "subprocess.check_output": Calls(__import__("subprocess").check_output, ["touch", str(marker)]),
    }


NAMES = list(attacks(Path("x")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_pickles_that_call_are_refused_by_name(name: str, protocol: int, tmp_path: Path, marker: Path) -> None:
    evil = {"gene_names": ["a"], "deep": [{"x": (attacks(marker)[name],)}]}
    (tmp_path / "var_dims.pkl").write_bytes(pickle.dumps(evil, protocol=protocol))
    with pytest.raises(UnsafePickleError, match=rf"^var_dims.pkl asks for {name}, which is not data. It was not read"):
        read_pickle(tmp_path / "var_dims.pkl")
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stand_ins", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files_that_call_are_refused_by_name(
    name: str, stand_ins: bool, zipped: bool, tmp_path: Path, marker: Path
) -> None:
    file = tmp_path / "m.ckpt"
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": attacks(marker)[name]},
        file,
        _use_new_zipfile_serialization=zipped,
    )
    assert zipfile.is_zipfile(file) == zipped
    with pytest.raises(UnsafePickleError, match=rf"asks for {name}, which is not data"):
        read_torch(file, stand_ins=stand_ins)
    assert not marker.exists()


def test_other_containers_of_torch_are_refused(tmp_path: Path) -> None:
    scripted = tmp_path / "scripted.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(scripted)
    with pytest.raises(UnsafePickleError, match="asks for __torch__"):
        read_torch(scripted)
    old = tmp_path / "old.tar"
    with tarfile.open(old, "w") as tar:
        content = pickle.dumps(Calls(os.system, "true"))
        info = tarfile.TarInfo("pickle")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UnsafePickleError):
        read_torch(old)


@pytest.mark.parametrize("n", [0, 100, 700])
def test_files_that_did_not_arrive_whole(n: int, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(50)}, tmp_path / "m.ckpt")
    whole = (tmp_path / "m.ckpt").read_bytes()
    (tmp_path / "m.ckpt").write_bytes(whole[:n])
    with pytest.raises(ValueError, match=r"m.ckpt is (empty|cut off or damaged). Fetch it again"):
        read_torch(tmp_path / "m.ckpt")
    (tmp_path / "m.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=r"m.ckpt is a pointer of git LFS"):
        read_torch(tmp_path / "m.ckpt")


@pytest.mark.parametrize("code", [b"", b"hU", b"N}b", b"X\x01\x00\x00\x00xQ"])
def test_what_makes_the_reader_of_torch_stumble_is_refused(code: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + code + b".")
        archive.writestr("m/version", "3\n")
    with pytest.raises(UnsafePickleError, match=r"^m.ckpt "):
        read_torch(tmp_path / "m.ckpt")


# -- tricks through what is allowed: assembled by hand, because pickle itself would not write them ---------------------


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def value(x: object) -> bytes:
    return pickle.dumps(x, protocol=2)[2:-1]


def reduce(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


DTYPE, SCALAR = named("numpy", "dtype"), named("numpy.core.multiarray", "scalar")
ARRAY = reduce(
    named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), value((0,)), value(b"b".decode())
)


def dtype(text: str) -> bytes:
    return reduce(DTYPE, value(text), value(False), value(True))


TRICKS = {
    # an object dtype whose flags say that it holds no pointers, over bytes of the attacker's choice
    "forged flags": (
        reduce(SCALAR, dtype("O8") + value((3, "|", None, None, None, -1, -1, 0)) + b"b", value("A" * 8)),
        "does not fit",
    ),
    "forged fields": (
        dtype("V8") + value((3, "|", None, ("a",), {"a": 1}, 8, 1, 0)) + b"b",
        "dtype 'V8'",
    ),
    "structured state": (
        dtype("i8") + value((3, "|", None, ("a",), {"a": 1}, 8, 1, 0)) + b"b",
        "structured dtype",
    ),
    "pointers as bytes": (
        ARRAY + b"(" + value(1) + value((1,)) + dtype("O8") + value(False) + b"C\x08AAAAAAAA" + b"tb",
        "does not fit",
    ),
    "array larger than its data": (
        ARRAY + b"(" + value(1) + value((1000,)) + dtype("f8") + value(False) + b"C\x08AAAAAAAA" + b"tb",
        "does not fit",
    ),
    "negative shape": (
        ARRAY + b"(" + value(1) + value((-1, -1)) + dtype("f8") + value(False) + b"C\x08AAAAAAAA" + b"tb",
        "shape",
    ),
    "no dtype": (reduce(SCALAR, value("f8"), value("x")), "place of a dtype"),
    "another codec": (reduce(named("_codecs", "encode"), value("x"), value("zip")), "encodes text as 'zip'"),
    "attribute of an allowed name": (
        b"\x8c\x0bcollections\x8c\x1aOrderedDict.__init__.items\x93".replace(
            b"\x1a", bytes([len("OrderedDict.__init__.items")])
        ),
        "collections.OrderedDict.__init__.items",
    ),
    "defaults of a function of torch": (
        named("torch._utils", "_rebuild_tensor_v2") + b"(N" + value({"__defaults__": (1,)}) + b"tb",
        "sets '__defaults__'",
    ),
    "dictionary of a function of torch": (
        named("torch._utils", "_rebuild_tensor_v2") + value({"a": 1}) + b"b",
        "as data",
    ),
    "class of an allowed name": (
        named("collections", "OrderedDict") + b"(N" + value({"update": 1}) + b"tb",
        "sets 'update'",
    ),
    "new object of a function": (named("numpy", "dtype") + b")\x81", "as data"),
    "data outside the file": (value("x") + b"Q", "outside the file"),
    "tensor without storage": (
        reduce(named("torch._utils", "_rebuild_tensor_v2"), value(1), value(0), value((1,)), value((1,))),
        "without a storage",
    ),
    "torch.load": (reduce(named("torch", "load"), value("x")), "torch.load"),
    "partial": (reduce(named("functools", "partial"), named("builtins", "set")), "functools.partial"),
    "cut off": (b"(", "as data"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_through_allowed_names(trick: str, tmp_path: Path) -> None:
    code, message = TRICKS[trick]
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + code + b".")
    with pytest.raises(UnsafePickleError, match=message):
        read_pickle(tmp_path / "x.pkl")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_extension_codes_do_not_go_past_the_list(tmp_path: Path, marker: Path) -> None:
    code = 0xF0
    copyreg.add_extension(os.system.__module__, "system", code)
    try:
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(Calls(os.system, f"touch {marker}"), protocol=2))
        with pytest.raises(UnsafePickleError, match="system"):
            read_pickle(tmp_path / "x.pkl")
        # nor when something else in this process has met the code already
        assert pickle.loads(pickle.dumps(os.system, protocol=2)) is os.system
        assert code in copyreg._extension_cache
        with pytest.raises(UnsafePickleError, match="system"):
            read_pickle(tmp_path / "x.pkl")
        assert pickle.loads(pickle.dumps(os.system, protocol=2)) is os.system
    finally:
        copyreg.remove_extension(os.system.__module__, "system", code)
    assert not marker.exists()


def test_nested_torch_file_in_a_plain_pickle(tmp_path: Path, marker: Path) -> None:
    inner = io.BytesIO()
    torch.save(Calls(os.system, f"touch {marker}"), inner)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Calls(torch.storage._load_from_bytes, inner.getvalue())))
    with pytest.raises(UnsafePickleError):
        read_pickle(tmp_path / "x.pkl")
    assert not marker.exists()


def test_a_storage_in_a_plain_pickle_cannot_unfold(tmp_path: Path) -> None:
    torch.save(torch.zeros(100_000).untyped_storage(), tmp_path / "x.pt")
    inner = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as new:
        for i in old.infolist():
            new.writestr(i.filename, old.read(i))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Calls(torch.storage._load_from_bytes, inner.getvalue())))
    with pytest.raises(UnsafePickleError, match=r"^x.pkl holds a storage that cannot be read as data. It was not read"):
        read_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("start", [b"N", b"P\n", b"}"])
@pytest.mark.parametrize("put", [b"r\x00\x5e\xd0\xb2", b"p3000000000\n"])
def test_a_row_of_old_pickles_fills_no_memory(start: bytes, put: bytes, tmp_path: Path) -> None:
    """Python's reader makes room for as many objects as the highest number: 48 GB here."""
    (tmp_path / "x.pt").write_bytes(start + put + b".")
    with pytest.raises(UnsafePickleError, match=r"^x.pt is not a file of torch.save"):
        read_torch(tmp_path / "x.pt")


def test_a_tensor_cannot_reach_beyond_its_data(tmp_path: Path) -> None:
    file = tmp_path / "m.ckpt"
    torch.save({"a": np.str_("x"), "t": torch.arange(4.0)}, file)  # numpy: past the reader of torch
    with zipfile.ZipFile(file) as old:
        entries = {i.filename: old.read(i) for i in old.infolist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    for change in ((b"K\x04t", b"J\x00\x00\x00\x10t"), (b"K\x00K\x04\x85", b"K\x00J\x00\x00\x00\x10\x85")):
        assert entries[name].count(change[0]) == 1
        with zipfile.ZipFile(file, "w") as new:
            for n, content in entries.items():
                new.writestr(n, content.replace(*change) if n == name else content)
        with pytest.raises(UnsafePickleError, match=r"values in 16 bytes|out of bounds|as data"):
            read_torch(file)


# -- what must be readable ---------------------------------------------------------------------------------------------

DATA = {
    "gene_names": ["STAT1", np.str_("IFNβ"), np.str_("")],
    "sizes": {"n": np.int64(3), "x": np.float32(0.5), "yes": np.bool_(True), "none": None, "z": 1 + 2j},
    "arrays": [np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">i4"), np.array(["a", None], dtype=object)],
    "text": np.array(["x", "yyβ"]),
    "empty": np.zeros((0, 4), np.float32),
    "tensors": {np.str_("a"): torch.arange(6).reshape(2, 3).T, "h": torch.ones(2, dtype=torch.bfloat16)},
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "sets": [{1, 2}, frozenset({"a"})],
    "bytes": [b"", b"\x00\xff"],
    "ordered": OrderedDict(b=1, a=2),
    "default": defaultdict(list, a=[1]),
    "dtype": torch.float32,
}


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=") and np.array_equal(a, b)
    if isinstance(b, _unpickle._Opaque):
        b = b.value
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_data_is_read_from_plain_pickles(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(DATA, protocol=protocol))
    found = read_pickle(tmp_path / "x.pkl")
    assert list(found) == list(DATA)
    for key, expected in DATA.items():
        assert same(expected, found[key]), key


def test_data_is_read_from_torch_files(tmp_path: Path) -> None:
    torch.save(DATA, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError):  # or this test would be one of torch's own reader
        torch.load(tmp_path / "x.pt", weights_only=True)
    found = read_torch(tmp_path / "x.pt")
    for key, expected in DATA.items():
        assert same(expected, found[key]), key
    found["parameter"].add_(1)  # a private copy: the file keeps its numbers
    assert torch.equal(read_torch(tmp_path / "x.pt")["parameter"], torch.ones(2))


def test_compressed_torch_file(tmp_path: Path) -> None:
    torch.save(DATA, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for i in old.infolist():
            new.writestr(i.filename, old.read(i))
    assert same(DATA["tensors"], read_torch(tmp_path / "y.pt")["tensors"])


def test_legacy_torch_file_of_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(tmp_path / "x.pt")["w"], torch.arange(3))
    torch.save({np.str_("w"): torch.arange(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafePickleError):
        read_torch(tmp_path / "x.pt")


def test_golden_side_files(golden: Path) -> None:
    run = golden / "st_run"
    sizes = read_pickle(run / "var_dims.pkl")
    assert sizes["gene_dim"] == 2000
    assert sizes["pert_names"][:3] == ["g0", "g1", "g10"]
    codes = read_torch(run / "pert_onehot_map.pt")
    assert torch.equal(torch.stack(list(codes.values())), torch.eye(21))
    assert read_torch(run / "data_module.torch")["control_pert"] == "non-targeting"


# -- stand-ins ---------------------------------------------------------------------------------------------------------

FOREIGN = """
from pathlib import Path
Path({marker!r}).touch()

class Config(dict):
    def __init__(self, *a):
        super().__init__(*a)
    def __setstate__(self, state):
        raise SystemExit
    def __reduce__(self):
        return make, ({{"a": 1}},), {{"state": 2}}, iter([1]), iter([("k", "v")])

class Collator:
    pass

def make(x):
    raise SystemExit
"""


def test_foreign_classes_become_dummies_and_are_never_imported(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "foreign_package.py").write_text(FOREIGN.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    import foreign_package

    collator = foreign_package.Collator()
    collator.cfg = foreign_package.Config()
    content = {
        "state_dict": {"w": torch.arange(3.0)},
        "hyper_parameters": {"cfg": collator, "type": foreign_package.Collator, "bound": io.BytesIO, "n": 3},
    }
    torch.save(content, tmp_path / "m.ckpt")
    del sys.modules["foreign_package"]
    marker.unlink()

    with pytest.raises(UnsafePickleError, match="foreign_package"):
        read_torch(tmp_path / "m.ckpt")
    with caplog.at_level("INFO"):
        found = read_torch(tmp_path / "m.ckpt", stand_ins=True)
    assert "foreign_package" not in sys.modules
    assert not marker.exists()
    assert torch.equal(found["state_dict"]["w"], torch.arange(3.0))
    assert found["hyper_parameters"]["n"] == 3
    cfg = found["hyper_parameters"]["cfg"]
    assert isinstance(cfg, _unpickle._StandIn)
    assert type(cfg).__name__ == "Collator"
    assert isinstance(cfg.state["cfg"], _unpickle._StandIn)
    assert "left out 3 foreign classes: _io.BytesIO, foreign_package.Collator, foreign_package.make" in caplog.text


def test_what_a_pickle_does_to_a_dummy_stays_in_its_file(tmp_path: Path) -> None:
    before = dict(vars(_unpickle._StandIn))
    code = named("elsewhere", "Thing") + b"(N" + value({"__call__": 1}) + b"tb"
    # through the archive reader, as in a checkpoint
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + code + b".")
    with pytest.raises(UnsafePickleError):
        read_torch(tmp_path / "m.ckpt", stand_ins=True)
    assert dict(vars(_unpickle._StandIn)) == before


def test_allowed_functions_know_only_data() -> None:
    """Whoever adds a name to the list has to think about it here."""
    assert {".".join(key) for key in _unpickle._ALLOWED if key[0] != "torch"} == {
        "builtins.dict",
        "builtins.list",
        "builtins.set",
        "builtins.frozenset",
        "builtins.complex",
        "builtins.bytes",
        "collections.OrderedDict",
        "collections.defaultdict",
        "_codecs.encode",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.numeric._frombuffer",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.storage._load_from_bytes",
    }
    for (module, name), allowed in _unpickle._ALLOWED.items():
        if module == "torch" and name != "Size":
            assert type(allowed) is _unpickle._Opaque
            assert isinstance(allowed.value, torch.dtype)
