"""Read other people's pickles without running them: what is not on a short list is refused, or replaced by a dummy.

Nothing that a pickle names is imported. The few functions it may call are our own; they check what they are given,
because numpy and torch trust their own (a forged dtype makes numpy follow pointers that the file wrote).
"""

from __future__ import annotations

import copyreg
import io
import logging
import math
import pickle
import re
import reprlib
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from virtualcell._pickle_scan import (
    UnsafePickleError,
    check_whole,
    each_of_row,
    look_into,
    look_through,
    look_through_row,
)
from virtualcell._reading import as_damaged

logger = logging.getLogger(__name__)

_PLAIN_DTYPE = re.compile(r"[<>|=]?(\?|b1|[iu][1248]|f[248]|c8|c16|c(?=$)|[bBhHiIlLqQefdO]|O8|[US]\d{0,6})")
_RENAMED = {
    "__builtin__": "builtins",
    "commands": "subprocess",  # as Python 2 called it, and protocol 2 still does
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}
# A checkpoint never needs these: a file that names them was made to attack, and not even a dummy is made of them.
_HOSTILE_MODULES = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "ctypes", "importlib", "runpy", "pty", "webbrowser"}
)
_HOSTILE_BUILTINS = frozenset({"eval", "exec", "compile", "open", "input", "breakpoint", "__import__"})


class _Opaque:
    """A value that a pickle can hand on, and not look into or change."""

    value: Any
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise UnsafePickleError(f"sets {name!r} of something that cannot be changed")


class _Call(_Opaque):
    """An allowed function. A pickle that got the function itself could set its defaults for everybody."""

    __slots__ = ()

    def __call__(self, *args: object) -> object:
        return self.value(*args)


class _StandIn:
    """An object of a class that is left out: it keeps what the pickle gave it and does nothing."""

    arguments: tuple

    def __new__(cls, *args: object, **kwargs: object) -> _StandIn:
        self = object.__new__(cls)
        self.arguments = args
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object) -> _StandIn:
        return type(self)(*args)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass

    def add(self, value: object) -> None:
        pass


