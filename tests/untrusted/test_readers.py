"""Files that others made are read, or refused in one sentence: changed at random, and made to do harm."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import pickle
import shutil
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from scipy import sparse

import virtualcell as vc
from virtualcell._files import read_cells
from virtualcell._hdf5 import check_h5
from virtualcell._reading import DamagedFileError
from virtualcell._unpickle import UnsafePickleError, read_pickle, read_torch

HERE = Path(__file__).parent
N_CHANGED = 60  # of each file; readers.py makes others, and more of them
N_IN_A_PROCESS = 15  # of HDF5, whose every file is first read by a process of its own


def load_readers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readers", HERE / "readers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["readers"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


READERS = load_readers()


@pytest.mark.parametrize("name", READERS.READERS)
def test_changed_files_are_read_or_refused(name: str) -> None:
    reader = READERS.READERS[name]
    valid, rng = reader.valid(), np.random.default_rng(0)
    with warnings.catch_warnings(), READERS.workplace(reader) as folder:
        warnings.simplefilter("ignore")  # of the libraries, about what is odd in the file
        assert reader(valid, folder) == "read"
        for _ in range(N_IN_A_PROCESS if reader.name.endswith(".h5ad") else N_CHANGED):
            reader(READERS.changed(valid, rng), folder)  # raises where an error is none of ours


@pytest.mark.parametrize("path", sorted((HERE / "found").glob("*")), ids=lambda p: p.name)
def test_files_that_were_found_by_fuzzing(path: Path) -> None:
    """Each made a reader fail once, or fill the memory; its name begins with that of the reader."""
    reader = READERS.READERS[path.name.rsplit("-", 1)[0].replace("_", " ")]
    with warnings.catch_warnings(), READERS.workplace(reader) as folder:
        warnings.simplefilter("ignore")
        tally = READERS.Tally(reader, folder)
        tally(path.read_bytes())
    assert not tally.kinds


@pytest.fixture
def few_megabytes() -> Iterator[None]:
    """What is read in this test takes less than 40 MB, whatever the file says."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


# -- files that say they are larger than they are ---------------------------------------------------------------------

BOMB = gzip.compress(b"A" * 300_000_000, 1)


@pytest.mark.parametrize("name", ["x.fa.gz", "x.gmt.gz", "x.gtf.gz", "x.csv.gz", "x.tsv.gz"])
@pytest.mark.usefixtures("few_megabytes")
def test_text_that_unfolds_to_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BOMB)
    read = {".fa": vc.pp.gene_positions, ".gtf": vc.pp.gene_positions, ".csv": vc.pp.gene_positions}
    read = vc.pp.gene_features if name == "x.gmt.gz" else read.get(Path(name[:-3]).suffix, vc.pp.gene_positions)
    with pytest.raises(ValueError, match=r"10,000,000 characters or more|unfolds to more than|neither an annotation"):
        read(tmp_path / name)


@pytest.mark.usefixtures("few_megabytes")
def test_arrays_that_are_not_there(tmp_path: Path) -> None:
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    shape = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("genes.npy", header + shape.ljust(117) + b"\n")
        archive.writestr("embeddings.npy", header + shape.ljust(117) + b"\n")
    with pytest.raises(DamagedFileError, match=r"says that it holds 8,000,000,000,000"):
        vc.pp.read_gene_embeddings(tmp_path / "x.npz")
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file.create_dataset("X", (1_000_000, 1_000_000), "f4", chunks=(1000, 1000))
    with pytest.raises(DamagedFileError, match=r"says that it holds 4,000,000,000,000"):
        vc.pp.read_gene_embeddings(tmp_path / "x.h5ad")
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(5_000_000, np.int8)), ["A"])
    pq.write_table(pa.table({f"c{i}": column for i in range(20)}), tmp_path / "x.parquet")
    with pytest.raises(DamagedFileError, match=r"says that it holds"):
        vc.pp.read_gene_embeddings(tmp_path / "x.parquet")


