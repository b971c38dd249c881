"""Every reader of files that others made, and a small valid file for each: what the fuzzers begin from.

    python tests/untrusted/readers.py npz --seconds 60

changes the file of one reader at random for so long, and says what was found. With `atheris` installed the changes are
led by the branches that they reach (`--atheris`).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import logging
import pickle
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
    "cells": Reader("x.h5ad", of_corpus("table.h5ad"), read_cells),
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


def run_at_random(
    reader: Reader, seconds: float, seed: int, keep: Path | None = None
) -> tuple[Counter, dict[str, bytes]]:
    """Change the valid file for so long; count what came of it, and keep one file of each kind of failure."""
    rng, valid, found, failures = np.random.default_rng(seed), reader.valid(), Counter(), {}
    end = time.monotonic() + seconds
    with workplace(reader) as folder:
        while time.monotonic() < end:
            content, start = changed(valid, rng), time.monotonic()
            if keep:  # where the process does not come back
                (keep / "latest").write_bytes(content)
            try:
                found[reader(content, folder)] += 1
            except Exception as error:
                last = error.__traceback__
                while last.tb_next is not None:
                    last = last.tb_next
                kind = f"{type(error).__name__} at {last.tb_frame.f_code.co_filename}:{last.tb_lineno}: {error}"[:200]
                found["failed"] += 1
                failures.setdefault(kind.split(": ")[0], content)
                print("failed:", kind, file=sys.stderr)
            if (took := time.monotonic() - start) > 2:
                found["slow"] += 1
                failures.setdefault(f"slow, {took:.1f} s", content)
    return found, failures


def run_atheris(reader: Reader, seconds: float, folder: Path) -> None:
    import atheris

    def one(content: bytes) -> None:
        reader(content, folder)

    (folder.parent / "inputs").mkdir()
    (folder.parent / "inputs" / "valid").write_bytes(reader.valid())
    atheris.instrument_all()
    options = [
        f"-max_total_time={int(seconds)}",
        "-rss_limit_mb=4000",
        "-timeout=10",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder.parent}/", str(folder.parent / "inputs")], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for files that make a reader fail")
    options = parser.parse_args()
    quiet()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    for name in READERS if options.reader == "all" else [options.reader]:
        reader = READERS[name]
        if options.atheris:
            with workplace(reader) as folder:
                run_atheris(reader, options.seconds, folder)
            return
        found, failures = run_at_random(reader, options.seconds, options.seed, options.keep)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{name}: {sum(found.values())} inputs, {dict(found)}, largest memory {peak} MB", flush=True)
        for i, (kind, content) in enumerate(failures.items()):
            print(f"  {kind}")
            if options.keep:
                (options.keep / f"{name.replace(' ', '_')}_{i}").write_bytes(content)


if __name__ == "__main__":
    main()
