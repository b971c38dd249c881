from __future__ import annotations

import dataclasses
import math
import shutil

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import virtualcell as vc
from virtualcell.datasets import _published

NAMES = {"kang2018": "scgen_valid.h5ad", "norman2019_mcfaline2024": "perturbench_devel.h5ad"}


@pytest.fixture
def served(server, originals, monkeypatch):
    """Both files at their names, from a server on this machine in place of the public one."""
    for key, name in NAMES.items():
        (server.folder / name).symlink_to(originals / name)
        local = dataclasses.replace(_published.FILES[key], url=f"{server.url}/{name}")
        monkeypatch.setitem(_published.FILES, key, local)
    return server


def assert_whole(adata: ad.AnnData) -> None:
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.X.data.min() >= 1


def assert_behind(adata: ad.AnnData, lognorm: sparse.csr_matrix, size: np.ndarray, rtol: float) -> None:
    """The counts over the library sizes are the values of the file, up to one constant `size` per cell."""
    expected = adata.X.multiply(size[:, None]).tocsr()
    found = lognorm.copy().astype(np.float64)
    found.data = np.expm1(found.data)
    np.testing.assert_allclose(expected[found.nonzero()], found[found.nonzero()], rtol=rtol)
    assert expected.nnz == found.nnz


def test_kang_has_the_counts_of_the_study(served, kang_file, tmp_path):
    adata = vc.datasets.kang2018(folder=tmp_path / "cache")
    assert_whole(adata)
    known = ad.read_h5ad(kang_file)
    assert adata.obs_names.equals(known.obs_names)
    assert list(adata.var_names) == list(known.var_names)
    assert (adata.X != known.X).nnz == 0
    for here, there in [
        ("perturbation", "perturbation"),
        ("context", "cell_type_coarse"),
        ("cell_type", "cell_type"),
        ("total_counts", "total_counts"),
        ("n_genes", "n_genes"),
    ]:
        assert (adata.obs[here].astype(str) == known.obs[there].astype(str)).all(), here
    source = ad.read_h5ad(served.folder / NAMES["kang2018"])
    # The authors of scGen scaled the cells to the median library size of all their cells.
    assert_behind(adata, source.X, 1832.5 / adata.obs["total_counts"].to_numpy(), rtol=2e-6)


def test_norman_has_the_counts_of_the_studies(served, norman_file, tmp_path):
    adata = vc.datasets.norman2019_mcfaline2024(folder=tmp_path / "cache")
    assert_whole(adata)
    known = ad.read_h5ad(norman_file)
    assert adata.obs_names.equals(known.obs_names)
    assert list(adata.var_names) == list(known.var_names)
    for here, there in [
        ("perturbation", "target_gene"),
        ("context", "cell_type"),
        ("batch", "batch"),
        ("modality", "modality"),
        ("n_genes", "n_genes"),
    ]:
        assert (adata.obs[here].astype(str) == known.obs[there].astype(str)).all(), here
    # 181 glioblastoma cells of that other file have twice (one: three times) the counts and library size: every count
    # of them is even, which dozens of expressed genes cannot be by chance.
    factor = np.array([math.gcd(*row.data.astype(int)) for row in known.X])
    assert (factor > 1).sum() == 181
    assert (adata.obs["context"][factor > 1] != "K562").all()
    assert (adata.X.multiply(factor[:, None]).tocsr() != known.X).nnz == 0
    np.testing.assert_array_equal(adata.obs["total_counts"] * factor, known.obs["total_counts"])
    source = ad.read_h5ad(served.folder / NAMES["norman2019_mcfaline2024"])
    assert_behind(adata, source.X, 1e4 / adata.obs["total_counts"].to_numpy(), rtol=1e-11)
    # fewer than the study's own totals, which are over all genes before its filter
    assert (adata.obs["total_counts"] < source.obs["ncounts"].to_numpy()).all()


@pytest.mark.parametrize(
    ("name", "contexts", "perturbation", "gene"),
    [
        ("kang2018", ["B", "CD4T", "CD8T", "Dendritic", "Mono", "NK"], "IFN-beta", "ISG15"),
        ("norman2019_mcfaline2024", ["A172", "K562", "T98G", "U87MG"], "TMSB4X", "TMSB4X"),
    ],
)
def test_the_design_is_what_a_fit_takes_and_known_effects_are_there(
    served, tmp_path, name, contexts, perturbation, gene
):
    adata = getattr(vc.datasets, name)(folder=tmp_path)
    design = adata.uns["design"]
    model = vc.tl.fit_state(adata, **design, se=False, validate=False, n_top_genes=50, training={"max_steps": 2})
    assert sorted(adata.obs[design["context_key"]].cat.categories) == contexts
    assert perturbation in model.perturbations
    share = adata[:, gene].X.toarray().ravel() / adata.obs["total_counts"].to_numpy()
    treated = (adata.obs["perturbation"] == perturbation).to_numpy()
    control = (adata.obs["perturbation"] == design["control"]).to_numpy()
    for context in adata.obs["context"][treated].unique():
        here = (adata.obs["context"] == context).to_numpy()
        assert share[treated & here].mean() > 4 * share[control & here].mean(), context


def test_a_second_call_asks_nothing_and_a_file_put_there_by_hand_will_do(served, tmp_path, originals):
    vc.datasets.kang2018(folder=tmp_path / "cache")
    vc.datasets.kang2018(folder=tmp_path / "cache")
    assert served.asked == [f"/{NAMES['kang2018']}"]
    (tmp_path / "by_hand").mkdir()
    shutil.copy(originals / NAMES["kang2018"], tmp_path / "by_hand")
    vc.datasets.kang2018(folder=tmp_path / "by_hand")
    assert len(served.asked) == 1


def test_another_file_is_refused(served, tmp_path):
    path = served.folder / NAMES["kang2018"]
    path.unlink()
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="does not match the known hash"):
        vc.datasets.kang2018(folder=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.h5ad")) == []


def test_without_internet_address_file_and_folder_are_named(closed_port, monkeypatch, tmp_path):
    local = dataclasses.replace(_published.FILES["kang2018"], url=f"{closed_port}/valid.h5ad")
    monkeypatch.setitem(_published.FILES, "kang2018", local)
    with pytest.raises(ConnectionError) as error:
        vc.datasets.kang2018(folder=tmp_path)
    for part in (local.url, "'scgen_valid.h5ad'", repr(str(tmp_path))):
        assert part in str(error.value)


def test_counts_come_back_whatever_the_cells_were_scaled_to():
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.7, size=(200, 300)))
    counts = sparse.vstack([counts, counts[:2] * 6 + (counts[:2] > 2) * 4]).tocsr()  # least count 6, divisor 2
    size = rng.uniform(0.01, 50, size=counts.shape[0])
    lognorm = counts.multiply(size[:, None]).log1p().tocsr()
    found, unit = _published.recovered_counts(lognorm)
    assert (found[:200] != counts[:200]).nnz == 0
    np.testing.assert_allclose(unit[:200], size[:200], rtol=1e-10)
    # what all counts of a cell have in common cannot be seen
    assert (found[200:] * 2 != counts[200:]).nnz == 0
    with pytest.raises(ValueError, match="202 cells are not log1p of scaled whole counts"):
        _published.recovered_counts(lognorm.sqrt())
    with pytest.raises(ValueError, match="1 cells have no counts"):
        _published.recovered_counts(sparse.vstack([lognorm, sparse.csr_matrix((1, 300))]).tocsr())