class _DType:
    """A numpy dtype on its way in. Of its state only the byte order counts: flags and fields could be forged."""

    __slots__ = ("dtype",)

    def __init__(self, text: object, *_: object) -> None:
        if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
            raise UnsafePickleError(f"has an array of dtype {text!r}; plain numbers, text and objects are read")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        _, order, *structure = state[:5]
        if any(s is not None for s in structure) or order not in ("<", ">", "|", "="):
            raise UnsafePickleError("has an array of structured dtype")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array that checks its state before numpy believes it."""

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran, data = state[-4:]
        dtype = _dtype_of(dtype)
        if not (isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)):
            raise UnsafePickleError(f"has an array of shape {shape!r}")
        kind, size = (list, math.prod(shape)) if dtype.hasobject else (bytes, math.prod(shape) * dtype.itemsize)
        if type(data) is not kind or len(data) != size:
            raise UnsafePickleError(f"has an array of shape {shape} and dtype {dtype} whose data does not fit")
        super().__setstate__((1, shape, dtype, bool(fortran), data))


def _dtype_of(dtype: object) -> np.dtype:
    if not isinstance(dtype, _DType):
        raise UnsafePickleError(f"has {type(dtype).__name__} in the place of a dtype")
    return dtype.dtype


def _numpy_scalar(dtype: Any, data: object = b"") -> np.generic:
    dtype = _dtype_of(dtype)
    if dtype.hasobject or type(data) is not bytes or len(data) != dtype.itemsize:
        raise UnsafePickleError(f"has a scalar of dtype {dtype} whose data does not fit")
    return np.frombuffer(data, dtype)[0] if dtype.itemsize else np.zeros((), dtype)[()]


def _numpy_array(*_: object) -> _Array:
    return _Array((0,), np.int8)


def _numpy_from_buffer(data: object, dtype: object, shape: tuple, order: str) -> np.ndarray:
    if type(data) not in (bytes, bytearray) or _dtype_of(dtype).hasobject:
        raise UnsafePickleError("has an array whose data is not bytes")
    return np.frombuffer(bytes(data), _dtype_of(dtype)).reshape(shape, order=order).copy(order=order)


def _encode(text: str, encoding: str = "") -> bytes:
    if encoding != "latin1":  # how pickle writes bytes in protocol 2; other codecs decompress, or are imported
        raise UnsafePickleError(f"encodes text as {encoding!r}")
    return text.encode("latin1")


def _torch_tensor(storage: object, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    if not (isinstance(storage, _Opaque) and isinstance(storage.value, Tensor)):
        raise UnsafePickleError("has a tensor without a storage")
    return storage.value.as_strided(size, stride, offset)  # torch checks the bounds


def _torch_parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _torch_storage(data: bytes) -> _Opaque:
    """Return a storage that a plain pickle carries as a file of its own."""
    file = io.BytesIO(data)
    try:  # torch writes these as it wrote files before 1.6; a zip here could unfold to any size
        look_through_row("a storage", file, len(data))
    except UnsafePickleError as error:
        raise UnsafePickleError("holds a storage that cannot be read as data") from error
    file.seek(0)
    storage = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnsafePickleError(f"has {type(storage).__name__} in the place of a storage")
    return _Opaque(torch.empty(0, dtype=storage.dtype).set_(storage))


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(v).removeprefix("torch."): v for v in _STORAGES.values()}
_ALLOWED = {
    ("builtins", "dict"): _Call(dict),
    ("builtins", "list"): _Call(list),
    ("builtins", "set"): _Call(set),
    ("builtins", "frozenset"): _Call(frozenset),
    ("builtins", "complex"): _Call(complex),
    ("builtins", "bytes"): _Call(lambda: b""),  # the empty one, in protocol 2
    ("collections", "OrderedDict"): _Call(OrderedDict),
    ("collections", "defaultdict"): _Call(lambda factory=None: defaultdict(factory)),
    ("_codecs", "encode"): _Call(_encode),
    ("numpy", "dtype"): _Call(_DType),
    ("numpy", "ndarray"): _Opaque("numpy.ndarray"),
    ("numpy._core.multiarray", "scalar"): _Call(_numpy_scalar),
    ("numpy._core.multiarray", "_reconstruct"): _Call(_numpy_array),
    ("numpy._core.numeric", "_frombuffer"): _Call(_numpy_from_buffer),
    ("torch", "Size"): _Call(tuple),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_torch_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_torch_parameter),
    ("torch.storage", "_load_from_bytes"): _Call(_torch_storage),
    **{("torch", name): _Opaque(dtype) for name, dtype in (_STORAGES | _DTYPES).items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows plain containers, numbers, arrays and tensors; with `stand_ins` all else becomes a :class:`_StandIn`."""

    def __init__(self, file: io.BufferedIOBase, *, stand_ins: bool = False, archive: _Archive | None = None) -> None:
        super().__init__(file)
        self.stand_ins = stand_ins
        self.archive = archive
        self.replaced: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> object:
        module = _RENAMED.get(module, module)
        key = (module, name)
        if key in _ALLOWED:
            return _ALLOWED[key]
        hostile = module.split(".")[0] in _HOSTILE_MODULES or (module == "builtins" and name in _HOSTILE_BUILTINS)
        if not self.stand_ins or hostile:
            raise UnsafePickleError(f"asks for {module}.{name}, which is not data")
        if key not in self.replaced:  # a class of this file's own: what the pickle does to it stays here
            self.replaced[key] = type(name, (_StandIn,), {"__module__": module})
        return self.replaced[key]

    def persistent_load(self, pid: object) -> _Opaque:
        if self.archive is None:
            raise UnsafePickleError("refers to data outside the file")
        return self.archive.storage(pid)


class _Names(_Unpickler):
    """Goes through a pickle to see whether it asks for something that is refused, and builds nothing."""

    def find_class(self, module: str, name: str) -> type:
        super().find_class(module, name)
        return _StandIn

    def persistent_load(self, pid: object) -> None:
        return None


