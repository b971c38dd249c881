from __future__ import annotations

import itertools

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

import virtualcell as vc
from virtualcell.pl._split import _COLOURS

KEYS = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}


@pytest.fixture
def norman(norman_file) -> ad.AnnData:
    adata = ad.read_h5ad(norman_file)
    held_out = adata.obs["target_gene"].isin(["PLK4", "SGK1"]) & (adata.obs["cell_type"] == "A172")
    rng = np.random.default_rng(0)
    val = ~held_out & (adata.obs["target_gene"] != "non-targeting") & (rng.random(adata.n_obs) < 0.2)
    adata.obs["split"] = np.select([held_out, val], ["test", "val"], "train")
    return adata


def tiles(ax) -> pd.DataFrame:
    """Every rectangle: which part, where, how wide."""
    found = []
    names = {c: k for k, c in _COLOURS.items()}
    for collection in ax.collections:
        part = names[to_hex(collection.get_facecolor()[0]).upper()]
        for path in collection.get_paths():
            (x0, y0), (x1, _) = path.vertices[0], path.vertices[1]
            found.append((part, int(y0), int(x0 + 1e-9), x1 - x0))
    return pd.DataFrame(found, columns=["part", "row", "column", "width"])


def test_tiles_are_the_cross_table(norman):
    ax = vc.pl.split(norman, **KEYS)
    rows = [t.get_text() for t in ax.get_yticklabels()]
    columns = [t.get_text() for t in ax.get_xticklabels()]
    assert rows == ["non-targeting", *sorted(set(norman.obs["target_gene"]) - {"non-targeting"})]
    assert columns == sorted(norman.obs["cell_type"].unique())
    drawn = tiles(ax)
    groups = norman.obs.groupby(["target_gene", "cell_type"], observed=True)
    for (target, cell_type), cells in groups:
        i, j = rows.index(target), columns.index(cell_type)
        here = drawn[(drawn["row"] == i) & (drawn["column"] == j)].set_index("part")["width"]
        np.testing.assert_allclose(here.sort_index(), cells["split"].value_counts(normalize=True).sort_index())
    assert len(drawn.groupby(["row", "column"])) == groups.ngroups
    numbers = {(t.get_position()[1] - 0.5, t.get_position()[0] - 0.5): t.get_text() for t in ax.texts}
    assert numbers == {(rows.index(p), columns.index(c)): f"{len(g):,}" for (p, c), g in groups}
    parts = norman.obs["split"].value_counts()
    assert [t.get_text() for t in ax.get_legend().texts] == [f"{p} ({parts[p]:,} cells)" for p in _COLOURS]


def test_design_comes_from_the_split(norman):
    ours = {k: v for k, v in KEYS.items() if k != "context_key"}
    vc.pp.split(norman, **ours, holdout={"perturbations": ["PLK4"]})
    ax = vc.pl.split(norman)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["(all)"]
    drawn = tiles(ax).query("part == 'test'")
    plk4 = [t.get_text() for t in ax.get_yticklabels()].index("PLK4")
    assert drawn[["row", "column", "width"]].to_numpy().tolist() == [[plk4, 0, 1.0]]


def test_long_list_stays_readable(norman):
    k562 = norman[norman.obs["cell_type"] == "K562"].copy()
    k562.obs["target_gene"] = np.where(
        k562.obs["target_gene"] == "non-targeting", "non-targeting", [f"GENE{i % 250:03d}" for i in range(k562.n_obs)]
    )
    ax = vc.pl.split(k562, **KEYS)
    figure = ax.get_figure()
    assert figure.get_figheight() <= 9
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert 40 < len(boxes) < 100
    assert boxes[0].y1 > boxes[-1].y1
    assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(boxes))
    assert not ax.texts


def test_given_axes_and_errors(norman):
    _, ax = plt.subplots()
    assert vc.pl.split(norman, **KEYS, ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    with pytest.raises(KeyError, match=r"split_key='splits' is unknown. Did you mean 'split'"):
        vc.pl.split(norman, **KEYS, split_key="splits")
    norman.obs["split"] = norman.obs["split"].replace({"val": "valid"})
    with pytest.raises(KeyError, match=r"obs\['split'\]='valid' is unknown. Did you mean 'val'\?"):
        vc.pl.split(norman, **KEYS)
    assert "virtualcell" not in norman.uns  # a picture writes nothing
    with pytest.raises(ValueError, match="perturbation_key and control must be given"):
        vc.pl.split(norman)
