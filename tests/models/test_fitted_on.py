from __future__ import annotations

import logging

import numpy as np
import pytest
from anndata import AnnData

import virtualcell as vc


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return vc.datasets.synthetic(n_contexts=2, n_perturbations=3, n_genes=40, n_cells_per_group=12, seed=1)


@pytest.fixture(scope="module")
def fitted(cells: AnnData) -> vc.models.Additive:
    return vc.tl.fit_baseline(cells.copy(), "Additive", **cells.uns["design"], scale="counts")


def said(data: AnnData, model: vc.models.Additive, caplog: pytest.LogCaptureFixture, **options: object) -> list[str]:
    name = model.known_names[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, "virtualcell"):
        vc.tl.predict_perturbation(data, name, model=model, **options)
    return [r.message for r in caplog.records if "have other values" in r.message and r.levelno == logging.INFO]


def other_order(cells: AnnData) -> AnnData:
    rng = np.random.default_rng(0)
    out = cells[rng.permutation(cells.n_obs), rng.permutation(cells.n_vars)].copy()
    out.X = out.X.toarray().astype(np.float64)
    return out


def renamed(cells: AnnData) -> AnnData:
    out = vc.datasets.synthetic(n_contexts=2, n_perturbations=3, n_genes=40, n_cells_per_group=12, seed=2)
    out.obs_names = [f"new_{name}" for name in out.obs_names]
    return out


def some_of_them(cells: AnnData) -> AnnData:
    return cells[::2].copy()


def numbered(cells: AnnData) -> AnnData:
    out = vc.datasets.synthetic(n_contexts=2, n_perturbations=3, n_genes=40, n_cells_per_group=12, seed=2)
    out.obs_names = [str(i) for i in range(out.n_obs)]
    return out


@pytest.mark.parametrize("other", [AnnData.copy, other_order, renamed, some_of_them, numbered])
def test_nothing_is_said_of_the_same_cells_and_of_new_ones(cells, fitted, caplog, other) -> None:
    assert not said(other(cells), fitted, caplog)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_numbers_are_no_names(caplog) -> None:
    """Cells of two data sets that nobody named are called alike."""
    one, two = numbered(None), vc.datasets.synthetic(
        n_contexts=2, n_perturbations=3, n_genes=40, n_cells_per_group=12, seed=3
    )  # fmt: skip
    two.obs_names = one.obs_names
    model = vc.tl.fit_baseline(one, "Additive", **one.uns["design"], scale="counts")
    assert not said(two, model, caplog)


def test_other_values_of_the_same_cells_are_said(cells, fitted, caplog, tmp_path) -> None:
    changed = cells.copy()
    changed.X = changed.X.copy()
    changed.X.data = np.ceil(changed.X.data / 2)
    (line,) = said(changed, fitted, caplog)
    assert "64 of 64 control cells that were compared" in line
    fitted.save(tmp_path)
    again = vc.io.load(tmp_path)
    assert again.fitted_on == fitted.fitted_on
    assert said(changed, again, caplog) == [line]
    # genes that are gone change the totals, unless these are given
    assert said(cells[:, 1:].copy(), fitted, caplog, min_gene_coverage=0.5)


def test_what_is_noted(cells, fitted) -> None:
    turned = vc.tl.fit_baseline(other_order(cells), "Additive", **cells.uns["design"], scale="counts").fitted_on
    noted = fitted.fitted_on
    assert (turned.cells, turned.genes) == (noted.cells, noted.genes)
    assert [s[:2] for s in turned.sample] == [s[:2] for s in noted.sample]
    np.testing.assert_allclose([s[2:] for s in turned.sample], [s[2:] for s in noted.sample], rtol=1e-5)
    logs = np.log1p(cells.X.toarray().astype(float) / cells.X.sum(axis=1) * 1e4)
    place = cells.obs_names.get_indexer([s[0] for s in noted.sample])
    np.testing.assert_allclose([s[2] for s in noted.sample], np.asarray(logs[place]).sum(axis=1), rtol=1e-5)
    assert (cells.obs.iloc[place]["target_gene"] == "non-targeting").all()
    fewer = vc.tl.fit_baseline(cells[1:].copy(), "Additive", **cells.uns["design"], scale="counts").fitted_on
    assert fewer.cells != noted.cells
    assert (noted.n_cells, noted.n_genes) == cells.shape
    assert repr(noted) == f"FittedOn({cells.n_obs} cells {noted.cells}, 40 genes {noted.genes})"


def test_no_cell_is_read_to_note_it_in_a_fit(cells, fitted, monkeypatch) -> None:
    """ST notes what it has packed, in folds too, and baselines that get measured effects tell of no cells."""
    noted, of = [], vc.models.FittedOn.of
    monkeypatch.setattr(vc.models.FittedOn, "of", lambda *args: noted.append(args) or of(*args))
    training = {"max_steps": 2, "accelerator": "cpu", "progress_bar": False}
    network = {"n_networks": 1, "set_size": 8}
    st = vc.tl.fit_state(cells.copy(), **cells.uns["design"], se=False, training=training, network=network)
    assert st.verdict is not None
    assert noted
    assert all(len(args) == 2 for args in noted)  # the screen, and what was read of it
    assert [s[:2] for s in st.fitted_on.sample] == [s[:2] for s in fitted.fitted_on.sample]
    places = [[sums[i] for sums in model.fitted_on.sample] for i in (2, 3) for model in (st, fitted)]
    np.testing.assert_allclose(places[::2], places[1::2], rtol=1e-5)
    assert st.fallback is None or st.fallback.fitted_on == st.fitted_on


def test_transfer_notes_its_own_cells_and_no_sources(cells, caplog) -> None:
    source = {"adata": cells, "perturbation_key": "target_gene", "control": "non-targeting", "scale": "counts"}
    design = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
    vc.models.Transfer.setup_anndata(cells, **design, scale="counts")
    transfer = vc.models.Transfer(cells, {"other": source})
    transfer.train()
    additive = vc.tl.fit_baseline(cells, "Additive", **cells.uns["design"], scale="counts")
    assert transfer.fitted_on == additive.fitted_on
    changed = cells.copy()
    changed.X = changed.X.copy()
    changed.X.data = np.ceil(changed.X.data / 2)
    (line,) = said(changed, transfer, caplog)
    assert "64 of 64 control cells" in line
    # on other genes the sums of cells cannot be compared, in another order they can
    assert transfer.on_genes(list(cells.var_names[1:])).fitted_on is None
    assert transfer.on_genes(list(cells.var_names[::-1])).fitted_on == transfer.fitted_on
    alone = vc.models.Transfer.fit(
        {"other": source}, perturbation_key="target_gene", control="non-targeting", scale="counts", slope=0.3
    )
    assert alone.fitted_on is None
