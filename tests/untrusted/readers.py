"""Every reader of files that others made, and a small valid file for each: what the fuzzers begin from.

    python tests/untrusted/readers.py npz --seconds 60

changes the file of one reader at random for so long, and says what was found. With `atheris` installed the changes are
led by the branches of the package that they reach (`--atheris`). benchmarks/fuzz.py runs them one after another.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import importlib
import inspect
import io
import json
import logging
import os
import pickle
import pkgutil
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import anndata as ad
import numpy as np
import pandas as pd
import torch

import virtualcell as vc
from virtualcell._files import read_cells
from virtualcell._unpickle import UnsafePickleError, read_pickle, read_torch
from virtualcell.pp._fasta import isoforms_of_genes

CORPUS = Path(__file__).parent / "corpus"
STORED = Path(__file__).parents[1] / "stored" / "format_2"
# What a reader may say, each in a sentence of ours.
ALLOWED = (ValueError, KeyError, FileNotFoundError, UnsafePickleError)


@dataclass(frozen=True)
class Reader:
    """One reader.

    Parameters
    ----------
    name
        Name of the file that it is given, whose suffix matters.
    valid
        Content of a small valid file.
    read
        What reads the file; or, for a folder, what reads the folder that has the file in it.
    folder
        Name of a folder of the corpus that the file belongs into.
    """

    name: str
    valid: Callable[[], bytes]
    read: Callable[[Path], object]
    folder: str | None = None

    def __call__(self, content: bytes, path: Path) -> str:
        """Read a file of this content; return what came of it, and raise where an error is none of ours."""
        (path / self.name).parent.mkdir(parents=True, exist_ok=True)
        (path / self.name).write_bytes(content)
        try:
            self.read(path if self.folder else path / self.name)
        except ALLOWED as error:
            is_bare = type(error) is KeyError or isinstance(error, UnicodeError | json.JSONDecodeError)
            if is_bare or len(str(error).split()) < 4:
                raise
            return "refused"
        return "read"


def table() -> pd.DataFrame:
    return pd.DataFrame(np.arange(8.0).reshape(4, 2), index=["JAK2", "STAT1", "IRF1", "NA"], columns=["0", "1"])


def written(write: Callable[[Path], object], suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        write(path)
        return path.read_bytes()


def of_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def npz() -> bytes:
    return written(lambda p: np.savez(p, genes=np.array(table().index, str), embeddings=table().to_numpy()), ".npz")


def split() -> bytes:
    cells = {"train": ["c0", "c1"], "val": ["c2"], "test": ["c3"]}
    labels = {"kind": "random", "perturbation_key": "pert", "control": "NT", "held_out": {}, "cells": cells}
    return json.dumps(labels).encode()


def apply_split(path: Path) -> None:
    obs = pd.DataFrame({"pert": ["NT", "A", "A", "A"]}, index=["c0", "c1", "c2", "c3"])
    vc.pp.apply_split(ad.AnnData(np.ones((4, 1), np.float32), obs=obs), path)


FASTA = b">ENSP1 pep gene:ENSG1.2 gene_symbol:JAK2 x\nMKV\nLLA*\n>sp|P1|A OS=Homo GN=STAT1 PE=1\nMAJ\n"
GTF = b'##x\n1\tHAVANA\tgene\t10\t90\t.\t-\t.\tgene_id "ENSG00000000001.2"; gene_name "JAK2";\n'
GMT = "".join(f"SET{i}\tx\t" + "\t".join(f"G{j}" for j in range(i, i + 8)) + "\n" for i in range(6)).encode()
GAF = "!gaf\n" + "".join("\t".join(["U", "x", f"G{j}", "", f"GO:{j % 2}"] + ["x"] * 10) + "\n" for j in range(12))
EDGES = ("a,b,score\n" + "".join(f"G{i},G{j},0.9\n" for i in range(8) for j in range(i))).encode()
LINKS = b"protein1 protein2 combined_score\n" + b"".join(b"9.P%d 9.P%d 900\n" % (i, i + 1) for i in range(6))


def of_corpus(name: str) -> Callable[[], bytes]:
    return lambda: (CORPUS / name).read_bytes()


def of_stored(name: str) -> Callable[[], bytes]:
    return lambda: (STORED / name / "model.safetensors").read_bytes()


def gene_features(path: Path) -> pd.DataFrame:
    return vc.pp.gene_features(path, n_comps=2, min_genes=2)


def prepare_submission(path: Path) -> None:
    """A prediction that was written elsewhere becomes a submission: read, checked against the rules, written."""
    labels = {"perturbation_key": "pert", "control": "NT", "context_key": "ctx", "scale": "counts"}
    lists = {"genes": [f"G{i}" for i in range(5)], "perturbations": ["A", "B"], "contexts": ["x", "y"], "n_cells": 4}
    cells = read_cells(path)
    predicted = cells[cells.obs["pert"] != "NT"] if "pert" in cells.obs else cells
    vc.tl.prepare_submission(predicted, path.with_suffix(".vcc"), year=2026, overwrite=True, **labels, **lists)


def load_here(path: Path) -> object:
    return vc.io.load(path.parent, accelerator="cpu")


def unpacked(content: bytes) -> object:
    from virtualcell.io._save import unpack
    from virtualcell.models._common import model_of

    return model_of(unpack(np.frombuffer(content, np.uint8)))


READERS: dict[str, Reader] = {
    "model": Reader("model.safetensors", of_stored("st"), load_here),
    "se": Reader("model.safetensors", of_stored("se"), load_here),
    "baseline": Reader("model.safetensors", of_stored("additive"), load_here),
    "uns": Reader("uns.bin", of_stored("additive"), lambda p: unpacked(p.read_bytes())),
    "arc st checkpoint": Reader(
        "checkpoints/final.ckpt", of_corpus("arc_st/checkpoints/final.ckpt"), vc.models.ST.from_arc, "arc_st"
    ),
    "arc st config": Reader("config.yaml", of_corpus("arc_st/config.yaml"), vc.models.ST.from_arc, "arc_st"),
    "arc st sizes": Reader("var_dims.pkl", of_corpus("arc_st/var_dims.pkl"), vc.models.ST.from_arc, "arc_st"),
    "arc st map": Reader("pert_onehot_map.pt", of_corpus("arc_st/pert_onehot_map.pt"), vc.models.ST.from_arc, "arc_st"),
    "arc se weights": Reader(
        "model.safetensors", of_corpus("arc_se/model.safetensors"), vc.models.SE.from_arc, "arc_se"
    ),
    "arc se config": Reader("config.yaml", of_corpus("arc_se/config.yaml"), vc.models.SE.from_arc, "arc_se"),
    "arc se genes": Reader(
        "protein_embeddings.pt", of_corpus("arc_se/protein_embeddings.pt"), vc.models.SE.from_arc, "arc_se"
    ),
    "pickle": Reader("x.pkl", lambda: pickle.dumps({"a": [1, (2.5, b"x")], "g": np.array(["A", "B"])}), read_pickle),
    "torch": Reader("x.pt", lambda: of_torch({"A": torch.ones(2), "B": (torch.zeros(2, 2), "x")}), read_torch),
    "pt": Reader("x.pt", lambda: of_torch({"A": torch.ones(2), "B": torch.ones(2)}), vc.pp.read_gene_embeddings),
    "npz": Reader("x.npz", npz, vc.pp.read_gene_embeddings),
    "parquet": Reader("x.parquet", lambda: written(table().to_parquet, ".parquet"), vc.pp.read_gene_embeddings),
    "csv": Reader("x.csv", lambda: table().to_csv().encode(), vc.pp.read_gene_embeddings),
    "csv.gz": Reader("x.csv.gz", lambda: gzip.compress(table().to_csv().encode(), mtime=0), vc.pp.read_gene_embeddings),
    "h5ad": Reader("x.h5ad", of_corpus("table.h5ad"), vc.pp.read_gene_embeddings),
    "cells": Reader("x.h5ad", of_corpus("cells.h5ad"), read_cells),
    "submission": Reader("x.h5ad", of_corpus("cells.h5ad"), prepare_submission),
    "fasta": Reader("x.fa", lambda: FASTA, isoforms_of_genes),
    "fasta.gz": Reader("x.fa.gz", lambda: gzip.compress(FASTA, mtime=0), isoforms_of_genes),
    "gtf": Reader("x.gtf", lambda: GTF, vc.pp.gene_positions),
    "positions": Reader("x.tsv", lambda: b"gene\tchromosome\ttss\nJAK2\t9\t10\nSTAT1\t2\t20\n", vc.pp.gene_positions),
    "gmt": Reader("x.gmt", lambda: GMT, gene_features),
    "gaf": Reader("x.gaf", GAF.encode, gene_features),
    "edges": Reader("x.csv", lambda: EDGES, gene_features),
    "links": Reader("x.txt", lambda: LINKS, lambda p: vc.pp.gene_features(p, names=CORPUS / "info.txt", n_comps=2)),
    "split": Reader("x.json", split, apply_split),
}


# -- changes ----------------------------------------------------------------------------------------------------------

_WORDS = [
    *(b"\0", b"\xff\xfe", b"\xff" * 8, b"\x7f\xff\xff\xff", b"-1", b"NaN", b"1e999", b"99999999999999999999", b"null"),
    *(b"[" * 50, b"{" * 50, b'"', b"\n", b"\t", b",", b"*a", b"&a ", b"&a [*a]", b"!!python/object/apply:os.system "),
    *(
        b"cos\nsystem\n",
        b"\x85" * 40,
        b"r\xff\xff\xff\x7f",
        b"\x96\xff\xff\xff\xff\xff\x00\x00\x00",
        b"(",
        b"1000000000",
    ),
]


def changed(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with a few changes: bytes, pieces left out or said twice, words that readers stumble over, numbers."""
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(out) + 1))
        n = int(rng.integers(1, 20))
        kind = rng.integers(7)
        if kind == 0 and at < len(out):
            out[at] = int(rng.integers(256))
        elif kind == 1:
            del out[at : at + n]
        elif kind == 2:
            out[at:at] = out[at : at + n] * int(rng.integers(1, 5))
        elif kind == 3:
            out[at:at] = _WORDS[rng.integers(len(_WORDS))]
        elif kind == 4:
            word = _WORDS[rng.integers(len(_WORDS))]
            out[at : at + len(word)] = word
        elif kind == 5:
            del out[at:]
        else:  # another number where one is
            digits = [i for i, c in enumerate(out) if 48 <= c < 58]
            if digits:
                i = digits[rng.integers(len(digits))]
                out[i : i + 1] = str(int(rng.choice([0, 9, 10**5, 10**9, 10**15]))).encode()
    return bytes(out)


