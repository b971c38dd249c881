from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.datasets import _scverse

N = 60
GENES = [f"GENE{i}" for i in range(8)]


def stand_in(name: str) -> ad.AnnData:
    """Cells in the form of a file, as far as its form is noted: a third are controls, a few have no label."""
    noted = _scverse.EXAMPLES[name]
    rng = np.random.default_rng(0)
    control = noted.control or "63(mod)_pBA580"
    perturbation = np.array([control, "A", "A+B"])[np.arange(N) % 3].astype(object)
    perturbation[0] = np.nan
    perturbation[1 : 1 + len(noted.left_out)] = noted.left_out
    obs = {noted.perturbation_key or "gene": pd.Categorical(perturbation), "ncounts": rng.random(N)}
    obs |= {noted.context_key: np.repeat(["x", "y"], N // 2)} if noted.context_key else {}
    obs |= {noted.batch_key: np.arange(N) % 2} if noted.batch_key else {}
    obs |= {noted.dose_key: np.where(np.arange(N) % 3 == 0, "nan", "0.5")} if noted.dose_key else {}
    counts = sparse.csr_matrix(rng.poisson(1.5, size=(N, len(GENES))), dtype=np.float64)
    adata = ad.AnnData(counts, obs=pd.DataFrame(obs, index=[f"cell{i}" for i in range(N)]))
    adata.var_names = GENES
    if noted.layer is not None:
        adata.layers[noted.layer] = counts
        adata.X = counts.log1p()
    return adata


def write(adata: ad.AnnData, name: str, folder) -> sparse.csr_matrix:
    noted = _scverse.EXAMPLES[name]
    if noted.file.endswith("h5mu"):
        # labels of a MuData stand in its own obs
        protein = ad.AnnData(np.ones((N, 2)), obs=pd.DataFrame(index=adata.obs_names))
        data = md.MuData({"rna": ad.AnnData(adata.X, obs=adata.obs[[]], var=adata.var), "adt": protein})
        for key in adata.obs:
            data.obs[key] = adata.obs[key]
        data.write(folder / noted.file)
    else:
        adata.write_h5ad(folder / noted.file)
    return adata.X if noted.layer is None else adata.layers[noted.layer]


@pytest.fixture
def served(server, monkeypatch):
    monkeypatch.setattr(_scverse, "EXAMPLE_DATA", server.url)
    return server


STATED = {
    "adamson_2016_upr_perturb_seq": {"control": "63(mod)_pBA580"},
    "replogle_2022_k562_essential": {"control": "63(mod)_pBA580", "perturbation_key": "gene"},
    "replogle_2022_rpe1": {"control": "63(mod)_pBA580", "perturbation_key": "gene"},
}


@pytest.mark.parametrize("name", _scverse.EXAMPLES)
def test_every_data_set_comes_in_one_form(served, tmp_path, name):
    source = stand_in(name)
    counts = write(source, name, served.folder)
    noted = _scverse.EXAMPLES[name]
    adata = vc.datasets.load(name, folder=tmp_path / "cache", **STATED.get(name, {}))
    left_out = 1 + len(noted.left_out)
    assert list(adata.obs_names) == list(source.obs_names[left_out:])
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert (counts[left_out:] != adata.X).nnz == 0
    design = adata.uns["design"]
    screen = Screen.from_anndata(adata, Design(**design))
    assert screen.n_cells == N - left_out
    labels = source.obs[noted.perturbation_key or "gene"].astype(str)[left_out:]
    assert (adata.obs["perturbation"].astype(str) == labels).all()
    assert (adata.obs["perturbation"] == design["control"]).sum() >= N // 3 - 2
    assert list(adata.obs["context"].cat.categories) == (["x", "y"] if noted.context_key else [noted.context])
    assert list(adata.obs["batch"].cat.categories) == (["0", "1"] if noted.batch_key else ["unknown"])
    assert design.get("dose_key") == ("dose" if noted.dose_key else None)
    if noted.dose_key:
        assert set(adata.obs["dose"].dropna()) == {0.5}
        assert set(screen.perturbation_names) == {"A_0.5", "A_0.5+B_0.5"}
    np.testing.assert_array_equal(adata.obs["ncounts"], source.obs["ncounts"][left_out:])
    adata.write_h5ad(tmp_path / "again.h5ad")


def test_doses_that_some_perturbed_cells_lack_are_no_part_of_the_design(served, tmp_path, caplog):
    source = stand_in("mcfarland_2020")
    source.obs["dose_value"] = ["nan" if i % 4 else "0.5" for i in range(N)]
    write(source, "mcfarland_2020", served.folder)
    adata = vc.datasets.load("mcfarland_2020", folder=tmp_path / "cache")
    assert "perturbed cells have no dose" in caplog.text
    assert set(adata.uns["design"]) == {"perturbation_key", "control", "context_key", "batch_key"}
    of_drugs = adata[(adata.obs["dose"] > 0) | (adata.obs["perturbation"] == "control")]
    screen = Screen.from_anndata(of_drugs, Design(**adata.uns["design"], dose_key="dose"))
    assert set(screen.perturbation_names) == {"A_0.5", "A_0.5+B_0.5"}


def test_what_is_not_known_is_not_guessed_and_the_remedy_works(served, tmp_path):
    write(stand_in("replogle_2022_rpe1"), "replogle_2022_rpe1", served.folder)
    with pytest.raises(ValueError, match=r"perturbation_key is not known\. obs has \['gene', 'ncounts'\]") as error:
        vc.datasets.load("replogle_2022_rpe1", folder=tmp_path)
    assert "'gene' ('A', 'A+B', '63(mod)_pBA580')" in str(error.value)
    assert "vc.datasets.load('replogle_2022_rpe1', perturbation_key=...)" in str(error.value)
    with pytest.raises(ValueError, match=r"label of the control is not known.*'63\(mod\)_pBA580'"):
        vc.datasets.load("replogle_2022_rpe1", perturbation_key="gene", folder=tmp_path)
    stated = {"perturbation_key": "gene", "control": "63(mod)_pBA580"}
    assert vc.datasets.load("replogle_2022_rpe1", **stated, folder=tmp_path).n_obs == N - 1


def test_several_labels_may_be_those_of_the_control(served, tmp_path):
    write(stand_in("replogle_2022_rpe1"), "replogle_2022_rpe1", served.folder)
    stated = {"perturbation_key": "gene", "folder": tmp_path}
    adata = vc.datasets.load("replogle_2022_rpe1", control=["63(mod)_pBA580", "A"], **stated)
    assert adata.uns["design"]["control"] == ["63(mod)_pBA580", "A"]
    # one in a list, as the command line has it
    one = vc.datasets.load("replogle_2022_rpe1", control=["63(mod)_pBA580"], **stated)
    assert one.uns["design"]["control"] == "63(mod)_pBA580"


def test_a_file_of_another_form_is_refused_with_what_it_has(served, tmp_path):
    source = stand_in("norman_2019")
    source.obs = source.obs.rename(columns={"perturbation_name": "guides", "gemgroup": "lane"})
    del source.layers["counts"]
    source.layers["umi"] = sparse.csr_matrix(np.rint(np.expm1(source.X.toarray())))
    source.write_h5ad(served.folder / "norman_2019.h5ad")
    stated = {"folder": tmp_path}
    for argument, value, message in [
        ("perturbation_key", "guides", r"should be 'perturbation_name', which the file does not have"),
        ("batch_key", "lane", r"should be 'gemgroup', which the file does not have"),
        ("layer", "umi", r"counts should be in layers\['counts'\]; the layers are \['umi'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            vc.datasets.load("norman_2019", **stated)
        stated[argument] = value
    assert vc.datasets.load("norman_2019", **stated).n_obs == N - 1
    with pytest.raises(ValueError, match=r"X holds values such as .* which are no counts; the layers are \['umi'\]"):
        vc.datasets.load("norman_2019", **stated | {"layer": "X"})
    with pytest.raises(ValueError, match="should be 'NT', which no cell has"):
        vc.datasets.load("norman_2019", **stated, control="NT")


def test_the_checksum_of_the_first_download_is_kept(served, tmp_path, closed_port, monkeypatch):
    name, file = "kang_2018", tmp_path / "kang_2018.h5ad"
    write(stand_in(name), name, served.folder)
    first = vc.datasets.load(name, folder=tmp_path)
    assert served.asked == ["/kang_2018.h5ad"]
    vc.datasets.load(name, folder=tmp_path)
    assert len(served.asked) == 1
    # damaged on this disk: downloaded again, and the same
    file.write_bytes(file.read_bytes()[:-100])
    assert (vc.datasets.load(name, folder=tmp_path).X != first.X).nnz == 0
    assert len(served.asked) == 2
    # replaced on the server: refused until the note is deleted
    other = stand_in(name)
    other.X = other.X * 2
    write(other, name, served.folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"no longer the file that was downloaded first.*kang_2018\.h5ad\.sha256"):
        vc.datasets.load(name, folder=tmp_path)
    (tmp_path / "kang_2018.h5ad.sha256").unlink()
    assert vc.datasets.load(name, folder=tmp_path).X.sum() == 2 * first.X.sum()
    # nobody answers: the file that is there will do, and a missing one is named
    monkeypatch.setattr(_scverse, "EXAMPLE_DATA", closed_port)
    vc.datasets.load(name, folder=tmp_path)
    with pytest.raises(ConnectionError) as error:
        vc.datasets.load("norman_2019", folder=tmp_path)
    for part in (f"{closed_port}/norman_2019.h5ad", "'norman_2019.h5ad'", repr(str(tmp_path))):
        assert part in str(error.value)


def test_the_table_names_every_data_set_and_so_does_the_help():
    table = vc.datasets.available()
    assert list(table.index) == sorted(_scverse.EXAMPLES)
    assert table.notna().all(axis=None)
    assert table["citation"].str.contains("https://doi.org/").all()
    for name in table.index:
        assert f'"{name}"' in vc.datasets.load.__doc__
    with pytest.raises(KeyError, match="'norman' is unknown"):
        vc.datasets.load("norman")