PACKED = {
    "whole": {},
    "in pieces": {"chunks": (7,)},
    "packed": {"compression": "gzip", "chunks": (7,)},
    "in records": {"dtype": np.dtype([("name", h5py.string_dtype())])},
}
# as soon as there is no memory for more, or when all that could be read is too much
TOO_LARGE = r"memory allocation failed|says that it holds \d+,\d{3},\d{3} that are not in it"


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.usefixtures("few_megabytes")
def test_texts_that_are_not_there(kind: str, tmp_path: Path) -> None:
    """An array of texts tells the length of each, which is reserved; here all are one text of a megabyte."""
    path, how, n = tmp_path / "x.h5ad", PACKED[kind], 100
    shutil.copy(HERE / "corpus" / "table.h5ad", path)
    with h5py.File(path, "r+") as file:
        file["uns"].create_dataset("once", data=["x" * 1_000_000], dtype=h5py.string_dtype())
        texts = file["uns"].create_dataset("texts", (n,), **{"dtype": h5py.string_dtype()} | how)
        texts[:] = "short" if texts.dtype.names is None else np.array([("short",)], texts.dtype)  # room for all
        at = file["uns/once"].id.get_offset()
    check_h5(path)
    reference = path.read_bytes()[at : at + 16]
    with h5py.File(path, "r+") as file:
        texts = file["uns/texts"]
        if texts.chunks is None:
            at = texts.id.get_offset()
        else:
            for start in range(0, n, 7):
                texts.id.write_direct_chunk((start,), packed(reference * 7, how))
    if "chunks" not in how:
        content = bytearray(path.read_bytes())
        content[at : at + 16 * n] = reference * n
        path.write_bytes(content)
    for read in (read_cells, vc.pp.read_gene_embeddings):
        with pytest.raises(DamagedFileError, match=TOO_LARGE):
            read(path)


@pytest.mark.parametrize("where", ["/", "obs", "obs/_index"])
@pytest.mark.usefixtures("few_megabytes")
def test_texts_of_attributes_that_are_not_there(where: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "x.h5ad", "a text that is found again"
    with h5py.File(HERE / "corpus" / "table.h5ad") as valid, h5py.File(path, "w") as file:
        for name in valid:
            valid.copy(name, file)
        file.attrs.update(valid.attrs)
        file["obs/_index"].attrs["note"] = mark
        for i in range(30):  # so many that the header of the object goes on elsewhere
            file[where].attrs[f"note {i}"] = [mark, mark[::-1]]
    check_h5(path)
    content = bytearray(path.read_bytes())
    reference = struct.pack("<I", len(mark))
    places = [i for i in range(0, len(content) - 15, 8) if content[i : i + 4] == reference]
    for i in places[-20:]:
        content[i : i + 4] = b"\0\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=TOO_LARGE):
        read_cells(path)


TEXT = {"encoding-type": "string-array", "encoding-version": "0.2.0"}


def groups_that_share_groups(file: h5py.File) -> None:
    group = file["uns"]
    for i in range(40):
        below = file.create_group(f"uns/{i}") if i == 0 else file.create_group(f"below{i}")
        below.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        if i:
            group["a"] = group["b"] = below
        group = below


def links_to_one_array(file: h5py.File) -> None:
    file["uns"].create_dataset("array", data=np.zeros(1_000_000))
    for i in range(150):
        file[f"uns/hard{i}"], file[f"uns/soft{i}"] = file["uns/array"], h5py.SoftLink("/uns/array")


def a_group_within_itself(file: h5py.File) -> None:
    file["uns/itself"] = file["uns"]


def a_long_text_for_all(file: h5py.File) -> None:
    made = file["uns"].create_dataset("x", (2000,), h5py.string_dtype(), chunks=(1000,), fillvalue="x" * 1_000_000)
    made.attrs.update(TEXT)


def a_filter_that_was_left_out(file: h5py.File) -> None:
    once = file["uns"].create_dataset("once", data=["x" * 1_000_000], dtype=h5py.string_dtype())
    once.attrs.update(TEXT)
    file.flush()
    with Path(file.filename).open("rb") as raw:
        raw.seek(once.id.get_offset())
        reference = raw.read(16)
    how = {"chunks": (2000,), "compression": 32015, "allow_unknown_filter": True}
    made = file["uns"].create_dataset("x", (2000,), h5py.string_dtype(), **how)
    made.id.write_direct_chunk((0,), reference * 2000, 1)
    made.attrs.update(TEXT)


def a_column_that_is_named_twice(file: h5py.File) -> None:
    file["obs"]["x"] = np.arange(file["obs/_index"].size)
    file["obs"].attrs["column-order"] = ["x", "x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (groups_that_share_groups, "paths lead to"),
        (links_to_one_array, r"says that it holds \d+,\d{3},\d{3},\d{3} that are not in it"),
        (a_group_within_itself, "paths lead to|recursion"),
        (a_long_text_for_all, TOO_LARGE),
        (a_filter_that_was_left_out, TOO_LARGE),
        (a_column_that_is_named_twice, "/obs names a column twice"),
    ],
)
@pytest.mark.usefixtures("few_megabytes")
def test_what_is_read_many_times(change: Callable[[h5py.File], None], message: str, tmp_path: Path) -> None:
    """anndata reads along paths, of which links make as many as they like, and fills what is not stored."""
    path = tmp_path / "x.h5ad"
    shutil.copy(HERE / "corpus" / "table.h5ad", path)
    with h5py.File(path, "r+") as file:
        change(file)
    for read in (read_cells, vc.pp.read_gene_embeddings):
        with pytest.raises(DamagedFileError, match=message):
            read(path)


