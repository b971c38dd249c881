from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pytest

import virtualcell as vc
from virtualcell.tl import _embed


def test_writes_what_the_model_returns_and_nothing_else(screen, model):
    before = screen.copy()
    vc.tl.embed(screen, model.se)
    np.testing.assert_array_equal(screen.obsm["X_state"], model.se.get_latent_representation(before))
    assert (screen.X != before.X).nnz == 0
    assert list(screen.obs) == list(before.obs)
    assert set(screen.uns) == set(before.uns)
    vc.tl.embed(screen, model.se, key_added="X_other", batch_size=50)
    with pytest.raises(TypeError, match="key_added=3 must be a name in obsm, such as 'X_state'"):
        vc.tl.embed(screen, model.se, key_added=3)
    with pytest.raises(ValueError, match="batch_size=0 is not a whole number of at least 1"):
        vc.tl.embed(screen, model.se, batch_size=0)
    np.testing.assert_allclose(screen.obsm["X_other"], screen.obsm["X_state"], atol=1e-5)


def test_layers_scales_and_gene_names(screen, model):
    expected = model.se.get_latent_representation(screen)
    other = screen.copy()
    other.layers["counts"] = other.X.copy()
    other.X = other.X.log1p()
    other.var["symbol"] = other.var_names.to_numpy()
    other.var_names = [f"ENSG{i:011d}" for i in range(other.n_vars)]
    vc.tl.embed(other, model.se, layer="counts", gene_key="symbol")
    np.testing.assert_allclose(other.obsm["X_state"], expected, atol=1e-5)
    vc.tl.embed(other, model.se, scale="log1p", gene_key="symbol", key_added="X_log")  # log1p of the counts themselves
    np.testing.assert_allclose(other.obsm["X_log"], expected, atol=1e-5)
    with pytest.raises(ValueError, match="scale='counts' was stated, but X holds fractions"):
        vc.tl.embed(other, model.se, gene_key="symbol")
    with pytest.raises(ValueError, match=r"Only 0 of 90 genes of the data.*pass gene_key='symbol'"):
        vc.tl.embed(other, model.se, layer="counts")


def test_mudata(screen, model):
    expected = model.se.get_latent_representation(screen)
    mdata = md.MuData({"gex": screen})
    vc.tl.embed(mdata, model.se, modality="gex")
    np.testing.assert_array_equal(mdata["gex"].obsm["X_state"], expected)
    with pytest.raises(KeyError, match="modality='rna' is unknown"):
        vc.tl.embed(mdata, model.se)


def test_cells_without_known_genes(screen, model):
    screen.X = screen.X.toarray()
    screen.X[[4, 7]] = 0
    with pytest.raises(
        ValueError, match=rf"2 cells express no gene that has an embedding, among them \['{screen.obs_names[4]}'"
    ):
        vc.tl.embed(screen, model.se)
    assert not screen.obsm


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_on_disk_the_vectors_are_the_same_and_a_part_goes_on(screen, model, tmp_path, monkeypatch, caplog, suffix):
    expected, path = model.se.get_latent_representation(screen), tmp_path / f"embedded{suffix}"
    monkeypatch.setattr(_embed, "_PORTION", 100)
    whole = type(model.se).get_latent_representation
    n_calls = 0

    def interrupted(self, *arguments, **how):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments, **how)

    monkeypatch.setattr(type(model.se), "get_latent_representation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vc.tl.embed(screen, model.se, to=path)
    assert not path.exists()
    n_calls = 10
    with caplog.at_level("INFO", logger="virtualcell"):
        vc.tl.embed(screen, model.se, to=path)
    assert "goes on behind 200 cells" in caplog.text
    assert n_calls == 10 + -(-(screen.n_obs - 200) // 100)
    written = ad.read_h5ad(path) if suffix == ".h5ad" else ad.read_zarr(path)
    np.testing.assert_allclose(written.obsm["X_state"], expected, atol=1e-5)
    assert written.obs.astype(str).equals(screen.obs.astype(str))
    assert "X_state" not in screen.obsm


def test_what_is_no_se_cannot_embed(screen, model):
    with pytest.raises(TypeError, match=r"^model=None is no SE.*fitted without se=False"):
        vc.tl.embed(screen.copy(), None)
