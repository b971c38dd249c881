"""The file format of the Virtual Cell Challenge: a tar of a compressed h5ad and small text files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
from anndata import AnnData

from virtualcell import __version__

_PREDICTION = "pred.h5ad.zst"


def write_vcc(path: Path, submission: AnnData, texts: Mapping[str, str]) -> None:
    """Write a tar of the compressed cells and small text files; `path` appears when it is whole."""
    with TemporaryDirectory(dir=path.parent, prefix=".submission-") as name:
        folder = Path(name)
        submission.write_h5ad(folder / "pred.h5ad")
        with (
            (folder / "pred.h5ad").open("rb") as source,
            pa.CompressedOutputStream(str(folder / _PREDICTION), "zstd") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        for member, text in texts.items():
            (folder / member).write_text(text)
        with tarfile.open(folder / "submission.tar", "w") as tar:
            for member in sorted([_PREDICTION, *texts]):  # meta.json comes first, watermark.txt last, as in theirs
                tar.add(folder / member, arcname=member, filter=_nobody)
        os.replace(folder / "submission.tar", path)


def _nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who wrote it and when, so that the same cells give the same file."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def vcc_meta(submission: AnnData, contexts: Sequence[str], perturbations: Iterable[str]) -> str:
    """Return what vcc-cli notes beside a prediction: its size, by which the scorer takes a machine, and its panel."""
    names = "\n".join(sorted(set(perturbations)))
    meta = {
        "schema": 1,
        "nnz": submission.X.nnz,
        "n_obs": submission.n_obs,
        "n_vars": submission.n_vars,
        "contexts": list(contexts),
        "perts_fingerprint": f"sha256:{hashlib.sha256(names.encode()).hexdigest()}",
        "written_by": f"virtualcell {__version__}",
    }
    return json.dumps(meta, sort_keys=True)