class _Archive:
    """A file of `torch.save`: a zip with one pickle and one entry per storage, which is mapped, not copied."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        found = [n for n in self.zip.namelist() if n.endswith("/data.pkl")]
        if len(found) != 1:
            raise UnsafePickleError(f"holds {len(found)} pickles called data.pkl")
        self.prefix = found[0].removesuffix("data.pkl")
        order = f"{self.prefix}byteorder"
        if order in self.zip.namelist() and self.zip.read(order) != b"little":
            raise UnsafePickleError("was written on a big-endian machine")
        self.bytes = np.memmap(path, dtype=np.uint8, mode="c")
        self.storages: dict[tuple, _Opaque] = {}

    def storage(self, pid: object) -> _Opaque:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Opaque)):
            raise UnsafePickleError(f"refers to data by {reprlib.repr(pid)}")
        _, dtype, key, _, n = pid
        dtype = dtype.value
        if not (isinstance(dtype, torch.dtype) and isinstance(key, str) and type(n) is int and n >= 0):
            raise UnsafePickleError(f"refers to data by {reprlib.repr(pid)}")
        if (key, dtype) not in self.storages:
            raw = self._entry(f"{self.prefix}data/{key}")
            if n * dtype.itemsize > len(raw):
                raise UnsafePickleError(f"has a tensor of {n} values in {len(raw)} bytes")
            values = torch.from_numpy(raw[: n * dtype.itemsize]).view(dtype) if n else torch.empty(0, dtype=dtype)
            self.storages[key, dtype] = _Opaque(values)
        return self.storages[key, dtype]

    def _entry(self, name: str) -> np.ndarray:
        info = self.zip.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self.zip.read(info), dtype=np.uint8).copy()
        # the local header: 30 bytes, the name and an extra field, whose lengths stand at 26 and 28
        header = self.bytes[info.header_offset : info.header_offset + 30].tobytes()
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        start = info.header_offset + 30 + lengths
        return self.bytes[start : start + info.file_size]


def read_pickle(path: str | Path) -> Any:
    """Read a plain pickle of containers, numbers, text, arrays and tensors; anything else is refused by its name."""
    path = Path(path)
    content = path.read_bytes()
    look_through(path.name, io.BytesIO(content), len(content))
    return _load(path, _Unpickler(io.BytesIO(content)))


def read_torch(path: str | Path, *, stand_ins: bool = False) -> Any:
    """Read a file of `torch.save`.

    torch's own restricted reader comes first. Where it refuses, ours reads what :func:`read_pickle` reads and, with
    `stand_ins`, puts dummies in the place of foreign classes, which are never imported.
    """
    path = Path(path)
    check_whole(path)
    with as_damaged(path, "file of torch"):
        is_zip = zipfile.is_zipfile(path)
    look_into(path, is_zip=is_zip)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about formats that are refused below
            return _of_plain_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip))
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path.name} {error}.") from error
    except Exception as error:  # a file that is made up can raise anything
        logger.debug("%s is more than tensors: %s", path.name, error)
    if not is_zip:
        return _refuse_legacy(path)
    try:
        archive = _Archive(path)
        file = io.BytesIO(archive.zip.read(f"{archive.prefix}data.pkl"))
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path.name} {error}.") from error
    except Exception as error:  # a file that is made up can raise anything, without a word too
        told = str(error) or type(error).__name__
        raise UnsafePickleError(
            f"{path.name} is no file of torch, or it is damaged ({told}). Fetch it again."
        ) from error
    unpickler = _Unpickler(file, stand_ins=stand_ins, archive=archive)
    try:
        content = _of_plain_tensors(_load(path, unpickler))
    except UnsafePickleError as error:
        raise UnsafePickleError(str(error) if path.name in str(error) else f"{path.name} {error}.") from error
    if unpickler.replaced:
        names = sorted(".".join(key) for key in unpickler.replaced)
        logger.info("%s: left out %d foreign classes: %s.", path.name, len(names), ", ".join(names))
    return content


def _of_plain_tensors(content: Any) -> Any:
    """Return what was read, if its tensors have the numbers that they say: views can repeat one a billion times."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise UnsafePickleError(f"has a tensor of layout {value.layout} on {value.device}, not plain numbers")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UnsafePickleError(f"has a tensor of {value.numel():,} values, and fewer numbers for it")
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, _StandIn):
            todo += [value.arguments, getattr(value, "state", None)]
    return content


def _load(path: Path, unpickler: _Unpickler) -> object:
    copyreg.clear_extension_cache()  # what another reader found under an extension code would not be looked up here
    try:
        return unpickler.load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path.name} {error}. It was not read, and nothing in it was run.") from error
    except Exception as error:  # a pickle can raise anything
        raise UnsafePickleError(f"{path.name} cannot be read as data: {error}") from error
    finally:
        copyreg.clear_extension_cache()  # nor is what was found here for others


def _refuse_legacy(path: Path) -> object:
    """Raise for torch's format of before 1.6, a row of pickles, naming what was asked for where one of them tells."""
    with path.open("rb") as file:
        for _ in each_of_row(file):  # which were looked through
            _load(path, _Names(file))
    raise UnsafePickleError(
        f"{path.name} is in torch's format of before 1.6 and holds more than tensors. Write it anew with torch.save."
    )
