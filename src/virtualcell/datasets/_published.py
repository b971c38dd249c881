"""Two small published experiments, from files of a few megabytes at pinned commits of public repositories."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from virtualcell.datasets._fetch import retrieve
from virtualcell.datasets._tidy import design_of

_EXACT = 2e-6  # relative: what single precision leaves of a log-normalised value
_MOST_IN_ONE = 10  # largest common divisor of a cell's counts that is looked for


@dataclass(frozen=True)
class PinnedFile:
    """A file that never changes: its address, its name in the cache, and its checksum."""

    url: str
    name: str
    sha256: str

    def path(self, folder: str | Path | None) -> Path:
        """Download it, unless it is there."""
        return retrieve(self.url, name=self.name, known_hash=f"sha256:{self.sha256}", folder=folder)


FILES = {
    "kang2018": PinnedFile(
        "https://raw.githubusercontent.com/theislab/scgen/dd7e178f9b42b9dfef9eb18d0da4b8e3caea4cf7/data/valid.h5ad",
        "scgen_valid.h5ad",
        "83f89f5356a4c01f65bbcee225eb45d8d8b13b6c962724431a26c1bf568ff09e",
    ),
    "norman2019_mcfaline2024": PinnedFile(
        "https://raw.githubusercontent.com/altoslabs/perturbench/4dd6a03c54ef348f6be6e46e21ea7f80eb2daaa2/"
        "src/perturbench/data/resources/devel.h5ad",
        "perturbench_devel.h5ad",
        "220998f5630c813228c8661c86dd52244b9ac87127511289af90e0d900d8429b",
    ),
}


def kang2018(*, folder: str | Path | None = None) -> AnnData:
    """Blood cells of lupus patients with and without interferon beta, in six cell types.

    1,975 cells x 6,998 genes, 2.3 MB: the part of the study that the authors of scGen published for validation. `X`
    holds raw counts, recovered exactly from their log-normalised values.

    Parameters
    ----------
    folder
        Where to keep the file; `vc.settings.cache_dir` by default.

    Returns
    -------
    Cells x genes, `X` raw counts (float32 CSR). `obs`: `perturbation` ("control" or "IFN-beta"); `context`, the cell
    type, with both kinds of monocytes as one, because the file's labels of these disagree with the study's own;
    `batch`, one value, since the file does not name the donors; `cell_type`, the file's seven labels; `total_counts`,
    over all genes of the study, more than these; `n_genes`. `uns["design"]` holds the arguments that name these
    columns: `vc.tl.fit_state(adata, **adata.uns["design"])`.

    Raises
    ------
    ConnectionError
        The file cannot be downloaded. The message says where to put it by hand.

    Notes
    -----
    Please cite Kang et al., Multiplexed droplet single-cell RNA-sequencing using natural genetic variation, Nature
    Biotechnology 36, 89 (2018), https://doi.org/10.1038/nbt.4042, whose data are public as GSE96583. The file stands in
    https://github.com/theislab/scgen (Lotfollahi et al., scGen predicts single-cell perturbation responses, Nature
    Methods 16, 715, 2019), whose licence is the GPL-3.

    Examples
    --------
    >>> adata = vc.datasets.kang2018()
    >>> adata.obs["perturbation"].value_counts().to_dict()
    {'IFN-beta': 1039, 'control': 936}
    """
    file = _read(FILES["kang2018"].path(folder))
    counts, _ = recovered_counts(file.X)
    cell_type = file.obs["cell_type"].astype(str)
    obs = {
        "perturbation": file.obs["condition"].astype(str).replace("stimulated", "IFN-beta"),
        "context": cell_type.replace({"CD14+Mono": "Mono", "FCGR3A+Mono": "Mono"}),
        "batch": pd.Series("unknown", index=file.obs_names),
        "cell_type": cell_type,
    }
    return _tidy(file, counts, obs, file.obs["n_counts"], file.obs["n_genes"], control="control")


def norman2019_mcfaline2024(*, folder: str | Path | None = None) -> AnnData:
    """Four cell lines with nine targets in common: a small test of prediction across contexts.

    5,961 cells x 500 genes, 1.1 MB: K562 with CRISPR activation from Norman et al., and the glioblastoma lines A172,
    T98G and U87MG with CRISPR interference from McFaline-Figueroa et al., as PerturBench has them for development.
    `X` holds raw counts, recovered exactly from their log-normalised values.

    The right shape to try splits on, and too weak to rank models by: K562 responds, the glioblastoma lines hardly do,
    and activation is not interference.

    Parameters
    ----------
    folder
        Where to keep the file; `vc.settings.cache_dir` by default.

    Returns
    -------
    Cells x genes, `X` raw counts (float32 CSR). `obs`: `perturbation` ("non-targeting", targets, and pairs as `A+B`);
    `context`, the cell line; `batch`, lanes of K562 and one value for the others, whose batches the file does not name;
    `modality` ("CRISPRa", "CRISPRi"); `total_counts`, over all genes before 500 were chosen; `n_genes`. `uns["design"]`
    holds the arguments that name these columns: `vc.tl.fit_state(adata, **adata.uns["design"])`.

    Raises
    ------
    ConnectionError
        The file cannot be downloaded. The message says where to put it by hand.

    Notes
    -----
    Please cite Norman et al., Exploring genetic interaction manifolds constructed from rich single-cell phenotypes,
    Science 365, 786 (2019), https://doi.org/10.1126/science.aax4438 (GSE133344), and McFaline-Figueroa et al.,
    Multiplex single-cell chemical genomics reveals the kinase dependence of the response to targeted therapy, Cell
    Genomics 4, 100487 (2024), https://doi.org/10.1016/j.xgen.2023.100487 (GSE225775). The file is part of
    https://github.com/altoslabs/perturbench, under the BSD 3-clause licence.

    Examples
    --------
    >>> adata = vc.datasets.norman2019_mcfaline2024()
    >>> adata.obs["context"].value_counts().to_dict()
    {'K562': 3375, 'T98G': 871, 'U87MG': 865, 'A172': 850}
    """
    file = _read(FILES["norman2019_mcfaline2024"].path(folder))
    counts, unit = recovered_counts(file.X)
    norman = (file.obs["dataset"] == "norman19").to_numpy()
    lane = file.obs_names.to_series().str.extract(r"-(\d+)$", expand=False)
    obs = {
        "perturbation": file.obs["condition"].astype(str).replace("control", "non-targeting"),
        "context": file.obs["cell_type"].astype(str).replace("k562", "K562"),
        "batch": ("norman_gem" + lane).where(norman, "mcfaline"),
        "modality": file.obs["perturbation_type"].astype(str),
    }
    return _tidy(file, counts, obs, 1e4 / unit, file.obs["ngenes"], control="non-targeting")


def recovered_counts(lognorm: sparse.csr_matrix) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Return the counts behind log1p of scaled counts (float32 CSR), and what one count was scaled to (n_cells,).

    A cell's values are whole multiples of one number. That is its smallest value, a gene with one count, or the largest
    part of it that leaves every value whole.

    Raises
    ------
    ValueError
        A cell has no counts, or its values are not multiples of one number.
    """
    matrix = sparse.csr_matrix(lognorm, dtype=np.float64)
    per_cell = np.diff(matrix.indptr)
    if (per_cell == 0).any():
        raise ValueError(f"{int((per_cell == 0).sum())} cells have no counts: what one count is cannot be told.")
    values = np.expm1(matrix.data)
    unit = np.minimum.reduceat(values, matrix.indptr[:-1])
    ratio = values / np.repeat(unit, per_cell)
    smallest = np.zeros(len(unit))  # count of the cell's least expressed gene
    for guess in range(1, _MOST_IN_ONE + 1):
        off = np.abs(ratio * guess - np.rint(ratio * guess)) / (ratio * guess)
        fits = np.maximum.reduceat(off, matrix.indptr[:-1]) < _EXACT
        smallest[fits & (smallest == 0)] = guess
    if not smallest.all():
        raise ValueError(f"The values of {int((smallest == 0).sum())} cells are not log1p of scaled whole counts.")
    counts = np.rint(ratio * np.repeat(smallest, per_cell)).astype(np.float32)
    return sparse.csr_matrix((counts, matrix.indices, matrix.indptr), shape=matrix.shape), unit / smallest


def _read(path: Path) -> AnnData:
    with warnings.catch_warnings():  # the layout is of 2018; the checksum says that it is the file
        warnings.simplefilter("ignore")
        return ad.read_h5ad(path)


def _tidy(
    file: AnnData,
    counts: sparse.csr_matrix,
    labels: dict[str, pd.Series],
    total: np.ndarray,
    n_genes: np.ndarray,
    control: str,
) -> AnnData:
    """Put counts and columns together. Library sizes are over all genes of the study, of which the file has some."""
    obs = pd.DataFrame({key: pd.Categorical(column) for key, column in labels.items()})
    obs["total_counts"] = np.rint(np.asarray(total)).astype(np.int64)
    obs["n_genes"] = np.asarray(n_genes).astype(np.int64)
    obs.index = pd.Index(file.obs_names.astype(str), name=None)
    var = pd.DataFrame(index=pd.Index(file.var_names.astype(str), name=None))
    adata = AnnData(counts, obs=obs, var=var)
    adata.uns["design"] = design_of(control, library_size_key="total_counts")
    return adata