def packed(content: bytes, how: dict) -> bytes:
    """Bytes of one piece as HDF5 stores it."""
    return zlib.compress(content) if "compression" in how else content


def test_arrays_in_other_files(tmp_path: Path) -> None:
    for name, make in {
        "link": lambda file: file.__setitem__("uns/there", h5py.ExternalLink("other.h5", "/x")),
        "raw": lambda file: file["uns"].create_dataset("there", (3,), "f4", external=[("other.bin", 0, 12)]),
        "joined": lambda file: file["uns"].create_virtual_dataset("there", joined()),
    }.items():
        path = tmp_path / f"{name}.h5ad"
        shutil.copy(HERE / "corpus" / "table.h5ad", path)
        with h5py.File(path, "r+") as file:
            make(file)
        with pytest.raises(DamagedFileError, match="uns/there lies in another file"):
            read_cells(path)


def joined() -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3,))
    return layout


@pytest.mark.parametrize("how", [{}, {"compression": "gzip"}, {"compression": "lzf"}])
def test_files_of_cells_that_are_sound(how: dict, tmp_path: Path) -> None:
    """Zeros, empty arrays, long and empty texts, lists, and an array that was made and never filled."""
    table = pd.DataFrame(index=[f"cell {i}" for i in range(3000)])
    table["note"], table["kind"] = ["x" * (i % 300) for i in range(3000)], pd.Categorical(["a", "b", "c"] * 1000)
    data = ad.AnnData(np.zeros((3000, 1000), np.float32), obs=table)
    data.layers["counts"] = sparse.csr_matrix((3000, 1000))
    data.uns["empty"], data.uns["text"], data.uns["names"] = np.array([]), "", np.array(["a", "", "b" * 9999], object)
    data.write_h5ad(tmp_path / "x.h5ad", **how)
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file["uns"].create_dataset("unfilled", (1000, 1000), "f8", maxshape=(None, None), chunks=(100, 100))
        lists = file["uns"].create_dataset("lists", (3,), h5py.vlen_dtype(np.dtype("f8")))
        lists[0] = np.arange(1000.0)
    check_h5(tmp_path / "x.h5ad")


def test_files_that_are_sound_and_odd(tmp_path: Path) -> None:
    """Thousands of small arrays, links, a large piece behind filters, types that h5py does not know, an open file."""
    path = tmp_path / "-x é.h5ad"
    shutil.copy(HERE / "corpus" / "table.h5ad", path)
    with h5py.File(path, "r+") as file:
        for i in range(3000):
            file[f"uns/many/{i}"] = float(i)
        file["uns/again"], file["uns/lost"] = h5py.SoftLink("/uns/many/1"), h5py.SoftLink("/nowhere")
        how = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        file["uns"].create_dataset("piece", data=np.zeros(10_000_000), chunks=(10_000_000,), **how)
        space = h5py.h5s.create_simple((3,))
        h5py.h5d.create(file["uns"].id, b"time", h5py.h5t.UNIX_D32LE, space)
        file.flush()
        check_h5(path)


def test_another_process_that_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for other, message in [("/bin/false", "status 1"), (None, "")]:
        monkeypatch.setattr(sys, "executable", other)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(RuntimeError, match=rf"another process reads it first.*{message}.*Set sys.executable"):
            check_h5(HERE / "corpus" / "table.h5ad")


def test_the_other_process_looks_where_this_one_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "h5py.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check_h5(HERE / "corpus" / "table.h5ad")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(RuntimeError, match="not this one"):
        check_h5(HERE / "corpus" / "table.h5ad")