@contextlib.contextmanager
def workplace(reader: Reader) -> Iterator[Path]:
    """A folder with the other files that the reader's belongs to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        if reader.folder:
            shutil.copytree(CORPUS / reader.folder, folder)
        else:
            folder.mkdir()
        yield folder


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


MOST_MEMORY = 64_000_000  # beyond twice the file: libraries keep buffers of their own
SLOW = 2.0  # seconds of the processor


@dataclass
class Tally:
    """Reads contents one after another; counts what came of them and keeps one file of each kind of failure."""

    reader: Reader
    folder: Path
    keep: Path | None = None
    report: Path | None = None

    def __post_init__(self) -> None:
        self.counts: Counter = Counter()
        self.kinds: dict[str, str] = {}
        self.most_memory, self._reported = 0, 0.0
        self.reader(self.reader.valid(), self.folder)  # what is imported at the first file is not that file's memory

    def __call__(self, content: bytes) -> None:
        if self.keep:  # where the process does not come back
            (self.keep / "latest").write_bytes(content)
        before, start = memory_from_here(), time.process_time()
        try:
            self.counts[self.reader(content, self.folder)] += 1
        except Exception as error:
            last = error.__traceback__
            while last.tb_next is not None:
                last = last.tb_next
            where = f"{type(error).__name__} at {last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
            self._fail("failed", where, str(error)[:200], content)
        if (took := time.process_time() - start) > SLOW:
            self._fail("slow", "slow", f"{took:.1f} s", content)
        grown = most_memory() - before
        self.most_memory = max(self.most_memory, grown)
        if grown > 2 * len(content) + MOST_MEMORY:
            self._fail("greedy", "memory", f"{grown / 1e6:.0f} MB", content)
        if self.report and time.monotonic() - self._reported > 1:
            self.write()

    def _fail(self, result: str, kind: str, told: str, content: bytes) -> None:
        self.counts[result] += 1
        if kind not in self.kinds:
            self.kinds[kind] = told
            print(f"{result}: {kind}: {told}", file=sys.stderr, flush=True)
            if self.keep:
                (self.keep / f"{result}-{len(self.kinds)}").write_bytes(content)

    def summary(self) -> dict[str, object]:
        memory = round(self.most_memory / 1e6, 1)
        used = os.times()  # with the processes that read a file first
        seconds = round(used.user + used.system + used.children_user + used.children_system, 1)
        return {**self.counts, "kinds": self.kinds, "most_memory_mb": memory, "cpu_seconds": seconds}

    def write(self) -> None:
        self._reported = time.monotonic()
        self.report.write_text(json.dumps(self.summary()))


def memory_from_here() -> int:
    """Return the memory of this process in bytes, and let the system note its largest from here on; 0 but on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def most_memory() -> int:
    """Return the largest memory since :func:`memory_from_here`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run_at_random(tally: Tally, seconds: float, seed: int) -> None:
    """Change the valid file for so long."""
    rng, valid, end = np.random.default_rng(seed), tally.reader.valid(), time.monotonic() + seconds
    while time.monotonic() < end:
        tally(changed(valid, rng))


def instrument() -> None:
    """Have the branches of the package noted, for :func:`run_atheris`."""
    import atheris

    for module in pkgutil.walk_packages(vc.__path__, "virtualcell."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for found in gc.get_objects():  # not those of the libraries: there are a hundred thousand
        if inspect.isfunction(found) and (found.__module__ or "").startswith(("virtualcell", "yaml")):
            atheris.instrument_func(found)


def run_atheris(tally: Tally, seconds: float, seed: int) -> NoReturn:
    """Change the files that reached new branches of the package, at random or as libFuzzer does; ends the process."""
    import atheris

    valid, work = tally.reader.valid(), tally.folder.parent

    def mutate(content: bytes, most: int, one_seed: int) -> bytes:
        if one_seed % 4 == 0:
            return atheris.Mutate(content, most)
        # a file of a library's own format, changed again and again, no more comes past that library
        start = content if one_seed % 4 == 1 else valid
        return changed(start, np.random.default_rng(one_seed))[:most]

    (work / "inputs").mkdir()
    (work / "inputs" / "valid").write_bytes(valid)
    # the clock of libFuzzer is the wall's; a machine with other work on it takes longer
    options = [
        "-rss_limit_mb=4000",
        "-timeout=60",
        "-verbosity=0",
        f"-max_total_time={int(seconds)}",
        f"-seed={seed + 1}",
    ]
    options += ["-max_len=1000000", f"-artifact_prefix={tally.keep or work}/"]
    atheris.Setup([sys.argv[0], *options, str(work / "inputs")], tally, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(name: str, seconds: float, seed: int, *, keep: Path | None, report: Path | None, led: bool) -> None:
    """Fuzz one reader, led by atheris or at random, and write what came of it."""
    keep = keep and keep / name.replace(" ", "_")
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    with workplace(READERS[name]) as folder:
        tally = Tally(READERS[name], folder, keep, report)
        (run_atheris if led else run_at_random)(tally, seconds, seed)
        print(f"{name}: {tally.summary()}", flush=True)
        if report:
            tally.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="for one reader, after which the process ends")
    parser.add_argument("--keep", type=Path, help="folder for files that make a reader fail")
    parser.add_argument("--report", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    quiet()
    if options.atheris:
        instrument()
    how = {"keep": options.keep, "report": options.report, "led": options.atheris}
    for name in READERS if options.reader == "all" else [options.reader]:
        fuzz(name, options.seconds, options.seed, **how)


if __name__ == "__main__":
    main()
