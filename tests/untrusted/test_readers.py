"""Files that others made are read, or refused in one sentence: changed at random, and made to do harm."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import pickle
import struct
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import virtualcell as vc
from virtualcell._reading import DamagedFileError
from virtualcell._unpickle import UnsafePickleError, read_pickle, read_torch

HERE = Path(__file__).parent
N_CHANGED = 60  # of each file; readers.py makes others, and more of them


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
        for _ in range(N_CHANGED):
            reader(READERS.changed(valid, rng), folder)  # raises where an error is none of ours


@pytest.mark.parametrize("path", sorted((HERE / "found").glob("*")), ids=lambda p: p.name)
def test_files_that_were_found_by_fuzzing(path: Path) -> None:
    """Each made a reader fail once; its name begins with that of the reader."""
    reader = READERS.READERS[path.name.rsplit("-", 1)[0].replace("_", " ")]
    with warnings.catch_warnings(), READERS.workplace(reader) as folder:
        warnings.simplefilter("ignore")
        reader(path.read_bytes(), folder)


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
    with pytest.raises(DamagedFileError, match=r"says that it holds"):
        vc.pp.read_gene_embeddings(tmp_path / "x.h5ad")
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(5_000_000, np.int8)), ["A"])
    pq.write_table(pa.table({f"c{i}": column for i in range(20)}), tmp_path / "x.parquet")
    with pytest.raises(DamagedFileError, match=r"says that it holds"):
        vc.pp.read_gene_embeddings(tmp_path / "x.parquet")


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


def test_splits_that_are_none(tmp_path: Path) -> None:
    for text, message in [("[" * 100_000, "is no split"), ("{}", "is no split"), ("[]", "must hold names")]:
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            READERS.apply_split(tmp_path / "split.json")