def test_one_value_packed_by_zstandard(tmp_path: Path) -> None:
    """As anndata writes with hdf5plugin: 4 MB of one value are 150 bytes."""
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        array = file.create_dataset(
            "X", (10_000_000,), "f4", chunks=(1_000_000,), compression=32015, allow_unknown_filter=True
        )
        for i in range(10):
            array.id.write_direct_chunk((i * 1_000_000,), bytes(150))
    check_h5(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file.create_dataset("unfilled", (10_000_000,), "f4", chunks=(1_000_000,))
    with pytest.raises(DamagedFileError, match=r"says that it holds 40,000,000"):
        check_h5(tmp_path / "x.h5ad")


@pytest.mark.parametrize(
    ("key", "value"), [("n_hidden", 10**9), ("n_layers", 10**9), ("n_decoder_layers", 10**7), ("n_genes", 10**12)]
)
@pytest.mark.usefixtures("few_megabytes")
def test_networks_that_are_not_there(key: str, value: int, tmp_path: Path) -> None:
    content = READERS.READERS["model"].valid()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = json.loads(header["__metadata__"]["virtualcell"])
    described["meta"]["config"][key] = value
    with_this = safetensors.torch.save(safetensors.torch.load(content), {"virtualcell": json.dumps(described)})
    (tmp_path / "model.safetensors").write_bytes(with_this)
    with pytest.raises(DamagedFileError, match=rf"{key}={value}, but \d+ parameters"):
        vc.io.load(tmp_path)


# -- pickles ----------------------------------------------------------------------------------------------------------

HOSTILE = {
    # memory of 16 GB for a number, an array of bytes that is not there, and tuples that are hashed by recursion
    "number": (b"\x80\x04Nr\xff\xff\xff\x7f.", "numbers an object 2,147,483,647"),
    "bytes": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", "cannot be read as data"),
    "nested": (b"\x80\x02})" + b"\x85" * 2_000_000 + b"Ns.", "nested more than 500 deep"),
    "code": (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system, which is not data"),
    "stack": (b"\x80\x02R.", "has not given"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_that_take_the_process_down(kind: str, tmp_path: Path) -> None:
    content, message = HOSTILE[kind]
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(UnsafePickleError, match=message):
        read_pickle(tmp_path / "x.pkl")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UnsafePickleError, match=message):
        read_torch(tmp_path / "x.pt", stand_ins=True)
    (tmp_path / "old.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + content)
    with pytest.raises(UnsafePickleError):
        read_torch(tmp_path / "old.pt", stand_ins=True)


def test_archives_that_unfold(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 200_000_000)
    with pytest.raises(DamagedFileError, match="says that it holds 200,000,000"):
        read_torch(tmp_path / "x.pt")


def test_views_that_repeat_one_number(tmp_path: Path) -> None:
    torch.save({"A": torch.zeros(1).expand(10**12), "B": torch.zeros(1).expand(10**12)}, tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match=r"a tensor of 1,000,000,000,000 values, and fewer numbers for it"):
        vc.pp.read_gene_embeddings(tmp_path / "x.pt")


# -- texts ------------------------------------------------------------------------------------------------------------


def test_configurations_that_unfold(tmp_path: Path) -> None:
    reader = READERS.READERS["arc st config"]
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    with READERS.workplace(reader) as folder:
        for text, message in [
            ("\n".join(lines), "unfold to more than 10,000,000 values"),
            ("a: " + "[" * 5000, "is no configuration"),
            ("a: &a [*a]", "unfold to more than"),
            ("a: \xff", "is no configuration"),
        ]:
            (folder / "config.yaml").write_bytes(text.encode("latin1"))
            with pytest.raises(DamagedFileError, match=message):
                vc.models.ST.from_arc(folder)


@pytest.mark.parametrize("name", ["csv", "csv.gz", "edges", "links", "positions"])
def test_numbers_whose_exponents_are_long(name: str) -> None:
    """One of pandas' two parsers of numbers ends the process at them."""
    reader = READERS.READERS[name]
    content = reader.valid()
    text = gzip.decompress(content) if name.endswith("gz") else content
    number = next(word for word in (b"0.9", b"1.0", b"900", b"10") if word in text)
    with READERS.workplace(reader) as folder:
        for long in (b"1.5e991000000000", b"1e-99999999999999"):
            changed = text.replace(number, long)
            assert reader(gzip.compress(changed) if name.endswith("gz") else changed, folder) in ("read", "refused")


def test_splits_that_are_none(tmp_path: Path) -> None:
    for text, message in [("[" * 100_000, "is no split"), ("{}", "is no split"), ("[]", "must hold names")]:
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            READERS.apply_split(tmp_path / "split.json")
