"""Write the small valid files that the fuzzers begin from and that take a model to make: tests/untrusted/make.py."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import virtualcell as vc

HERE = Path(__file__).parent / "corpus"


def main() -> None:
    logging.disable(logging.CRITICAL)
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    genes = [f"G{i}" for i in range(5)]
    labels = [(p, c) for p in ("NT", "A", "B") for c in "xy" for _ in range(4)]
    obs = pd.DataFrame(labels, columns=["pert", "ctx"], index=[f"c{i}" for i in range(24)])
    counts = np.random.default_rng(0).poisson(5, (24, 5)).astype(np.float32)
    data = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    sizes = {"n_hidden": 4, "n_feedforward": 4, "n_layers": 1, "n_heads": 2}
    vc.models.ST.setup_anndata(data, perturbation_key="pert", control="NT", context_key="ctx", scale="counts")
    st = vc.models.ST(data, preset="published", set_size=4, head_dim=2, n_encoder_layers=1, n_decoder_layers=1, **sizes)
    st.train(max_steps=1, accelerator="cpu", progress_bar=False)
    st.to_arc(HERE / "arc_st")
    vc.models.SE.setup_anndata(data)
    vectors = pd.DataFrame(np.eye(5, dtype=np.float32)[:, :4], index=genes)
    se = vc.models.SE(data, vectors, n_output=4, length=4, n_targets=(2, 2, 1), **sizes)
    se.train(max_steps=1, accelerator="cpu", progress_bar=False)
    se.to_arc(HERE / "arc_se")
    table = pd.DataFrame(np.arange(8.0).reshape(4, 2), index=["JAK2", "STAT1", "IRF1", "NA"], columns=["0", "1"])
    ad.AnnData(table.astype(np.float32)).write_h5ad(HERE / "table.h5ad")
    of_cells = ad.AnnData(sparse.csr_matrix(counts), obs=obs.astype("category"), var=data.var)
    of_cells.obsm["X_pca"], of_cells.uns["run"] = counts[:, :2], {"name": "x", "sizes": np.arange(3)}
    of_cells.write_h5ad(HERE / "cells.h5ad", compression="gzip")
    lines = ["#string_protein_id\tpreferred_name", *(f"9.P{i}\tG{i}" for i in range(8))]
    (HERE / "info.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
